"""What `qlora bench` measured, as a table for the terminal, in Markdown, and as plots over batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]
"""As `qlora.evaluation.bench.bench` returns them."""
Key = tuple[str, str, str | None]
"""Directory, form and kernel."""
Names = dict[Key, str]
Styles = dict[Key, dict[str, Any]]
Values = dict[tuple[Key, int], float]
"""(model, place of a batch size) → what is shown."""
GIB = 2**30
# Heading and what stands below it, in the table of one prompt length.
COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("load, s", lambda row: f"{row['load_seconds']:.1f}"),
    ("weights, GiB", lambda row: f"{row['weights_bytes'] / GIB:.2f}"),
    ("batch", lambda row: str(row["batch"])),
    ("prefill, ms", lambda row: _digits(1000 * row["prefill_seconds"])),
    ("step, ms", lambda row: _digits(1000 * row["step_seconds"])),
    ("tokens/s", lambda row: _digits(row["tokens_per_second"])),
    ("peak, GiB", lambda row: f"{row['peak_bytes'] / GIB:.2f}"),
    ("×", lambda row: f"{row['speedup']:.2f}" if "speedup" in row else "—"),
)
"""× is tokens per second against those of the first model."""
PANELS = (
    ("decoding, tokens/s", "tokens_per_second", 1.0),
    ("a step, ms", "step_seconds", 1000.0),
    ("prefill, ms", "prefill_seconds", 1000.0),
    ("peak memory, GiB", "peak_bytes", 1 / GIB),
)
# A hue for each family, a shade for each of its kernels: which lines belong together is seen at once.
FAMILIES = {
    "16bit": "Greys",
    "nf4": "Oranges",
    "nf4-double": "Oranges",
    "int8": "Reds",
    "gptq": "Blues",
    "awq": "Greens",
}
MARKERS = "osDv^P<*>X"


def titles(rows: Sequence[Row]) -> Names:
    """What each model is called: its form and kernel, with its directory where there are several for a form."""
    folders: dict[str, set[str]] = {}
    for row in rows:
        folders.setdefault(row["form"], set()).add(row["directory"])
    return {
        _model(row): row["label"] if len(folders[row["form"]]) == 1 else f"{row['model']}: {row['label']}"
        for row in rows
    }


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """The rows with their tokens per second against those of the first model at the same batch and length."""
    first = {
        (row["batch"], row["prompt"]): row["tokens_per_second"]
        for row in reversed(rows)
        if "error" not in row and _model(row) == _model(rows[0])
    }
    found = []
    for row in rows:
        base = first.get((row["batch"], row["prompt"]))
        found.append(row | {"speedup": row["tokens_per_second"] / base} if base and "error" not in row else row)
    return found


def bench_table(rows: Sequence[Row], prompt: int) -> Table:
    """Of one prompt length, units below headings so that 80 columns hold it; what failed in red."""
    title = f"{prompt} tokens of prompt, {rows[0]['new']} new"
    table = Table(box=None, title=title, title_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("")
    for heading, _ in COLUMNS:
        table.add_column(heading.replace(", ", "\n"), justify="right")
    table.add_column("")
    names, last = titles(rows), None
    for row in (row for row in with_speedups(rows) if row["prompt"] == prompt):
        name = names[_model(row)]
        cells = _cells(row)
        cells = ["", "", *cells[2:]] if name == last else cells
        table.add_row("" if name == last else name, *cells, style="red" if "error" in row else "")
        last = name
    return table


def _cells(row: Row) -> list[str]:
    """Of `COLUMNS`, and how steps were run, which is said of GPUs: a CPU has no graphs."""
    if "error" in row:
        return ["", "", str(row["batch"]), *[""] * (len(COLUMNS) - 3), "failed"]
    return [*(text(row) for _, text in COLUMNS), "" if row["graph"] or row["device"] == "cpu" else "eager"]


def notes(rows: Sequence[Row]) -> list[str]:
    """Why some models were run step by step, and why some rows are missing; each reason once."""
    names = titles(rows)
    found: dict[str, None] = {}
    for row in rows:
        name = names[_model(row)]
        if "error" in row:
            found.setdefault(f"{name}, failed: {row['error']}", None)
        elif row["eager_because"]:
            found.setdefault(f"{name}, eager: {row['eager_because']}", None)
    return list(found)


def markdown(rows: Sequence[Row], machine: str) -> str:
    """A table for each prompt length, and notes."""
    lines = [f"{rows[0]['new']} new tokens for every row of the batch, {rows[0]['dtype']}; {machine}.", ""]
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        lines += [f"**Prompt of {prompt} tokens**", ""]
        lines.append("| model | " + " | ".join(heading for heading, _ in COLUMNS) + " | |")
        lines.append("| --- |" + " ---: |" * len(COLUMNS) + " --- |")
        names = titles(rows)
        for row in (row for row in with_speedups(rows) if row["prompt"] == prompt):
            lines.append(f"| {names[_model(row)]} | " + " | ".join(_cells(row)) + " |")
        lines.append("")
    lines += [f"- {note.replace('|', '/')}" for note in notes(rows)]
    return "\n".join(lines).rstrip() + "\n"


def plot(rows: Sequence[Row], path: Path, machine: str) -> None:
    """Panels of throughput, latencies and memory for each prompt length: lines over batch sizes, bars where there is
    one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    names, styles = titles(rows), _styles(rows)
    each = 3.5 if len(batches) > 1 else 1.2 + 0.3 * len(names)
    size = (4.2 * len(PANELS) + (0 if len(batches) > 1 else 2), each * len(prompts))
    figure, panels = pyplot.subplots(len(prompts), len(PANELS), figsize=size, squeeze=False)
    for prompt, line in zip(prompts, panels, strict=True):
        measured = [row for row in rows if "error" not in row and row["prompt"] == prompt]
        for (title, key, factor), panel in zip(PANELS, line, strict=True):
            values = {(_model(row), batches.index(row["batch"])): factor * row[key] for row in measured}
            if len(batches) > 1:
                _lines(panel, values, names, styles, batches)
                panel.set_title(f"{title} · prompt {prompt}", fontsize=10)
                if key == "peak_bytes":  # what a card has to have; elsewhere it is ratios that count
                    panel.set_ylim(bottom=0)
                else:
                    _logarithmic(panel)
            else:
                _bars(panel, values, names if panel is line[0] else dict.fromkeys(names, ""), styles)
                panel.set_title(f"{title} · prompt {prompt}, batch {batches[0]}", fontsize=10)
    figure.suptitle(f"{rows[0]['new']} new tokens, {rows[0]['dtype']}, {machine}", fontsize=11)
    _finish(figure, panels if len(batches) > 1 else None)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _lines(panel: Any, values: Values, names: Names, styles: Styles, batches: Sequence[int]) -> None:
    for model, name in names.items():
        points = sorted((place, value) for (own, place), value in values.items() if own == model)
        if points:
            panel.plot(*zip(*points, strict=True), label=name, markersize=5, linewidth=1.6, **styles[model])
    panel.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    panel.set_xlim(-0.3, len(batches) - 0.7)
    panel.grid(alpha=0.25, which="both")
    panel.set_xlabel("batch")


