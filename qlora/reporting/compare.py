"""`qlora compare RUN RUN…`: what was done otherwise, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora.errors import UserError
from qlora.facts import RunFacts
from qlora.reporting import words
from qlora.reporting.console import duration, plain
from qlora.reporting.figures import STAGES, measured_figures, value

Column = Mapping[str, Any]
PLACES = {"name", "output_dir"}  # keys of a recipe that say where a run lies, not what it is


def show(runs: Sequence[RunFacts], console: Console) -> None:
    """Print what differs, then the ladders, time and memory side by side. Raises UserError for a single run."""
    if len(runs) < 2:
        raise UserError("there is nothing to compare with", str(runs[0].dirs.root), "name two runs or more")
    names = _names(runs)
    recipes = [_flat(run.recipe.model_dump(mode="json")) for run in runs]
    console.print(_differences("Recipe", names, recipes, "The recipes are the same."))
    console.print(_differences("What was read", names, [_read(run) for run in runs], "Base and data are the same."))
    console.print(_differences("Versions", names, [_versions(run) for run in runs], "Versions are the same."))
    console.print(_ladders(names, runs))
    console.print(_costs(names, runs))
    for name, run in zip(names, runs, strict=True):
        console.print(f"[bold]{plain(name)}[/bold]: {plain(words.headline(run).title)}")


def _names(runs: Sequence[RunFacts]) -> list[str]:
    """What runs are called; by their paths where two are called the same."""
    names = [run.dirs.root.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.dirs.root) for run in runs]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Keys with dots; lists of sections by number."""
    if isinstance(tree, dict) and tree:
        parts = tree.items()
    elif isinstance(tree, list) and any(isinstance(each, dict) for each in tree):
        parts = {str(number): each for number, each in enumerate(tree)}.items()
    else:
        return {prefix: tree}
    return {
        key: leaf for name, each in parts for key, leaf in _flat(each, f"{prefix}.{name}" if prefix else name).items()
    }


def differing(columns: Sequence[Column]) -> dict[str, list[Any]]:
    """Keys whose values are not all the same, with those; None where a column has no such key."""
    keys = dict.fromkeys(key for column in columns for key in column)
    found = {key: [column.get(key) for column in columns] for key in keys}
    return {key: values for key, values in found.items() if any(each != values[0] for each in values)}


def _differences(title: str, names: Sequence[str], columns: Sequence[Column], same: str) -> Table | str:
    found = {key: values for key, values in differing(columns).items() if key not in PLACES}
    if not found:
        return f"{same}\n"
    table = _table(title, ["key", *names])
    for key, values in found.items():
        table.add_row(plain(key), *(plain(_shown(each)) for each in values))
    return table


def _shown(found: Any) -> str:
    return "–" if found is None else str(found).lower() if isinstance(found, bool) else str(found)


def _read(run: RunFacts) -> dict[str, str]:
    """Digests of the base and of what stages read, from the fingerprints of the stages."""
    found = {}
    for entry in run.stages.values():
        for key, content in (entry.get("inputs") or {}).items():
            if (
                key == "base"
                or key.startswith(("data.train", "data.eval", "quantize.calibration"))
                and _is_digest(content)
            ):
                found[key] = ", ".join(each[:12] for each in _digests(content))
    return found


def _digests(content: Any) -> list[str]:
    return [each for each in (content if isinstance(content, list) else [content]) if isinstance(each, str)]


def _is_digest(content: Any) -> bool:
    digests = _digests(content)
    return bool(digests) and all(len(each) == 64 for each in digests)


def _versions(run: RunFacts) -> dict[str, str]:
    """Of each stage, told once where a run's stages agree."""
    found: dict[str, dict[str, str]] = {}
    for stage, entry in run.stages.items():
        for package, version in (entry.get("versions") or {}).items():
            found.setdefault(package, {})[stage] = version
    return {
        package: ", ".join(dict.fromkeys(by_stage.values())) if len(set(by_stage.values())) == 1 else str(by_stage)
        for package, by_stage in found.items()
    }


def _ladders(names: Sequence[str], runs: Sequence[RunFacts]) -> Table | str:
    """A line for every rung and figure, a column for every run."""
    rungs = [{rung["name"]: rung for rung in run.ladder["rungs"]} if run.ladder else {} for run in runs]
    order = list(dict.fromkeys(name for each in rungs for name in each))
    if not order:
        return "None of them was measured.\n"
    rows = {run.ladder["rows"] for run in runs if run.ladder}
    table = _table("The ladder" + ("" if len(rows) == 1 else ", on different rows"), ["model", "figure", *names])
    for rung in order:
        shown = [each[rung] for each in rungs if rung in each]
        for number, figure in enumerate(measured_figures(shown)):
            cells = [figure.show(value(each[rung], figure.key)) if rung in each else "–" for each in rungs]
            table.add_row(
                rung if number == 0 else "",
                plain(figure.title),
                *cells,
                end_section=figure == measured_figures(shown)[-1],
            )
    return table


def _costs(names: Sequence[str], runs: Sequence[RunFacts]) -> Table:
    table = _table("Time and peak memory", ["stage", *names])
    for stage in STAGES:
        if any(stage in run.stages for run in runs):
            table.add_row(stage, *(_cost(run, stage) for run in runs))
    return table


def _cost(run: RunFacts, stage: str) -> str:
    if stage not in run.stages:
        return "–"
    where, peak, _ = words.memory(run, stage)
    memory = f" · {peak:.1f} GiB {where}" if peak else ""
    return duration(run.metrics(stage).get("seconds") or 0) + memory


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.padding = (0, 2, 0, 0)
    for index, head in enumerate(heads):
        right = index and head != "figure"
        table.add_column(plain(head), justify="right" if right else "left", no_wrap=index == 0, overflow="fold")
    return table
