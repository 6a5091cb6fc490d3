"""What is known of a run, read from its directory: for whoever shows it, judges it, publishes it or checks it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.artifacts import Lineage, read_json
from qlora.errors import UserError
from qlora.paths import RunDir
from qlora.recipe import Recipe
from qlora.recipe_file import load_recipe


@dataclass(frozen=True)
class RunFacts:
    """A run as its directory tells of it. What was not measured is None.

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
        if "evaluate" in stages:
            for name in ("ladder", "survival", "contract", "generations", "merges"):
                path = dirs.evaluation / f"{name}.json"
                measured[name] = read_json(path) if path.is_file() else None
        return cls(dirs, load_recipe(str(dirs.recipe)), stages, **measured)

    def metrics(self, stage: str) -> dict[str, Any]:
        """A finished stage's metrics; empty if it has not run."""
        found: dict[str, Any] = self.stages.get(stage, {}).get("metrics", {})
        return found
