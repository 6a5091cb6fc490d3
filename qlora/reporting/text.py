"""`qlora report RUN --text`: what the page says, in short, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora.facts import RunFacts
from qlora.reporting import words
from qlora.reporting.console import duration, plain, printable
from qlora.reporting.figures import LADDER, STAGES, SURVIVAL, interval, measured_figures, value

STYLES = {"ship": "green", "refused": "red", "unmeasured": "yellow"}
MARKS = {True: "[green]passed[/green]", False: "[red]failed[/red]", None: "did not apply"}
SHORT = {
    figure.key: title for figure, title in zip(LADDER[:6], ("loss", "ppl", "KL", "token", "gain", "exact"), strict=True)
}
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # characters of a loss curve
ANSWERS, ANSWER = 2, 160  # prompts shown, and characters of a text


def show(facts: RunFacts, console: Console) -> None:
    """Print every part that was measured, and a line on each that was not."""
    console = Console(file=console.file, quiet=console.quiet, highlight=False)  # lines are broken between words
    _verdict(facts, console)
    for title, part in (
        ("The ladder", _ladder),
        ("Training", _training),
        ("What compressing cost, layer by layer", _survival),
        ("Time and memory", _costs),
        ("Answers", _answers),
        ("Serving", _serving),
    ):
        console.print(f"\n[bold]{title}[/bold]")
        part(facts, console)
    console.print(f"\nThe same to click through: qlora report {plain(str(facts.dirs.root))}")


def _verdict(facts: RunFacts, console: Console) -> None:
    said = words.headline(facts)
    console.print(f"[dim]{plain(facts.recipe.name)}[/dim]")
    console.print(Text(said.title, style=f"bold {STYLES[said.tone]}"))
    console.print(plain(said.text))
    if said.checks:
        table = _table("", "found", "")
        for check in said.checks:
            table.add_row(plain(check.asks), check.found, MARKS[check.passed])
        console.print()
        console.print(table)
    for step in said.todo:
        console.print(f"→ {plain(step)}")


def _missing(part: str, console: Console) -> None:
    what, how = words.MISSING[part]
    console.print(f"  [dim]not here: {what}. To have it: {plain(how)}[/dim]")


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, head in enumerate(heads):
        table.add_column(plain(head), justify="right" if index and head else "left", header_style="dim")
    return table


def _ladder(facts: RunFacts, console: Console) -> None:
    if facts.ladder is None:
        return _missing("ladder", console)
    rungs = facts.ladder["rungs"]
    figures = measured_figures(rungs)
    table = _table("model", *(SHORT.get(figure.key, figure.title) for figure in figures))
    for rung in rungs:
        bold = "bold" if rung["name"] in ("trained", "gptq") else ""
        table.add_row(plain(rung["label"]), *(figure.show(value(rung, figure.key)) for figure in figures), style=bold)
    console.print(table)
    shipped: Mapping[str, Any] = next((rung for rung in rungs if rung["name"] == "gptq"), {})
    shown = [
        f"{figure.title} {figure.show(found[0])} to {figure.show(found[1])}"
        for figure in figures
        if (found := interval(shipped, figure.key))
    ]
    if shown:
        sure = f"{facts.ladder.get('confidence', 0.95):.0%}"
        console.print(f"  [dim]{plain(f'With {sure} certainty, of the last line: ' + '; '.join(shown))}[/dim]")
    console.print(f"  [dim]{facts.ladder['rows']:,} held-out rows, {facts.ladder['tokens']:,} answer tokens[/dim]")
    if facts.merges is not None:
        console.print(f"  merge to ship: {plain(facts.merges['ship'])} ({plain(facts.merges['why'])})")
    for figure in figures:
        console.print(
            Padding(f"[dim]{SHORT.get(figure.key, plain(figure.title))}: {plain(figure.meaning)}[/dim]", (0, 0, 0, 2))
        )


def _training(facts: RunFacts, console: Console) -> None:
    curve = [entry["loss"] for entry in facts.metrics("train").get("curve") or [] if entry.get("loss") is not None]
    if not curve:
        return _missing("curve", console)
    low, high = min(curve), max(curve)
    picked = [
        curve[round(index * (len(curve) - 1) / max(1, min(WIDTH, len(curve)) - 1))]
        for index in range(min(WIDTH, len(curve)))
    ]
    bars = "".join(BARS[round((len(BARS) - 1) * (loss - low) / ((high - low) or 1))] for loss in picked)
    steps = facts.metrics("train")["steps"]
    console.print(f"  loss {curve[0]:.3f} {bars} {curve[-1]:.3f} in {steps:,} steps")


def _survival(facts: RunFacts, console: Console) -> None:
    survival = facts.survival
    if survival is None or not survival["modules"]:
        return _missing("survival", console)
    overall = survival.get("overall") or {}
    shown = [
        f"{figure.title.lower()} {figure.show(overall[figure.key])}"
        for figure in SURVIVAL
        if overall.get(figure.key) is not None
    ]
    console.print(f"  {len(survival['modules'])} modules: {'; '.join(shown)}")
    for each in survival.get("damaged") or []:
        console.print(f"  [red]damaged[/red] {plain(each['name'])}: {plain(each['why'])}")
    by_name = {module["name"]: module for module in survival["modules"]}
    worst = [by_name[name] for name in survival.get("worst") or [] if name in by_name]
    if worst:
        figures = [figure for figure in SURVIVAL if figure.key in ("energy", "output_error")]
        table = _table("worst", *(figure.title.lower() for figure in figures))
        for module in worst[:5]:
            table.add_row(plain(module["name"]), *(figure.show(module.get(figure.key)) for figure in figures))
        console.print(Padding(table, (0, 0, 0, 2)))


def _costs(facts: RunFacts, console: Console) -> None:
    table = _table("stage", "time", "estimate", "peak memory", "estimate")
    for name in (name for name in STAGES if name in facts.stages):
        seconds, thought = facts.metrics(name).get("seconds") or 0, words.expected(facts, name).get("seconds")
        where, peak, peak_thought = words.memory(facts, name)
        table.add_row(
            name,
            duration(seconds),
            duration(max(1.0, thought)) if thought else "–",
            f"{peak:.1f} GiB {where}" if peak else "–",
            f"{peak_thought:.1f} GiB" if peak_thought else "–",
        )
    console.print(Padding(table, (0, 0, 0, 2)))


def _answers(facts: RunFacts, console: Console) -> None:
    rows = (facts.generations or {}).get("rows")
    if not rows:
        return _missing("generations", console)
    for row in rows[:ANSWERS]:
        table = _table("", "")
        table.add_row("[dim]prompt[/dim]", _short(row["prompt"]))
        if row.get("expected") is not None:
            table.add_row("[dim]expected[/dim]", _short(row["expected"]))
        for name, answer in row["answers"].items():
            table.add_row(f"[dim]{plain(name)}[/dim]", _short(answer or ""))
        console.print(Padding(table, (0, 0, 1, 2)))
    if len(rows) > ANSWERS:
        console.print(
            f"  [dim]{len(rows) - ANSWERS:,} more in {plain(str(facts.dirs.evaluation / 'generations.json'))}[/dim]"
        )


def _short(words_: str) -> Text:
    shown = printable(" ".join(words_.split()))
    return Text(shown if len(shown) <= ANSWER else f"{shown[:ANSWER]} …")


def _serving(facts: RunFacts, console: Console) -> None:
    if facts.contract is None:
        return _missing("contract", console)
    table = _table("engine", "GPUs", "")
    engines = facts.contract.get("engines") or []
    for name in dict.fromkeys(each["engine"] for each in engines):
        mine = [each for each in engines if each["engine"] == name]
        accepted = ", ".join(str(each["tensor_parallel"]) for each in mine if each["accepts"])
        reason = next((each["reason"] for each in mine if not each["accepts"]), mine[0].get("reason") or "")
        table.add_row(f"{plain(name)} {plain(mine[0]['version'])}", accepted or "none", plain(reason))
    console.print(Padding(table, (0, 0, 0, 2)))
    for mismatch in facts.contract.get("mismatches") or []:
        console.print(f"  [red]differs[/red] {plain(mismatch)}")
