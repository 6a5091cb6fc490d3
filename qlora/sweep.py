"""A grid of runs: every combination of the values that overrides list, each in a run directory of its own.

submitit runs them, in processes of this machine or as jobs of SLURM. Runs that would train the same adapter go one
after the other in one job, so that the later ones take over what the first has made (`Pipeline`'s `reuse`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from qlora.artifacts import digest, write_json, write_text
from qlora.errors import Problem, QloraError, UserError, missing_extra
from qlora.facts import RunFacts
from qlora.recipe import Recipe
from qlora.recipe_file import load_recipe, parse_value
from qlora.reporting.console import console
from qlora.reporting.sweeps import plot, sweep_table

POLL_SECONDS = 1.0
NO_LIMIT_MINUTES = 60 * 24 * 30
# Decides what is trained.
TRAINING_SECTIONS = ("model", "data", "lora", "train", "seed")
OUTCOMES = {0: "done", 3: "gate failed"}


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    name: str
    values: dict[str, str]
    """What differs between runs, by key."""
    overrides: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Grid:
    """All runs, below one folder."""

    directory: Path
    points: list[Point]

    @classmethod
    def of(cls, recipe: str, overrides: Sequence[str]) -> Grid:
        """Raises UserError where no key has several values, and for every value that the recipe does not take."""
        fixed = [override for override in overrides if len(_values(override)) < 2]
        axes = {_key(override): _values(override) for override in overrides if len(_values(override)) > 1}
        if not axes:
            raise UserError("no key has several values", "command line", "list them, as in lora.r=8,16,32")
        base = load_recipe(recipe, fixed)
        directory = Path(base.output_dir) / f"{base.name}-sweep"
        points, problems = [], []
        for combination in product(*axes.values()):
            values = dict(zip(axes, combination, strict=True))
            name = _name(values)
            place = (f"output_dir={json.dumps(str(directory))}", f"name={name}")
            some = (*fixed, *(f"{key}={value}" for key, value in values.items()), *place)
            try:
                points.append(Point(name, values, some, load_recipe(recipe, some)))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(dict.fromkeys(problems))
        if len({point.name for point in points}) < len(points):
            raise UserError("two runs would have one name", "command line", "a value is given twice")
        return cls(directory, points)

    def groups(self) -> list[list[Point]]:
        """Runs of one adapter together, in the order of the grid."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            dumped = point.recipe.model_dump(mode="json")
            found.setdefault(digest({key: dumped[key] for key in TRAINING_SECTIONS}), []).append(point)
        return list(found.values())


def sweep(
    recipe: str, overrides: Sequence[str], *, cluster: str, jobs: int | None, parameters: Mapping[str, str]
) -> None:
    """Run the grid, then show and write what came out: `sweep.json` and `sweep.png` in its folder.

    jobs: at a time, on this machine one for each visible GPU if not given. parameters: submitit's, for SLURM. Raises
    QloraError when runs failed; the others are finished first.
    """
    try:
        import submitit
    except ImportError:
        raise missing_extra("submitit", "sweep", "qlora sweep") from None
    grid = Grid.of(recipe, overrides)
    out = console()
    codes = _finished(grid.points)
    groups = [left for group in grid.groups() if (left := [point for point in group if point.name not in codes])]
    adapters = "1 adapter" if len(groups) == 1 else f"{len(groups)} adapters"
    shared = f", {adapters} to train" if 0 < len(groups) < len(grid.points) else ""
    up_to_date = f", {len(codes)} up to date" if codes else ""
    out.print(f"{len(grid.points)} runs{up_to_date}{shared} · {grid.directory}")
    grid.directory.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder=grid.directory / "jobs", cluster=cluster)
    executor.update_parameters(name=grid.directory.name, timeout_min=NO_LIMIT_MINUTES)
    tasks = [[_command(recipe, point, grid.directory) for point in group] for group in groups]
    if cluster == "local":
        codes |= _on_this_machine(executor, groups, tasks, jobs)
    elif groups:
        # Keys without a prefix are submitit's own, for every cluster.
        given = {key: int(value) if value.isdigit() else value for key, value in parameters.items()}
        executor.update_parameters(**({"slurm_array_parallelism": jobs} if jobs else {}), **given)
        submitted = executor.map_array(run_in_turn, tasks)
        out.print(f"jobs {', '.join(job.job_id for job in submitted)}: their output is in {grid.directory / 'jobs'}")
        codes |= _await(submitted, groups)
    rows = [_outcome(point, codes[point.name]) for point in grid.points]
    write_json(grid.directory / "sweep.json", {"runs": rows})
    plot(rows, grid.directory / "sweep.png")
    out.print()
    out.print(sweep_table(rows))
    out.print(f"\n{grid.directory / 'sweep.json'} · {grid.directory / 'sweep.png'}", markup=False)
    failed = [row for row in rows if row["outcome"] not in OUTCOMES.values()]
    if failed:
        raise QloraError(
            [
                Problem(row["outcome"], row["directory"], "its log is in logs/; the same command goes on")
                for row in failed
            ]
        )


def run_in_turn(commands: Sequence[Sequence[str]], gpus: str | None = None) -> list[int]:
    """What a job does: every command in a process of its own, which sees these GPUs; their exit codes."""
    environment = dict(os.environ) if gpus is None else os.environ | {"CUDA_VISIBLE_DEVICES": gpus}
    return [subprocess.run(command, env=environment).returncode for command in commands]


