"""How `qlora check` prints what it found: the base, the data, a table of stages, a table of engines, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlora.errors import Problem
from qlora.reporting.console import duration

if TYPE_CHECKING:
    from qlora.check import BaseFacts, CheckReport
    from qlora.data.lint import Segment, SplitReport
    from qlora.evaluation.contract import EngineVerdict
    from qlora.quantization.preview import CalibrationPart

EXAMPLE_CHARACTERS = 400  # of a row that is shown: of every run of what is learned or not, from both of its ends
BARS = "▁▂▃▄▅▆▇█"


def show(report: CheckReport, console: Console) -> None:
    """Print a report. Problems are left to the error that ends the command."""
    console.print(f"[bold]{escape(report.name)}[/bold]")
    if report.base:
        console.print(_base(report.base))
    for split in report.splits:
        console.print(_split(split))
    for number, (row, segments) in enumerate(report.examples):
        learned = ", [green]what is learned[/green] between ⟦ ⟧" if number == 0 else ""
        console.print(f"\n[bold]Training row {row:,}[/bold]{learned}:")
        console.print(_example(segments))
    if report.calibration:
        console.print(_calibration(report.calibration))
    if report.stages:
        steps = f"{report.steps:,} steps of {report.rows_per_step} rows; " if report.steps else ""
        console.print(f"\n{steps}{escape(report.training or '')}.")
        if report.seen_tokens:
            console.print(escape(_cost(report)))
        console.print("Estimates, not measurements: ", end="")
        console.print(escape(report.machine.rate_note))
        console.print(_stages(report))
    if report.engines:
        console.print("\nWhich engines will load the GPTQ checkpoint:")
        console.print(_engines(report.engines))
    for warning in report.warnings:
        console.print(_warning(warning))
    if not report.problems and not report.shortfalls:
        console.print("\n[green]Nothing stands in the way.[/green]")


def gib(size: int | None) -> str:
    """Bytes as `1.2 GiB`, a dash for what is not needed or not known."""
    return f"{size / 2**30:.2f} GiB" if size else "–"


def _base(base: BaseFacts) -> str:
    size = f"{base.weight_bytes / 2**30:.2f} GiB on disk" if base.weight_bytes else "weights not downloaded yet"
    revision = f" at {base.revision[:12]}" if base.revision else ""
    adapter = f"; adapter {base.adapter_parameters / 1e6:,.2f} M" if base.adapter_parameters is not None else ""
    held = f"{base.quantized_parameters / 1e6:,.1f} M "
    held += "as the checkpoint packs them" if base.quantization == "checkpoint" else f"in {base.quantization}"
    held = "all in 16 bits" if base.quantization == "none" else held
    return escape(
        f"base   {base.id}{revision}: {base.architecture}, {base.parameters / 1e6:,.1f} M parameters "
        f"({held}), {size}{adapter}"
    )


def _split(split: SplitReport) -> str:
    lengths = ", ".join(f"{name} {split.lengths[name]:,}" for name in split.lengths if name not in ("p0", "p100"))
    if split.lengths:
        lengths += f"; {split.lengths['p0']:,} {_bars(split.histogram)} {split.lengths['p100']:,}"
    return escape(
        f"{split.name:6} {split.rows:,} rows, {split.tokens:,} tokens, {split.supervised_share:.1%} learned from; "
        f"{split.truncated} cut, {split.dropped} dropped\n"
        f"       tokens per row: {lengths}"
    )


def _bars(counts: Sequence[int]) -> str:
    """A bar per count; nothing where there is nothing."""
    return "".join(BARS[(len(BARS) - 1) * count // max(counts)] if count else " " for count in counts)


def _example(segments: Sequence[Segment]) -> Text:
    text = Text()
    for segment in segments:
        shown = segment.text
        if len(shown) > EXAMPLE_CHARACTERS:
            shown = f"{shown[: EXAMPLE_CHARACTERS // 2]} … {shown[-EXAMPLE_CHARACTERS // 2 :]}"
        text.append(f"⟦{shown}⟧" if segment.supervised else shown, style="green" if segment.supervised else "dim")
    return text


def _calibration(parts: Sequence[CalibrationPart]) -> str:
    total = sum(part.tokens for part in parts)
    kinds = (f"{part.rows:,} rows of {part.source}, {part.tokens / total:.1%} of the tokens" for part in parts)
    return escape(f"\nCalibration: {total:,} tokens; {'; '.join(kinds)}")


def _cost(report: CheckReport) -> str:
    """What training takes, in tokens and time."""
    assert report.seen_tokens is not None
    learned = round(report.seen_tokens * report.splits[0].supervised_share)
    cost = f"Training sees {report.seen_tokens:,} tokens in all and learns from about {learned:,} of them"
    seconds = next(stage.seconds for stage in report.stages if stage.stage == "train")
    return f"{cost}, in about {duration(max(1.0, seconds))}." if seconds is not None else f"{cost}."


def _stages(report: CheckReport) -> Table:
    table = Table(box=None, pad_edge=False)
    free = report.free
    on_gpu = free.device is not None
    for title in ("stage", *(["GPU memory"] if on_gpu else []), "host memory", "disk", "time"):
        table.add_column(title, justify="left" if title == "stage" else "right")
    for stage in report.stages:
        seconds = "–" if stage.seconds is None else f"~{duration(max(1.0, stage.seconds))}"
        memory = [gib(stage.device)] if on_gpu else []
        table.add_row(stage.stage, *memory, gib(stage.host), gib(stage.disk), seconds)
    table.add_row("free now", *([gib(free.device)] if on_gpu else []), gib(free.host), gib(free.disk), "", style="dim")
    return table


def _engines(verdicts: Sequence[EngineVerdict]) -> Table:
    """A row per engine: on how many GPUs it loads the checkpoint, and the first reason why not on others."""
    table = Table(box=None, pad_edge=False)
    for title in ("engine", "version", "GPUs", "why not elsewhere, or what to mind"):
        table.add_column(title)
    for engine in dict.fromkeys(verdict.engine for verdict in verdicts):
        mine = [verdict for verdict in verdicts if verdict.engine == engine]
        accepted = ", ".join(str(verdict.tensor_parallel) for verdict in mine if verdict.accepts)
        reason = next((verdict.reason for verdict in mine if not verdict.accepts), mine[0].reason)
        table.add_row(engine, mine[0].version, accepted or "none", escape(reason), style=None if accepted else "dim")
    return table


def _warning(warning: Problem) -> Text:
    return Text.assemble(("\nnote ", "yellow"), str(warning))
