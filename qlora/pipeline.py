"""The stages of a run, in order: train → merge → quantize → evaluate. The only module that knows all of them.

A stage is skipped when its fingerprint (its sections of the recipe, the digests of its inputs, the versions that change
results) is the one in lineage.json and its files are whole. Otherwise it writes to `<dir>.partial` and renames.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import stages
from qlora.artifacts import (
    LOCK_HELD,
    Lineage,
    atomic_directory,
    digest,
    exclusive,
    is_intact,
    link_weights,
    manifest,
    require_unaltered,
    result_digest,
    write_text,
)
from qlora.errors import GateFailed, Problem, QloraError, UserError
from qlora.facts import RunFacts
from qlora.measure import Measured, measured
from qlora.paths import RunDir, packaged_recipes
from qlora.recipe import Recipe
from qlora.recipe_file import dump_recipe
from qlora.reporting.console import StageProgress, console, duration, is_main_process, log_to
from qlora.reporting.outcome import ladder_notes, merges_notes, quantize_notes, summary, survival_notes
from qlora.reporting.page import write_page
from qlora.reporting.tables import ladder_table
from qlora.reporting.tracking import Tracker
from qlora.stages import Progress, Run
from qlora.verdict import verdict

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


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "train",
            "adapter",
            stages.train,
            needs=(),
            sections=("model", "data", "lora", "train", "seed"),
            without=(
                "model.base",
                "data.eval",
                "train.processes",
                "train.shard",
                "train.log_every",
                "train.checkpoint_every",
            ),
        ),
        Stage("merge", "merged", stages.merge, needs=("train",), sections=("merge",), without=("merge.device",)),
        Stage(
            "quantize",
            "gptq",
            stages.quantize,
            # Without merged weights on disk it computes them from the adapter, as the merge section says.
            needs=("train", "merge"),
            sections=("merge", "quantize", "data", "seed"),
            without=("merge.max_shard_gb", "merge.device", "quantize.device"),
            resumable=True,
        ),
        Stage(
            "evaluate",
            "evaluation",
            stages.evaluate,
            needs=("train", "merge", "quantize"),
            sections=("evaluate", "data"),
            without=("data.train", "evaluate.batch_size", "evaluate.device", "evaluate.memory", "evaluate.gates"),
        ),
    )
}


class Pipeline:
    """Runs stages of one recipe in its run directory."""

    def __init__(self, recipe: Recipe, reuse: Path | None = None) -> None:
        """reuse: a folder of run directories whose finished stages are taken over where they would be the same."""
        self.recipe, self.reuse = recipe, reuse
        self.state = Run(recipe)
        self.dirs = self.state.dirs
        self.lineage = Lineage(self.dirs.lineage)
        self.tracker = Tracker(recipe, self.dirs.tracking)
        self.out = console()
        self._unaltered: set[str] = set()  # stages whose files were read, and found to be what lineage.json says

    def run(self) -> None:
        """Every stage in order, skipping those that are up to date. Raises `GateFailed` after the last one."""
        with self._session():
            if not self._is_current(STAGES["quantize"]):
                stages.check_quantization(self.state)
            if not self._is_current(STAGES["evaluate"]):
                stages.check_evaluation(self.state)
            for stage in STAGES.values():
                if stage.name == "evaluate" and self.state.splits.evaluation is None:
                    self.lineage.forget("evaluate")
                    self.out.print("  evaluate   skipped: no rows are held out, so nothing was measured")
                    continue
                self._ensure(stage)
            self._finish()

    def finished(self) -> bool:
        """Whether every stage is up to date, so that `run` has nothing to do."""
        wanted = [stage for stage in STAGES.values() if stage.name in self.lineage.stages]
        if {stage.name for stage in wanted} | {"evaluate"} != STAGES.keys():
            return False
        measured = "evaluate" in self.lineage.stages or self.state.splits.evaluation is None
        return measured and all(map(self._is_current, wanted))

    def run_stage(self, name: str) -> None:
        """One stage. Raises `UserError` naming the command if a stage before it is missing or out of date."""
        stage = STAGES[name]
        with self._session():
            self.require(stage.needs, name)
            self._ensure(stage)
            if name == "evaluate":
                self._finish()

    def require(self, names: Sequence[str], purpose: str) -> None:
        """Raise `UserError` naming the command for every one of these stages that is missing or out of date."""
        missing = [need for need in names if not self._is_current(STAGES[need])]
        if missing:
            raise UserError(
                [
                    Problem(
                        f"{purpose} needs the result of {need}, which is missing or out of date"
                        + self._what_changed(STAGES[need]),
                        str(getattr(self.dirs, STAGES[need].output)),
                        f"qlora {need} RECIPE, or `qlora run RECIPE` for all stages",
                    )
                    for need in missing
                ]
            )

    def require_all(self, purpose: str) -> None:
        """As `require`, every stage of this recipe."""
        measured = self.state.splits.evaluation is not None
        self.require([name for name in STAGES if name != "evaluate" or measured], purpose)

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        """The run directory, locked against a second process; its recipe, log file and tracker."""
        self.dirs.root.mkdir(parents=True, exist_ok=True)
        with exclusive(self.dirs.root), log_to(self.dirs.logs):
            if is_main_process():
                write_text(self.dirs.recipe, dump_recipe(self.recipe))
                self.state.log = self.tracker.log
            self.out.print(f"[bold]{self.recipe.name}[/bold] · {self.dirs.root} · {self.state.device}")
            exit_code = 1
            try:
                yield
                exit_code = 0
            finally:
                self.tracker.close(exit_code)

    def _ensure(self, stage: Stage) -> None:
        """Run the stage unless it is up to date."""
        entry = self.lineage.stages.get(stage.name, {})
        if self._is_current(stage):
            self.out.print(f"  {stage.name:10} up to date ({summary(stage.name, entry['metrics'])})")
            return
        if self._take_over(stage):
            return
        changed = self._what_changed(stage)
        if changed:
            self.out.print(f"  {stage.name:10} runs again{changed}")
        processes = 1 if self.recipe.lora.combine else self.recipe.train.processes
        if stage.name == "train" and processes > 1 and "RANK" not in os.environ:
            self._launch_training(processes)
            return
        self._execute(stage)

    def _take_over(self, stage: Stage) -> bool:
        """Have what another run's stage made of the same inputs; weights as links, so that they take no room."""
        if self.reuse is None or not is_main_process():
            return False
        wanted, own = digest(self._fingerprint(stage)), self.dirs.lineage.resolve()
        for path in sorted(self.reuse.glob("*/lineage.json")):
            entry = Lineage(path).stages.get(stage.name, {})
            source: Path = getattr(RunDir(path.parent), stage.output)
            if path.resolve() == own or entry.get("status") != "complete" or entry["fingerprint"] != wanted:
                continue
            if is_intact(source, entry["outputs"]):
                target: Path = getattr(self.dirs, stage.output)
                with atomic_directory(target) as partial:
                    link_weights(source, partial, entry["outputs"])
                self.lineage.record(stage.name, entry | {"taken_from": str(path.parent)})
                self.out.print(f"  {stage.name:10} taken from {path.parent} ({summary(stage.name, entry['metrics'])})")
                return True
        return False

    def _execute(self, stage: Stage) -> None:
        fingerprint = self._fingerprint(stage)
        target: Path = getattr(self.dirs, stage.output)
        entry: dict[str, Any] = {"fingerprint": digest(fingerprint), "status": "running", "inputs": fingerprint}
        entry |= {"versions": versions(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if stage.name == "evaluate" and is_main_process():
            self._require_unaltered(stage.needs)  # what is measured is what was made
        with StageProgress(stage.name) as progress, measured() as cost:
            self.state.progress = progress.update
            if not is_main_process():
                stage.run(self.state, entry["fingerprint"], None, progress.update)
                return
            entry["expected"] = self._expected.get(stage.name)
            self.lineage.record(stage.name, entry)
            self.out.print(f"  {stage.name:10} …")
            # Another device computes other bytes: one artefact is made on one.
            resume_key = f"{entry['fingerprint']} {self.state.device_of(stage.name)}" if stage.resumable else None
            with atomic_directory(target, resume_key) as partial:
                metrics = stage.run(self.state, entry["fingerprint"], partial, progress.update)
        metrics |= {"seconds": cost.seconds, "host_peak_gib": cost.host_peak_gib, "gpu_peak_gib": cost.gpu_peak_gib}
        entry |= {"status": "complete", "seconds": cost.seconds, "metrics": metrics, "outputs": manifest(target)}
        self.lineage.record(stage.name, entry)
        self._unaltered.add(stage.name)
        self.tracker.log(stage.name, metrics)
        self.out.print(f"  {stage.name:10} {_cost(cost)} · {summary(stage.name, metrics)}")

    def _launch_training(self, processes: int) -> None:
        """Train in several processes: `accelerate launch` with recipes/accelerate/gpus.yaml.

        accelerate starts several processes only as "multi_gpu", on CPUs too: with --cpu it silently starts one.
        """
        if os.environ.get(LOCK_HELD):
            raise QloraError(f"the launcher started one process instead of {processes}", "train.processes")
        configuration = packaged_recipes() / "accelerate" / "gpus.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration)]
        command += ["--num_processes", str(processes), "-m", "qlora", "train", str(self.dirs.recipe)]
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        environment = os.environ | {"OMP_NUM_THREADS": threads, LOCK_HELD: "1"}
        if self.state.device == "cpu":
            # accelerate's barriers ask for one GPU per process wherever it sees any.
            environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        self.tracker.close()  # the first process of the launch continues the same run
        code = subprocess.run(command, env=environment).returncode
        self.lineage = Lineage(self.dirs.lineage)
        if code or not self._is_current(STAGES["train"]):
            raise QloraError(
                f"the {processes} training processes ended with an error", str(self.dirs.logs), "see above"
            )
        started = self.lineage.metrics("train")["processes"]
        if started != processes:
            raise QloraError(f"{started} process(es) trained instead of {processes}", "train.processes")

    def _finish(self) -> None:
        """Show the ladder, what fell short, and where the checkpoint is.

        Raises UserError if the checkpoint is not the one that was measured, `GateFailed` if it is not to be shipped.
        """
        self._require_unaltered(["quantize"])
        facts = RunFacts.read(self.dirs.root)
        if facts.ladder is not None:
            self.out.print()
            width = self.out.width if self.out.is_terminal else None
            self.out.print(ladder_table(facts.ladder["rungs"], facts.ladder["rows"], facts.ladder["tokens"], width))
            for note in ladder_notes(self.recipe):
                self.out.print(note)
        measured = [*survival_notes(facts.survival), *merges_notes(facts.merges)]
        for note in [*measured, *quantize_notes(self.lineage.metrics("quantize"))]:
            self.out.print(note, markup=False)
        report = write_page(facts)
        self.tracker.show(facts, report)
        self.out.print(f"\nGPTQ checkpoint: [bold]{self.dirs.gptq}[/bold]")
        self.out.print(f"Report: [bold]{report}[/bold]")
        if reasons := verdict(facts).reasons:
            raise GateFailed(reasons)

    def _require_unaltered(self, names: Iterable[str]) -> None:
        """Raise UserError if files of these stages, all up to date, have other bytes than when they were written."""
        with StageProgress("files") as progress:
            for name in names:
                if name not in self._unaltered:
                    outputs = self.lineage.stages[name]["outputs"]
                    require_unaltered(getattr(self.dirs, STAGES[name].output), outputs, name, progress.update)
                    self._unaltered.add(name)

    def _is_current(self, stage: Stage) -> bool:
        entry = self.lineage.stages.get(stage.name, {})
        return (
            entry.get("status") == "complete"
            and entry["fingerprint"] == digest(self._fingerprint(stage))
            and is_intact(getattr(self.dirs, stage.output), entry["outputs"])
        )

    def _fingerprint(self, stage: Stage) -> dict[str, Any]:
        """What decides the stage's result, as a flat mapping so that a change can be named."""
        recipe = self.recipe.model_dump(mode="json")
        result: dict[str, Any] = {"base": self.state.base.digest}
        for section in stage.sections:
            result |= _flat(section, recipe[section])
        for key, content in self._digests.items():
            if _drop(result, key):
                result[key] = content
        for key in stage.without:
            _drop(result, key)
        for need in stage.needs:
            outputs = self.lineage.stages.get(need, {}).get("outputs", {})
            result[f"result of {need}"] = result_digest(outputs)
        return result | {f"version of {name}": version for name, version in versions().items()}

    @functools.cached_property
    def _expected(self) -> dict[str, dict[str, float | None]]:
        """What each stage is estimated to take, for the report to compare with."""
        from qlora.workload import expected

        return expected(self.state)

    @functools.cached_property
    def _digests(self) -> dict[str, Any]:
        with StageProgress("data") as progress:
            self.state.progress = progress.update
            return self.state.digests()

    def _what_changed(self, stage: Stage) -> str:
        """` because lora.r, data.train changed`, or an empty string."""
        entry = self.lineage.stages.get(stage.name, {})
        if entry.get("status") != "complete":
            return ""
        old, new = entry["inputs"], self._fingerprint(stage)
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return f" because {', '.join(names)} changed" if names else " because files are missing"


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


def _cost(cost: Measured) -> str:
    memory = cost.gpu_peak_gib if cost.gpu_peak_gib else cost.host_peak_gib
    return duration(cost.seconds) + (f" · {memory:.1f} GiB" if memory else "")
