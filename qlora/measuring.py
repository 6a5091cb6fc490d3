"""The evaluate stage: the ladder, and beside it what is looked at while its models are there.

It takes what it needs from the stages before it: the weights of the merge for survival, and the other merge. No stage's
module imports another's; this one, as `stages`, hands what one made to the next.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.artifacts import Lineage, require_disk, write_json
from qlora.data.rendering import RenderedRow
from qlora.errors import UserError
from qlora.evaluation.merges import check_compared, compare, other_base
from qlora.evaluation.output_errors import OutputErrors
from qlora.evaluation.survival import report, survival
from qlora.models.gptq_format import quantization_method
from qlora.models.packed_checkpoint import PackedLinears
from qlora.recipe import Recipe
from qlora.rungs import OtherMerge
from qlora.stages import Progress, Run, computed_source, general_rows, quantize_source

if TYPE_CHECKING:
    from qlora.evaluation.ladder import Rung

OF_AWQ = "AWQ scales inputs of a linear and takes that back in what comes before it: no weight stands for another alone"


def evaluate(run: Run, fingerprint: str, output: Path | None, progress: Progress) -> dict[str, Any]:
    from qlora.evaluation.answers import metrics_of
    from qlora.evaluation.ladder import Settings, climb
    from qlora.evaluation.tasks import open_tasks
    from qlora.rungs import rungs
    from qlora.serving_contract import golden_prompts, serving_contract

    assert output is not None
    if run.eval_rows is None:
        raise UserError("there is nothing to measure on", "data.eval", "name a file of held-out rows in data.eval")
    section = run.recipe.evaluate
    rows = run.eval_rows.rows.good[: section.rows]
    compared = run.eval_rows.rows[: section.rows]
    survival = SurvivalOfRun(run, rows) if section.survival else None
    general, golden = general_rows(run), golden_prompts(run, rows)
    observe = [golden.observe, *(survival.observers if survival is not None else ())]
    with open_tasks(section, run.tokenizer) as tasks, other_merge(run, output / "other", progress) as other:
        settings = Settings(
            section.batch_size,
            section.max_new_tokens,
            run.tokenizer.pad_token_id,
            metrics=metrics_of(section),
            examples=section.examples,
            general_batch=section.general_batch,
            tasks=tasks,
        )
        models = rungs(run, rows, other)
        ladder = climb(models, rows, run.tokenizer, settings, output, progress, compared, observe, general)
    found = ladder.to_json()
    write_json(output / "ladder.json", found)
    write_json(output / "contract.json", serving_contract(run, rows, golden))
    if ladder.generations:
        write_json(output / "generations.json", {"rows": ladder.generations})
    if section.compare_merges:
        write_merges(run.recipe, found["rungs"], output / "merges.json")
    metrics = survival.write(output / "survival.json", progress) if survival is not None else {}
    return metrics | ladder.metrics()


class SurvivalOfRun:
    """Adapter survival of a run: what it looks at in the ladder, and then what it finds."""

    def __init__(self, run: Run, rows: Sequence[RenderedRow]) -> None:
        self._run = run
        self._packed: PackedLinears | None = None
        self.observers: list[Callable[[Rung, Any], None]] = []
        if quantization_method(run.dirs.gptq) == "gptq":
            self._packed = PackedLinears(run.dirs.gptq)
            # Where the merge computed: codes of int8 depend on it.
            self._device = run.device_of("merge")
            self._weights = computed_source(run, run.recipe.merge.base, run.dirs.merged, self._device)
            modules = {name: self._weights.module(f"{name}.weight") for name in self._packed.names}
            self._outputs = OutputErrors(self._packed, modules, rows)
            self.observers.append(self._outputs)

    def write(self, path: Path, progress: Progress) -> dict[str, Any]:
        """survival.json; returns metrics for the lineage."""
        if self._packed is None:
            write_json(path, report([], [], OF_AWQ))
            return {}
        metrics = Lineage(self._run.dirs.lineage).metrics("quantize")
        losses = {module["name"]: module["relative_loss"] for module in metrics["modules"]}
        expected = {name: math.sqrt(max(0.0, loss)) for name, loss in losses.items() if loss is not None}
        found = survival(self._packed, self._weights, self._outputs.errors, expected, self._device, progress)
        content = report(*found)
        write_json(path, content)
        overall = {f"survival_{figure}": value for figure, value in content["overall"].items()}
        return overall | {"survival_damaged": len(content["damaged"])}


@contextlib.contextmanager
def other_merge(run: Run, scratch: Path, progress: Progress) -> Iterator[OtherMerge | None]:
    """The merge into the other base, and what GPTQ makes of it, while the block lasts; None if it is not asked for.

    scratch: a folder that does not exist. Raises WillNotFit if the disk is too small.
    """
    from qlora.merging import merge_adapter
    from qlora.models.checkpoint import CheckpointReader
    from qlora.models.loading import DTYPES

    section = run.recipe.merge
    check_compared(run.recipe)
    if not run.recipe.evaluate.compare_merges:
        yield None
        return
    needed = sum(file.stat().st_size for made in (run.dirs.merged, run.dirs.gptq) for file in made.rglob("*"))
    require_disk(scratch, needed, "the other merge and its quantization (evaluate.compare_merges)")
    other = OtherMerge(other_base(run.recipe), scratch / "merged", scratch / "gptq")
    try:
        for folder in (other.merged, other.gptq):
            folder.mkdir(parents=True)
        device = run.device_of("merge")
        merge_adapter(
            run.base.directory,
            run.dirs.adapter,
            other.merged,
            base=other.base,
            dtype=DTYPES[section.dtype],
            rounding=section.rounding,
            device=device,
            write_weights=section.write,
            max_shard_bytes=int(section.max_shard_gb * 1e9),
            progress=progress,
        )
        source: Any = (
            CheckpointReader(other.merged)
            if section.write
            else computed_source(run, other.base, other.merged, run.device_of("quantize"))
        )
        quantize_source(run, source, other.gptq, progress)
        yield other
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_merges(recipe: Recipe, scores: Sequence[dict[str, Any]], path: Path) -> None:
    """merges.json, from the rungs of both merges."""
    rungs = {score["name"]: score for score in scores}
    own, other = recipe.merge.base, other_base(recipe)
    merged = {own: rungs.get("merged"), other: rungs.get("merged_other")}
    write_json(path, compare(merged, {own: rungs["gptq"], other: rungs["gptq_other"]}))
