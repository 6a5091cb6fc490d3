"""How much work a recipe is, from its rendered rows, and what its stages are expected to take: before they run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora.data.store import NONE
from qlora.data.store import Rows as RenderedRows
from qlora.errors import QloraError
from qlora.fits import free_now
from qlora.merging.combination import combined_parameters
from qlora.models.estimates import estimate_stages
from qlora.models.held import training_shapes
from qlora.models.resources import Asked, Machine, Rows, StageEstimate, Workload, machine_of
from qlora.models.shapes import AdapterShapes, ModelShapes, adapter_shapes, read_config, skeleton
from qlora.models.tokens import TrainedTokens, trained_tokens
from qlora.quantization.preview import CalibrationPreview, preview_calibration
from qlora.recipe import Recipe
from qlora.training.plan import PASSES, TrainingPlan, fewest_rows, longest_of, plan_batches, plan_training

if TYPE_CHECKING:
    from qlora.stages import Run


def step_lengths(recipe: Recipe, rows: RenderedRows) -> Sequence[int]:
    """Tokens of every row, as a step of the recipe's method counts them."""
    return rows.lengths if recipe.train.method == "sft" else rows.tokens


def plan(
    recipe: Recipe, rows: RenderedRows, shapes: ModelShapes, adapter: AdapterShapes, machine: Machine, free: int
) -> TrainingPlan:
    """How training will divide its steps in `free` bytes, without asking a device."""
    lengths = step_lengths(recipe, rows)
    asked = (recipe.train.processes, shapes, adapter, machine, free)
    if recipe.train.method == "sft":
        records = recipe.train.processes == 1 and not recipe.lora.dropout
        return plan_training(recipe, lengths, *asked, padded=False, records=records)
    method = recipe.train.method
    return plan_batches(recipe, lengths, longest_of(method, rows), *asked, fewest=fewest_rows(method))


def workload(
    recipe: Recipe,
    plan: TrainingPlan,
    lengths: Sequence[int],
    calibration: CalibrationPreview,
    evaluation: RenderedRows | None,
) -> tuple[Workload, int]:
    """Tokens per stage, and the number of optimizer steps."""
    per_epoch = plan.schedule.steps_per_epoch
    count = recipe.train.max_steps or max(1, math.ceil(per_epoch * recipe.train.epochs))
    held_out = RenderedRows.of([]) if evaluation is None else evaluation[: recipe.evaluate.rows]
    compared = (held_out.column("rejected") != NONE) | (held_out.column("good") != NONE)
    work = Workload(
        train_tokens=round(PASSES[recipe.train.method] * count * sum(lengths) / per_epoch),
        train_sequence=sum(length**2 for length in lengths) / sum(lengths),
        largest_pass=plan.memory.largest,
        calibration=Rows.of(row.input_ids for row in calibration.rows),
        refinement=Rows.of(row.input_ids for row in calibration.refinement) if calibration.refinement else None,
        evaluation=Rows(sum(held_out.lengths), max(held_out.lengths, default=0)),
        eval_answer_tokens=int(held_out.column("supervised").sum()),
        eval_longest_answer=int(held_out.column("supervised").max(initial=0)),
        eval_rows=len(held_out),
        eval_asked=_asked(held_out),
        eval_compared_tokens=sum(held_out.select(compared).tokens),
    )
    return work, count


def _asked(rows: RenderedRows) -> Asked:
    answered = rows.select(rows.column("text_length") != NONE)
    prompts = answered.column("prompt_length")
    longest = (answered.column("length") - prompts).max(initial=0)
    return Asked(len(answered), int(prompts.sum()), int(longest))


def adapter_of(recipe: Recipe, model: Any, tokens: TrainedTokens | None) -> AdapterShapes:
    """What the recipe trains beside the base; `model` is a skeleton, which it may be attached to."""
    combined = recipe.lora.combine
    return AdapterShapes(combined_parameters(combined)) if combined else adapter_shapes(model, recipe.lora, tokens)


def expected(run: Run) -> dict[str, dict[str, float | None]]:
    """For the lineage, by stage: `seconds`, `host_gib`, `gpu_gib`. Empty where the estimate meets what cannot run: the
    stage itself says so.
    """
    try:
        return {stage: _plain(parts) for stage, parts in _estimates(run).items()}
    except QloraError:
        return {}


def _estimates(run: Run) -> dict[str, list[StageEstimate]]:
    recipe, base = run.recipe, run.base
    trust = recipe.model.trust_remote_code
    model = skeleton(read_config(base.directory, trust_remote_code=trust), trust_remote_code=trust)
    shapes = training_shapes(model, recipe.model, base.packed or base.directory)
    adapter = adapter_of(recipe, model, trained_tokens(recipe.lora, base.directory, trust))
    machine, free = machine_of(run.device), free_now(recipe, run.device)
    rows = run.train_rows.rows
    planned = plan(recipe, rows, shapes, adapter, machine, free.host if free.device is None else free.device)
    calibration = preview_calibration(recipe, rows, run.tokenizer, run.held_out_rows)
    work, _ = workload(recipe, planned, step_lengths(recipe, rows), calibration, run.held_out_rows)
    found: dict[str, list[StageEstimate]] = {}
    for estimate in estimate_stages(recipe, shapes, adapter, work, machine):
        found.setdefault("quantize" if estimate.stage == "refine" else estimate.stage, []).append(estimate)
    return found


def _plain(parts: Sequence[StageEstimate]) -> dict[str, float | None]:
    """Parts of a stage run one after the other."""
    seconds = [part.seconds for part in parts if part.seconds is not None]
    device, host = (max(sizes) / 2**30 for sizes in zip(*((part.device, part.host) for part in parts), strict=True))
    on_gpu = any(part.device != part.host for part in parts)
    return {
        "seconds": round(sum(seconds), 4) if len(seconds) == len(parts) else None,
        "host_gib": round(host, 3),
        "gpu_gib": round(device, 3) if on_gpu else None,
    }
