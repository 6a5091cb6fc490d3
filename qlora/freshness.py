"""Whether what lies in a run directory is what its recipe and its inputs make now, and if not, what has changed.

A stage's fingerprint has its sections of the recipe, the digests of its inputs, the results of the stages that it needs
and the versions that change results. What a stage made is up to date while its fingerprint is the one in lineage.json,
and its files are whole.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.artifacts import Lineage, digest, is_intact, missing_or_resized, result_digest
from qlora.reporting.console import StageProgress
from qlora.stages import UNKNOWN, Progress, Run

VERSIONED = ("qlora", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Stage:
    """A stage: the folder it writes, the stages it needs, and the parts of the recipe that decide its result.

    run: takes the run, the stage's fingerprint, the folder to write (None on processes other than the first) and a
    progress callback; returns metrics.
    without: keys of the sections that change nothing about the result.
    resumable: the folder it is given may hold what an interrupted attempt at the same result left there.
    """

    name: str
    output: str
    run: Callable[[Run, str, Path | None, Progress], dict[str, Any]]
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    without: tuple[str, ...] = ()
    resumable: bool = False


class Freshness:
    """Of the stages of one run.

    fetch: whether to fetch a base or data that only the hub has, to compare them. Else these, and files that are no
    longer there, count as what they were.
    """

    def __init__(self, run: Run, lineage: Lineage, *, fetch: bool = True) -> None:
        self._run, self._lineage, self._fetch = run, lineage, fetch

    def is_current(self, stage: Stage) -> bool:
        """Whether the stage has finished, and would make the same again."""
        entry = self._entry(stage)
        return (
            entry.get("status") == "complete"
            and entry["fingerprint"] == digest(self.fingerprint(stage))
            and is_intact(getattr(self._run.dirs, stage.output), entry["outputs"])
        )

    def fingerprint(self, stage: Stage) -> dict[str, Any]:
        """What decides the stage's result, as a flat mapping so that a change can be named."""
        recipe = self._run.recipe.model_dump(mode="json")
        result: dict[str, Any] = {"base": None}
        for section in stage.sections:
            result |= _flat(section, recipe[section])
        recorded = self._entry(stage).get("inputs", {})
        for key, content in self._inputs.items():
            if _drop(result, key):
                content = recorded.get(key) if content is UNKNOWN else content
                result[key] = content
        for key in stage.without:
            _drop(result, key)
        for need in stage.needs:
            outputs = self._lineage.stages.get(need, {}).get("outputs", {})
            result[f"result of {need}"] = result_digest(outputs)
        return result | {f"version of {name}": version for name, version in versions().items()}

    def what_changed(self, stage: Stage) -> str:
        """` because lora.r, data.train changed`, ` because gptq/config.json is missing`, or an empty string."""
        entry = self._entry(stage)
        if entry.get("status") != "complete":
            return ""
        old, new = entry["inputs"], self.fingerprint(stage)
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if names:
            return f" because {', '.join(names)} changed"
        damage = missing_or_resized(getattr(self._run.dirs, stage.output), entry["outputs"])
        return next((f" because {what}" for what in damage), "")

    def _entry(self, stage: Stage) -> dict[str, Any]:
        return self._lineage.stages.get(stage.name, {})

    @functools.cached_property
    def _inputs(self) -> dict[str, Any]:
        """Digests of what the recipe reads, by key."""
        if not self._fetch:
            return self._run.digests(fetch=False)
        with StageProgress("data") as progress:
            self._run.progress = progress.update
            return self._run.digests()


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {key: leaf for part, nested in value.items() for key, leaf in _flat(f"{name}.{part}", nested).items()}


def _drop(flat: dict[str, Any], name: str) -> bool:
    """Remove a key and all below it; whether there were any."""
    found = [key for key in flat if key == name or key.startswith(f"{name}.")]
    for key in found:
        del flat[key]
    return bool(found)


def versions() -> dict[str, str]:
    """Installed versions of the packages that change results."""
    from qlora import __version__

    return {"qlora": __version__} | _versions_of_libraries()


@functools.cache
def _versions_of_libraries() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONED if name != "qlora"}