def write_wandb(recipe: str, overrides: Sequence[str], path: Path) -> None:
    """A sweep file that wandb's agents take the grid from: `wandb sweep FILE`, then `wandb agent …` anywhere."""
    import yaml

    grid = Grid.of(recipe, overrides)
    keys = list(grid.points[0].values)
    fixed = [override for override in overrides if _key(override) not in keys]
    values = {
        key: {"values": [parse_value(value) for value in dict.fromkeys(point.values[key] for point in grid.points)]}
        for key in keys
    }
    # An agent tells its runs apart by this variable, which paths in a recipe may name.
    command = ["qlora", "run", recipe, *fixed, f"output_dir={grid.directory}/${{envvar:WANDB_RUN_ID}}"]
    document = {"method": "grid", "command": [*command, "${args_no_hyphens}"], "parameters": values}
    write_text(path, yaml.safe_dump(document, sort_keys=False))


def _finished(points: Sequence[Point]) -> dict[str, int]:
    """Exit codes of the runs that have nothing left to do."""
    codes = {}
    for point in points:
        facts = _facts(point)
        if facts is None:
            continue
        from qlora.pipeline import Pipeline
        from qlora.verdict import verdict

        try:
            if Pipeline(point.recipe).finished():
                codes[point.name] = 3 if verdict(facts).reasons else 0
        except QloraError:  # the run itself will say so
            continue
    return codes


def _facts(point: Point) -> RunFacts | None:
    """What is known of a run; None where it has not come to that, or not in a form that can be read."""
    try:
        return RunFacts.read(point.recipe.run_dir)
    except UserError:
        return None


def _on_this_machine(
    executor: Any, groups: Sequence[Sequence[Point]], tasks: Sequence[Any], jobs: int | None
) -> dict[str, int]:
    """Exit codes by run. A job at a time for each GPU, which sees no other."""
    gpus = _visible_gpus()
    free: list[str | None] = list(gpus[:jobs] if gpus else [None] * (jobs or 1))
    waiting = list(zip(groups, tasks, strict=True))
    running: dict[Any, tuple[Sequence[Point], str | None]] = {}
    codes: dict[str, int] = {}
    try:
        while waiting or running:
            while waiting and free:
                gpu, (group, task) = free.pop(0), waiting.pop(0)
                running[executor.submit(run_in_turn, task, gpu or "")] = group, gpu
            for job in [job for job in running if job.done()]:
                group, gpu = running.pop(job)
                free.append(gpu)
                codes |= _codes(job, group)
            time.sleep(POLL_SECONDS if running else 0)
    except BaseException:
        for job in running:
            job.cancel()
        raise
    return codes


def _await(submitted: Sequence[Any], groups: Sequence[Sequence[Point]]) -> dict[str, int]:
    codes: dict[str, int] = {}
    for job, group in zip(submitted, groups, strict=True):
        codes |= _codes(job, group)
    return codes


def _codes(job: Any, group: Sequence[Point]) -> dict[str, int]:
    """Of a job's runs, as it ends; a job that was killed has none."""
    error = job.exception()
    found: list[int] = [1] * len(group) if error is not None else job.result()
    for point, code in zip(group, found, strict=True):
        console().print(f"  {point.name}: {OUTCOMES.get(code, f'failed ({code})')}")
    return {point.name: code for point, code in zip(group, found, strict=True)}


def _outcome(point: Point, code: int) -> dict[str, Any]:
    """A line of the table: what differs, and what was measured."""
    facts = _facts(point)
    stages = facts.stages if facts is not None else {}
    ladder = facts.ladder if facts is not None else None
    rungs = {rung["name"]: rung for rung in ladder["rungs"]} if ladder is not None else {}
    taken = [name for name, entry in stages.items() if "taken_from" in entry]
    return {
        "name": point.name,
        "directory": str(point.recipe.run_dir),
        "values": point.values,
        "outcome": OUTCOMES.get(code, f"failed ({code})"),
        "training_loss": facts.metrics("train").get("final_loss") if facts is not None else None,
        "trained": rungs.get("trained"),
        "gptq": rungs.get("gptq"),
        "seconds": sum(entry["seconds"] for name, entry in stages.items() if name not in taken),
        "taken_over": taken,
    }


def _command(recipe: str, point: Point, directory: Path) -> list[str]:
    return [sys.executable, "-m", "qlora", "run", recipe, *point.overrides, "--reuse", str(directory)]


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each for each in named.split(",") if each]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _key(override: str) -> str:
    return override.partition("=")[0]


def _values(override: str) -> list[str]:
    """Values at the commas outside of brackets and quotes."""
    text = override.partition("=")[2]
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _name(values: Mapping[str, str]) -> str:
    """Of a run directory: the last words of keys where they are enough to tell them apart."""
    last = [key.rpartition(".")[2] for key in values]
    words = last if len(set(last)) == len(last) else list(values)
    plain = [re.sub(r"[^A-Za-z0-9._]+", "-", Path(value).name).strip("-.") for value in values.values()]
    return "_".join(f"{word}-{value}" for word, value in zip(words, plain, strict=True)).strip("-._")
