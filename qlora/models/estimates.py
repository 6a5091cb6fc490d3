"""Memory, disk and time that each stage will take, by formula: estimates to plan with, not measurements.

Time is floating-point work over an assumed rate (`qlora.models.resources`). Training's memory is in
`qlora.models.training_memory`, quantization in `qlora.models.quantize_estimates`, evaluation's time in
`qlora.models.evaluate_estimates`.

All sizes are bytes, all counts are tokens or parameters.
"""

from __future__ import annotations

from dataclasses import replace

from qlora.models.evaluate_estimates import evaluate_seconds
from qlora.models.quantize_estimates import estimate_quantize, estimate_refine
from qlora.models.resources import (
    BYTES,
    STORAGE_RATE,
    Machine,
    StageEstimate,
    Workload,
    layer_forward_bytes,
    stage_estimate,
)
from qlora.models.shapes import AdapterShapes, ModelShapes
from qlora.models.training_memory import Trained, base_bytes
from qlora.recipe import Recipe
from qlora.recipe_measuring import GENERAL_LENGTH

QUANTIZE_RATE = {"cuda": 1e9, "cpu": 12e6}  # parameters/s to 4-bit and back in the merge; per core on a CPU
SHARE_OF_FREE = 0.9  # of a GPU's memory, what evaluation takes at most where the recipe does not say
SCORING_CHUNK = 2048  # answer tokens whose fp32 log-probabilities evaluation holds at once, three copies of them


def estimate_stages(
    recipe: Recipe, shapes: ModelShapes, adapter: AdapterShapes, work: Workload, machine: Machine
) -> list[StageEstimate]:
    """One estimate per stage, in order; refinement, which is part of quantize, has its own after it.

    Raises UserError for a `quantize` section that GPTQ cannot follow.
    """
    # Without merged weights on disk, quantize merges what it reads.
    merging = 0.0 if recipe.merge.write else _merging_seconds(shapes, machine)
    making = [
        _merge(recipe, shapes, machine),
        estimate_quantize(recipe, shapes, work, machine, merging_seconds=merging),
        *([estimate_refine(recipe, shapes, work, machine)] if recipe.quantize.refine else []),
    ]
    evaluate = _evaluate(recipe, shapes, work, machine)
    if recipe.evaluate.compare_merges:
        evaluate = _and_before(evaluate, making)
    return [_train(recipe, shapes, adapter, work, machine), *making, evaluate]


def _and_before(stage: StageEstimate, others: list[StageEstimate]) -> StageEstimate:
    """A stage that does the work of others first, and keeps what they write while it lasts."""
    every = [*others, stage]
    seconds = [each.seconds for each in every if each.seconds is not None]
    return replace(
        max(every, key=lambda each: each.device),
        stage=stage.stage,
        host=max(each.host for each in every),
        disk=sum(each.disk for each in every),
        seconds=sum(seconds) if len(seconds) == len(every) else None,
    )


def merged_bytes(recipe: Recipe, shapes: ModelShapes) -> int:
    """Size of the merged checkpoint, if it is written: merged linears in merge.dtype, the rest in 16 bits."""
    if not recipe.merge.write:
        return 0
    return BYTES[recipe.merge.dtype] * shapes.quantized + 2 * shapes.unquantized


def _train(
    recipe: Recipe, shapes: ModelShapes, adapter: AdapterShapes, work: Workload, machine: Machine
) -> StageEstimate:
    shards = recipe.train.processes if recipe.train.shard else 1
    trained = Trained(recipe, shapes, adapter, machine, work.train_sequence, shards=shards)
    passes = work.train_tokens / recipe.train.processes / max(1, work.largest_pass.tokens)
    saved = adapter.trainable * BYTES[recipe.lora.dtype]
    return stage_estimate(
        "train",
        machine,
        trained.parts(work.largest_pass),
        host=0,
        disk=saved + 2 * 3 * saved,  # the adapter, and two checkpoints with Adam's moments
        seconds=None if machine.on_gpu and machine.peak is None else passes * trained.seconds(work.largest_pass),
    )


def _merge(recipe: Recipe, shapes: ModelShapes, machine: Machine) -> StageEstimate:
    largest_linear = max(linear.parameters for linear in shapes.linears)
    copied = 2 * 2 * shapes.largest_tensor  # embeddings pass through in 16 bits
    size = merged_bytes(recipe, shapes)
    seconds = _merging_seconds(shapes, machine) + size / STORAGE_RATE
    parts = {"one linear in fp32, three times": 3 * 4 * largest_linear}
    return stage_estimate("merge", machine, parts, host=copied, disk=size, seconds=seconds)


def _merging_seconds(shapes: ModelShapes, machine: Machine) -> float:
    """Reading the 16-bit base once, and quantizing it again."""
    rate = QUANTIZE_RATE["cuda"] if machine.on_gpu else QUANTIZE_RATE["cpu"] * machine.cores
    return shapes.quantized / rate + 2 * shapes.total / STORAGE_RATE


def scoring_parts(recipe: Recipe, shapes: ModelShapes, longest: int, longest_answer: int) -> dict[str, int]:
    """Bytes that evaluation holds beside a model, by name, from tokens of the longest row and the longest answer."""
    itemsize, section = BYTES[recipe.model.dtype], recipe.evaluate
    batch, answers = section.batch_size * longest, section.batch_size * longest_answer
    if section.general is not None:
        batch, answers = (max(tokens, section.general_batch * GENERAL_LENGTH) for tokens in (batch, answers))
    generated = section.batch_size * (longest + section.max_new_tokens) if section.generate else 0
    return {
        "logits": (batch + answers) * shapes.vocab_size * itemsize,
        "log-probabilities": 3 * 4 * min(answers, SCORING_CHUNK) * shapes.vocab_size,
        "activations": layer_forward_bytes(shapes, itemsize) * batch,
        "keys and values": 2 * itemsize * shapes.layers * shapes.key_value_heads * shapes.head_dim * generated,
    }


def model_budget(recipe: Recipe, free: int) -> int:
    """Bytes of a GPU with so many free that evaluation may take."""
    memory = recipe.evaluate.memory
    return round(SHARE_OF_FREE * free) if memory == "auto" else min(free, round(memory * 2**30))


def _evaluate(recipe: Recipe, shapes: ModelShapes, work: Workload, machine: Machine) -> StageEstimate:
    itemsize = BYTES[recipe.model.dtype]
    rows, whole = work.evaluation, itemsize * shapes.total
    parts = {"model in 16 bits": whole, **scoring_parts(recipe, shapes, rows.longest, work.eval_longest_answer)}
    general = recipe.evaluate.general_tokens if recipe.evaluate.general is not None else 0
    # What training held the base in stays on the GPU; of others, what is computed with.
    least = max(base_bytes(recipe, shapes), 2 * itemsize * max(shapes.largest_layer, shapes.largest_tensor))
    return stage_estimate(
        "evaluate",
        machine,
        parts,
        host=0,
        disk=2 * (work.eval_answer_tokens + general) * shapes.vocab_size,  # the trained model's log-probabilities, fp16
        seconds=evaluate_seconds(recipe, shapes, work, machine, merging=_merging_seconds(shapes, machine)),
        movable=max(0, whole - least),
    )
