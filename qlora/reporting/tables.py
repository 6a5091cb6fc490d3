"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Group
from rich.table import Table

NOISE = "≈"
STANDARD_ERRORS = 1.96  # of a mean to either side, that 95 % lie within


@dataclass(frozen=True)
class _Column:
    """A figure of every rung: `key` is where it stands in a rung, and in its intervals."""

    title: str
    key: str
    form: str

    def value(self, rung: Mapping[str, Any]) -> float | None:
        found: Any = rung
        for part in self.key.split(".", 1):
            found = (found or {}).get(part)
        return found["value"] if isinstance(found, dict) else found

    def interval(self, rung: Mapping[str, Any]) -> Sequence[float] | None:
        return (rung.get("intervals") or {}).get(self.key)

    def cell(self, rung: Mapping[str, Any]) -> str:
        value = self.value(rung)
        if value is None:
            return "—"
        noise = (rung.get("noise") or {}).get(self.key.replace("general.perplexity", "general.loss"))
        return (NOISE if noise else "") + self.form.format(value)

    def uncertainty(self, rung: Mapping[str, Any]) -> str:
        """Half of the interval, or all of it where it lies on one side; nothing where no digit would show."""
        value, found = self.value(rung), self.interval(rung)
        if value is None or found is None:
            return ""
        low, high = found
        sign = "+" if low >= value else "-" if high <= value else "±"
        text = self.form.format((high - low) / (2 if sign == "±" else 1))
        return sign + text if any(digit in "123456789" for digit in text) else ""

    def width(self, rungs: Sequence[Mapping[str, Any]]) -> int:
        texts = [text for rung in rungs for text in (self.cell(rung), self.uncertainty(rung))]
        return max(map(len, [*self.title.split("\n"), *texts]))


@dataclass(frozen=True)
class _TaskColumn(_Column):
    """The first figure of a task of lm-eval: `key` is its name."""

    metric: str = ""

    def _figure(self, rung: Mapping[str, Any]) -> dict[str, Any]:
        return ((rung.get("tasks") or {}).get(self.key) or {}).get(self.metric) or {}

    def value(self, rung: Mapping[str, Any]) -> float | None:
        return self._figure(rung).get("value")

    def interval(self, rung: Mapping[str, Any]) -> Sequence[float] | None:
        figure = self._figure(rung)
        if figure.get("value") is None or figure.get("stderr") is None:
            return None
        half = STANDARD_ERRORS * figure["stderr"]
        return figure["value"] - half, figure["value"] + half


def ladder_table(rungs: Sequence[dict[str, Any]], rows: int, tokens: int, width: int | None = None) -> Group:
    """The ladder, one line per rung, and below it how far its figures may be off; columns nobody measured are left out.

    A figure that differs from the trained model's by no more than that is marked. Columns that are wider than `width`
    together go on below.
    """
    title = f"The ladder: {rows} held-out rows, {tokens:,} answer tokens; KL and top-1 to the trained model"
    labels = max(len(rung["label"]) for rung in rungs)
    blocks: list[list[_Column]] = [[]]
    for column in _columns(rungs):
        taken = labels + 2 + sum(each.width(rungs) + 2 for each in [*blocks[-1], column])
        if width is not None and blocks[-1] and taken > width:
            blocks.append([])
        blocks[-1].append(column)
    return Group(title, *(_block(columns, rungs) for columns in blocks), *_notes(rungs))


def _block(columns: Sequence[_Column], rungs: Sequence[dict[str, Any]]) -> Table:
    labels = max(len(text) for text in ["model", *(rung["label"] for rung in rungs)])
    widths = [labels, *(column.width(rungs) for column in columns)]
    table = Table(box=None, width=sum(widths) + 2 * len(widths))  # however narrow the terminal is
    for title, width in zip(["model", *(column.title for column in columns)], widths, strict=True):
        side: Literal["left", "right"] = "right" if table.columns else "left"
        table.add_column(title, justify=side, no_wrap=True, vertical="bottom", width=width)
    for rung in rungs:
        style = "bold" if rung["name"] in {"trained", "gptq"} else ""
        table.add_row(rung["label"], *(column.cell(rung) for column in columns), style=style)
        uncertain = [column.uncertainty(rung) for column in columns]
        if any(uncertain):
            table.add_row("", *uncertain, style="dim")
    return table


def _columns(rungs: Sequence[dict[str, Any]]) -> list[_Column]:
    metrics = dict.fromkeys(name for rung in rungs for name in rung.get("metrics") or {})
    tasks = {task: figures for rung in rungs for task, figures in (rung.get("tasks") or {}).items() if figures}
    columns = [
        _Column("loss", "loss", "{:.4f}"),
        _Column("ppl", "perplexity", "{:.3f}"),
        _Column("KL", "kl", "{:.4f}"),
        _Column("top-1", "top1", "{:.2%}"),
        _Column("gain kept", "gain_retained", "{:.1%}"),
        _Column("exact", "exact_match", "{:.0%}"),
        *(_Column(name, f"metrics.{name}", "{:.0%}") for name in metrics),
        _Column("preferred", "preferred", "{:.1%}"),
        _Column("margin", "margin", "{:.2f}"),
        _Column("general\nppl", "general.perplexity", "{:.3f}"),
        *(_TaskColumn(f"{task}\n{metric}", task, "{:.3f}", metric) for task, (metric, *_) in tasks.items()),
    ]
    if any(rung.get("preferred") is not None for rung in rungs):  # training is for something else then
        columns = [column for column in columns if column.key not in ("perplexity", "gain_retained")]
    return [column for column in columns if any(column.value(rung) is not None for rung in rungs)]


def _notes(rungs: Sequence[dict[str, Any]]) -> list[str]:
    """What the marks mean."""
    notes = []
    if any(rung.get("intervals") for rung in rungs):
        notes.append("± how far other held-out rows could have moved a figure (95 %, bootstrap)")
    if any(any((rung.get("noise") or {}).values()) for rung in rungs):
        notes.append(f"{NOISE} not told apart from the trained model's: the difference is inside the noise")
    return notes
