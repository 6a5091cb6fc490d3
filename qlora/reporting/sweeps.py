"""A sweep's runs as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]
"""As `qlora.sweep` writes them: `values`, `outcome`, `training_loss`, and the rungs `trained` and `gptq`."""

# Heading, rung, key, format.
COLUMNS = (
    ("loss trained", "trained", "loss", "{:.4f}"),
    ("loss GPTQ", "gptq", "loss", "{:.4f}"),
    ("KL GPTQ", "gptq", "kl", "{:.4f}"),
    ("gain kept", "gptq", "gain_retained", "{:.1%}"),
    ("exact", "gptq", "exact_match", "{:.0%}"),
)
SPREAD = 4  # of values, from which on an axis is logarithmic


def sweep_table(rows: Sequence[Row]) -> Table:
    """A line per run, the best held-out loss of GPTQ in bold."""
    table = Table(box=None)
    for key in rows[0]["values"]:
        table.add_column(key, no_wrap=True)
    table.add_column("training loss", justify="right")
    shown = [column for column in COLUMNS if any(_measured(row, column[1], column[2]) is not None for row in rows)]
    for heading, _, _, _ in shown:
        table.add_column(heading, justify="right")
    table.add_column("time", justify="right")
    table.add_column("")
    losses = [loss for row in rows if (loss := held_out_loss(row)) is not None]
    for row in rows:
        cells = [_cell(row["training_loss"], "{:.4f}")]
        cells += [_cell(_measured(row, rung, key), form) for _, rung, key, form in shown]
        notes = [] if row["outcome"] == "done" else [row["outcome"]]
        notes += [f"{', '.join(row['taken_over'])} taken over"] if row["taken_over"] else []
        best = bool(losses) and held_out_loss(row) == min(losses)
        table.add_row(
            *row["values"].values(), *cells, f"{row['seconds']:.0f} s", "; ".join(notes), style="bold" if best else ""
        )
    return table


def held_out_loss(row: Row) -> float | None:
    """Of the GPTQ checkpoint, which is what is shipped; the training loss where nothing was measured."""
    loss: float | None = _measured(row, "gptq", "loss")
    return row["training_loss"] if loss is None else loss


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel for every key: losses over its values, a line for each combination of the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = list(rows[0]["values"])
    figure, panels = pyplot.subplots(1, len(keys), figsize=(5 * len(keys), 4), squeeze=False, sharey=True)
    for key, panel in zip(keys, panels[0], strict=True):
        others = [other for other in keys if other != key]
        lines: dict[str, list[Row]] = {}
        for row in rows:
            lines.setdefault(", ".join(f"{_short(other)} {row['values'][other]}" for other in others), []).append(row)
        numbers = _numbers(rows, key)
        for label, some in lines.items():
            points = [(numbers[row["values"][key]], loss) for row in some if (loss := held_out_loss(row)) is not None]
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=label) if points else None
        places = sorted(set(numbers.values()))
        if places[0] > 0 and places[-1] / places[0] >= SPREAD:
            panel.set_xscale("log")
        panel.set_xticks(places, sorted(numbers, key=numbers.__getitem__))
        panel.minorticks_off()
        panel.set_xlabel(key)
        panel.grid(alpha=0.3)
        if others:
            panel.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    measured = any(_measured(row, "gptq", "loss") is not None for row in rows)
    panels[0][0].set_ylabel("loss of the GPTQ checkpoint, held-out rows" if measured else "training loss")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _numbers(rows: Sequence[Row], key: str) -> dict[str, float]:
    """Where values lie on an axis: at what they are, or one after the other if they are no numbers."""
    values = list(dict.fromkeys(row["values"][key] for row in rows))
    try:
        return {value: float(value) for value in values}
    except ValueError:
        return {value: float(place) for place, value in enumerate(values)}


def _measured(row: Row, rung: str, key: str) -> Any:
    return row[rung].get(key) if row[rung] else None


def _cell(value: float | None, form: str) -> str:
    return "—" if value is None else form.format(value)


def _short(key: str) -> str:
    return key.rpartition(".")[2]
