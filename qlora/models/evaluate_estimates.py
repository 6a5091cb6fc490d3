"""How long evaluation takes, by formula.

Every model of the ladder is loaded and reads every held-out row once, answers to compare and general text too: FLOPs
over an assumed rate. Where answers are generated it reads every prompt once more, and then a batch of answers grows by
a token a step: a step takes a fixed time per layer, reads every weight once, and multiplies its rows. Models that have
learned from the rows end where the longest expected answer does; the base, before training, goes on to the limit. The
trained and the quantized model answer golden prompts alike. The trained model unpacks its weights in every pass, so in
every step of an answer. Survival computes the merge again. Tasks of lm-eval are not counted.

All sizes are bytes, all counts are tokens or parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora.evaluation.output_errors import TOKENS
from qlora.models.resources import BYTES, STORAGE_RATE, STREAMING, TRAINING, Machine, Rate, Workload
from qlora.models.shapes import ModelShapes, forward_flops
from qlora.recipe import Recipe
from qlora.recipe_measuring import GENERAL_LENGTH

# On CPUs as SmolLM2-135M takes on an AVX-512 core; on GPUs assumed, but for makers' data sheets.
SCORING = Rate(TRAINING.share_of_peak, STREAMING.per_core)  # batches are smaller than GPTQ's
LAYER_STEP_SECONDS = 1.5e-3  # of a layer in a step: Python, and what is too small to count otherwise
READ_RATE = 5e9  # bytes/s of weights that a core reads in a step
FLOPS_PER_BYTE = 300  # what a GPU computes at its peak while it reads a byte
UNPACK_RATE = {"cuda": 1e11, "cpu": 100e6}  # weights/s from 4 bits in a pass of the trained model, by a GPU or a core


@dataclass(frozen=True)
class _Model:
    """A rung. learned: whether it is trained. unpacks: in every pass. golden: whether it answers golden prompts."""

    learned: bool
    unpacks: bool = False
    golden: bool = False


@dataclass(frozen=True)
class _Generation:
    """Answers to prompts of so many tokens in all: `rows` of them grow together by `steps` tokens, `batches` times."""

    prompt_tokens: float
    rows: float
    steps: int
    batches: int


def evaluate_seconds(
    recipe: Recipe, shapes: ModelShapes, work: Workload, machine: Machine, *, merging: float
) -> float | None:
    """merging: what computing the merge takes. None where the machine's rates are not known."""
    if machine.seconds(1, SCORING) is None:
        return None
    models = _models(recipe)
    seconds = sum(_seconds_of(model, recipe, shapes, work, machine) for model in models)
    if recipe.model.requantizes:  # of which quantizing the base is one half: twice, with the adapter and without
        seconds += merging
    if recipe.evaluate.survival:  # what training did, and outputs: a pass, and as much unpacked once more beside it
        seconds += merging + _pass_seconds(TOKENS, TOKENS, shapes, machine) + 2 * _unpacking_seconds(shapes, machine)
    return seconds


def _models(recipe: Recipe) -> list[_Model]:
    """Of the ladder: base, what training began with, trained; then of every merge, merged and quantized."""
    unpacks = recipe.model.quantization != "none"
    merged = [_Model(learned=True)] * recipe.merge.write
    found = [_Model(learned=False)] * (1 + recipe.model.requantizes)
    found += [_Model(learned=True, unpacks=unpacks, golden=True), *merged, _Model(learned=True, golden=True)]
    return found + [*merged, _Model(learned=True)] * recipe.evaluate.compare_merges


def _seconds_of(model: _Model, recipe: Recipe, shapes: ModelShapes, work: Workload, machine: Machine) -> float:
    section, rows = recipe.evaluate, work.evaluation
    seconds = BYTES[recipe.model.dtype] * shapes.total / STORAGE_RATE
    seconds += _pass_seconds(rows.tokens + work.eval_compared_tokens, rows.longest, shapes, machine)
    if section.general is not None:
        seconds += _pass_seconds(section.general_tokens, GENERAL_LENGTH, shapes, machine)
    passes = math.ceil(work.eval_rows / section.batch_size)
    for each in _generations(model, recipe, work):
        step = _step_seconds(each.rows, rows.longest, BYTES[recipe.model.dtype], shapes, machine)
        seconds += _pass_seconds(each.prompt_tokens, rows.longest, shapes, machine) + each.batches * each.steps * step
        passes += each.batches * each.steps
    return seconds + passes * model.unpacks * _unpacking_seconds(shapes, machine)


def _generations(model: _Model, recipe: Recipe, work: Workload) -> list[_Generation]:
    """What a model is asked: rows that have an answer, and golden prompts."""
    section, asked, found = recipe.evaluate, work.eval_asked, []
    if section.generate and asked.rows:
        batches = math.ceil(asked.rows / section.batch_size)
        steps = min(section.max_new_tokens, asked.longest_answer) if model.learned else section.max_new_tokens
        found.append(_Generation(asked.prompt_tokens, asked.rows / batches, steps, batches))
    golden = min(section.golden, work.eval_rows)
    if model.golden and golden:
        batches = math.ceil(golden / section.batch_size)
        steps = min(section.golden_tokens, asked.longest_answer or section.golden_tokens)
        tokens = golden * asked.prompt_tokens / max(1, asked.rows)
        found.append(_Generation(tokens, golden / batches, steps, batches))
    return found


def _pass_seconds(tokens: float, longest: int, shapes: ModelShapes, machine: Machine) -> float:
    return _known(machine.seconds(tokens * forward_flops(shapes, longest), SCORING))


def _step_seconds(rows: float, length: int, itemsize: int, shapes: ModelShapes, machine: Machine) -> float:
    """A token more of each of these rows."""
    read = itemsize * (shapes.active + shapes.head)
    reading = FLOPS_PER_BYTE * read / machine.peak if machine.peak else read / (READ_RATE * machine.cores)
    return shapes.layers * LAYER_STEP_SECONDS + reading + _pass_seconds(rows, length, shapes, machine)


def _unpacking_seconds(shapes: ModelShapes, machine: Machine) -> float:
    """All that is quantized, once."""
    rate = UNPACK_RATE["cuda"] if machine.on_gpu else UNPACK_RATE["cpu"] * machine.cores
    return shapes.quantized / rate


def _known(seconds: float | None) -> float:
    assert seconds is not None
    return seconds
