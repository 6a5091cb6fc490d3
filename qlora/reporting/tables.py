"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    def half_width(self, rung: Mapping[str, Any]) -> float | None:
        """Of its interval."""
        low, high = (rung.get("intervals") or {}).get(self.key) or (0, 0)
        return (high - low) / 2 or None

    def cell(self, rung: Mapping[str, Any]) -> str:
        value = self.value(rung)
        if value is None:
            return "—"
        noise = (rung.get("noise") or {}).get(self.key.replace("general.perplexity", "general.loss"))
        return (NOISE if noise else "") + self.form.format(value)

    def uncertainty(self, rung: Mapping[str, Any]) -> str:
        half = self.half_width(rung)
        return "" if half is None else "±" + self.form.format(half)


@dataclass(frozen=True)
class _TaskColumn(_Column):
    """The first figure of a task of lm-eval: `key` is its name."""

    metric: str = ""

    def _figure(self, rung: Mapping[str, Any]) -> dict[str, Any]:
        return ((rung.get("tasks") or {}).get(self.key) or {}).get(self.metric) or {}

    def value(self, rung: Mapping[str, Any]) -> float | None:
        return self._figure(rung).get("value")

    def half_width(self, rung: Mapping[str, Any]) -> float | None:
        error = self._figure(rung).get("stderr")
        return STANDARD_ERRORS * error if error else None


def ladder_table(rungs: Sequence[dict[str, Any]], rows: int, tokens: int) -> Table:
    """The ladder, one line per rung, and below it how far its figures may be off; columns nobody measured are left out.

    A figure that differs from the trained model's by no more than that is marked.
    """
    title = f"The ladder: {rows} held-out rows, {tokens:,} answer tokens; KL and top-1 to the trained model"
    table = Table(title=title, title_justify="left", title_style="", box=None, caption_justify="left", caption_style="")
    table.add_column("model", no_wrap=True)
    columns = _columns(rungs)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True, vertical="bottom")
    for rung in rungs:
        style = "bold" if rung["name"] in {"trained", "gptq"} else ""
        table.add_row(rung["label"], *(column.cell(rung) for column in columns), style=style)
        uncertain = [column.uncertainty(rung) for column in columns]
        if any(uncertain):
            table.add_row("", *uncertain, style="dim")
    table.caption = _caption(rungs)
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


def _caption(rungs: Sequence[dict[str, Any]]) -> str | None:
    """What the marks mean; None where there are none."""
    if not any(rung.get("intervals") for rung in rungs):
        return None
    text = "± is how far a figure may be off because other rows could have been held out (95 %)"
    if any(any((rung.get("noise") or {}).values()) for rung in rungs):
        text += f"\n{NOISE} differs from the trained model's by no more than other rows would make it"
    return text