def _bars(panel: Any, values: Values, names: Names, styles: Styles) -> None:
    places = {model: -place for place, model in enumerate(names)}
    for (model, _), value in values.items():
        panel.barh(places[model], value, color=styles[model]["color"], height=0.7)
        panel.text(value, places[model], f" {_digits(value)}", va="center", fontsize=8)
    panel.set_yticks(list(places.values()), list(names.values()))
    panel.set_ylim(min(places.values()) - 0.6, 0.6)
    panel.margins(x=0.2)
    panel.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, panels: Any) -> None:
    """Lay out, with a legend below where there are lines."""
    if panels is None:
        figure.tight_layout()
        return
    handles, labels = _legend(panels)
    columns = min(len(labels), 5) or 1
    below = 0.25 * -(-len(labels) // columns) + 0.1
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=9)


def _legend(panels: Any) -> tuple[list[Any], list[str]]:
    """Every line of any panel, once."""
    found: dict[str, Any] = {}
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _logarithmic(panel: Any) -> None:
    """With numbers as people write them, also where the axis spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    subs: tuple[float, ...] = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    if high / low < 4:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    panel.yaxis.set_major_locator(LogLocator(subs=subs))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _styles(rows: Sequence[Row]) -> Styles:
    from matplotlib import colormaps

    models = list(dict.fromkeys(_model(row) for row in rows))
    families: dict[str, list[Any]] = {}
    for model in models:
        families.setdefault(FAMILIES[model[1]], []).append(model)
    found = {}
    for family, members in families.items():
        for place, model in enumerate(members):
            shade = 0.85 if len(members) == 1 else 0.95 - 0.55 * place / (len(members) - 1)
            marker = MARKERS[models.index(model) % len(MARKERS)]
            # AWQ runs on GPTQ's kernels, and its lines over GPTQ's.
            line = "--" if model[1] == "awq" else "-"
            found[model] = {"color": colormaps[family](shade), "marker": marker, "linestyle": line}
    return found


def _model(row: Row) -> Key:
    return row["directory"], row["form"], row["kernel"]


def _digits(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
