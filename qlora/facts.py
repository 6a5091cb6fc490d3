"""What is known of a run, read from its directory: for whoever shows it, judges it, publishes it or checks it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora.artifacts import Lineage, read_json, result_digest
from qlora.errors import Problem, UserError
from qlora.paths import RunDir
from qlora.recipe import Recipe
from qlora.recipe_file import load_recipe


@dataclass(frozen=True)
class RunFacts:
    """A run as its directory tells of it. What was not measured is None, or was measured of another checkpoint.

    stages: lineage.json, entries of finished stages by name.
    ladder, survival, contract, generations, merges: the files of that name in evaluation/.
    """

    dirs: RunDir
    recipe: Recipe
    stages: dict[str, dict[str, Any]]
    ladder: dict[str, Any] | None = None
    survival: dict[str, Any] | None = None
    contract: dict[str, Any] | None = None
    generations: dict[str, Any] | None = None
    merges: dict[str, Any] | None = None

    @classmethod
    def read(cls, directory: Path) -> RunFacts:
        """Raises UserError where this is no run directory."""
        dirs = RunDir(directory)
        missing = [path.name for path in (dirs.recipe, dirs.lineage) if not path.is_file()]
        if missing:
            raise UserError(
                f"this is no run directory: it has no {' and no '.join(missing)}",
                str(directory),
                "name the folder that `qlora run` wrote, such as runs/NAME",
            )
        stages = {name: entry for name, entry in Lineage(dirs.lineage).stages.items() if entry["status"] == "complete"}
        measured = {}
        if "evaluate" in stages and _of_this_checkpoint(stages):
            for name in ("ladder", "survival", "contract", "generations", "merges"):
                path = dirs.evaluation / f"{name}.json"
                measured[name] = read_json(path) if path.is_file() else None
        return cls(dirs, load_recipe(str(dirs.recipe)), stages, **measured)

    @cached_property
    def base(self) -> dict[str, Any]:
        """adapter/base.json: what was trained on. Empty if nothing was."""
        path = self.dirs.adapter / "base.json"
        found: dict[str, Any] = read_json(path) if "train" in self.stages and path.is_file() else {}
        return found

    def metrics(self, stage: str) -> dict[str, Any]:
        """A finished stage's metrics; empty if it has not run."""
        found: dict[str, Any] = self.stages.get(stage, {}).get("metrics", {})
        return found


def _of_this_checkpoint(stages: dict[str, dict[str, Any]]) -> bool:
    """Whether what was measured is what the run holds now, and not what was quantized before."""
    measured = stages["evaluate"].get("inputs", {}).get("result of quantize")
    return measured is None or measured == result_digest(stages.get("quantize", {}).get("outputs", {}))


def find_run(name: str) -> Path:
    """The directory of a run that is named by its path, by its name in runs/, or by its recipe."""
    for path in (Path(name), Path("runs") / name):
        if path.is_dir():
            return path
    try:
        return load_recipe(name).run_dir
    except UserError as error:
        raise UserError(
            [
                Problem("there is no such run", name, "name the folder that `qlora run` wrote, such as runs/NAME"),
                *error.problems,
            ]
        ) from None
