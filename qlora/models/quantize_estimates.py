"""Memory, disk and time of GPTQ and of refinement, by formula.

GPTQ walks from layer to layer, so its memory is that of one layer at its peak: the layer, the statistics of the inputs
that are calibrated together (K×K in fp32 each), one more of the one that is solved, four times the weights that read
it, one batch, and hidden states, of which a GPU holds so much and no more. With T calibration tokens, K inputs and N
outputs of linears that share an input, and F FLOPs per token of a layer's linears and attention:

    forwards     1.45·F·T, since each input is calibrated behind quantized linears
    statistics   1.25·K²·T: 2·K²·T, of which symmetry saves 3/8 or so
    solving      a Cholesky factor, N·K² for the errors, and a step per column

Asymmetric calibration adds F·T for the full model, and for all inputs but those of experts 2·K²·T for a second sum,
with T the part of the calibration tokens that the full model sees; and 4·N·K² for what it changes.

The rates below are assumptions; with them, the times of a 7B shape on an H100 come within a tenth of those that
`scripts/bench/gptq.py` measured: of the second run in its process with asymmetric calibration, whose first took 31 s,
and of the first without (scripts/bench/results/gptq-llama-2-7b-h100*.json).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from qlora.models.module_rules import FUSED_MODULES
from qlora.models.resources import (
    BYTES,
    REFINING,
    STORAGE_RATE,
    STREAMING,
    Machine,
    StageEstimate,
    Workload,
    layer_activation_bytes,
    stage_estimate,
)
from qlora.models.shapes import LinearShape, ModelShapes
from qlora.quantization.engine import FULL_MODEL_TOKENS, batch_tokens
from qlora.quantization.refine import LOGITS_ELEMENTS
from qlora.quantization.settings import GPTQSettings
from qlora.quantization.states import HIDDEN_STATES_ON_DEVICE_BYTES, REPLAYED_ON_DEVICE_BYTES
from qlora.recipe import Recipe

# Linears under one parent that read one input, and are solved as one weight.
SHARED_INPUT = (*FUSED_MODULES.values(), ("w1", "w3"))
# Forwards of a quantized layer, one input after the other or all in one pass: up to each of its inputs and once more to
# its end, its attention only once. The full one goes to its end with the last of them, and computes nothing twice.
FORWARDS = {True: 1.45, False: 1.8}
STATISTICS_FLOPS = 1.25
SOLVER_COPIES = 4
ACTIVATION_COPIES = 4

# Solving on an H100; other GPUs in proportion to their peak. A Cholesky factor takes K²·9.1e-11 + K³·5.5e-15 s.
H100_PEAK = 989e12
CHOLESKY_SECONDS = (9.1e-11, 5.5e-15)
UPDATE_FLOPS = 80e12  # products of bf16 halves, and what of them is in fp32
COLUMN_SECONDS = 1e-6  # a step of the column kernel, whatever the GPU
PACKING_RATE = 4.1e9  # weights/s; with choosing grids and reordering
STARTING_SECONDS = 5.0  # on a GPU: its libraries and kernels are loaded, the first layer is read, the last one written
CPU_SOLVING_RATE = 4e6  # weights/s and core

SCALE_BYTES = 16  # in refinement: its change, the gradient and Adam's two moments, in fp32
REFINE_FLOPS = 8  # per parameter and token: forward, both gradients, and dequantizing or computing again
LOGITS_COPIES = 5


@dataclass(frozen=True)
class SolvedTogether:
    """Linears of a decoder layer that share an input and settings."""

    layer: str
    stage: str
    """Equal for what is calibrated in one pass: like linears of all experts."""
    linears: tuple[LinearShape, ...]

    @property
    def inputs(self) -> int:
        return self.linears[0].in_features

    @property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears)

    @property
    def routed(self) -> bool:
        """Whether they belong to an expert, for which there is no asymmetric calibration."""
        return self.linears[0].experts > 1

    @property
    def tokens_share(self) -> float:
        """Share of the calibration tokens that reach them."""
        return self.linears[0].tokens_share


def quantized_linears(recipe: Recipe, shapes: ModelShapes) -> list[tuple[LinearShape, GPTQSettings]]:
    """What is quantized, with the settings of each. Raises UserError for rules that do not fit these linears."""
    settings = GPTQSettings.from_recipe(recipe.quantize)
    settings.check_modules([linear.name for linear in shapes.linears])
    chosen = ((linear, settings.for_module(linear.name)) for linear in shapes.linears)
    return [(linear, own) for linear, own in chosen if own is not None]


def gptq_disk_bytes(recipe: Recipe, shapes: ModelShapes) -> int:
    """Size of the GPTQ checkpoint: codes, fp16 scales, zero points and group index per linear, the rest as merged."""
    linears = quantized_linears(recipe, shapes)
    index = sum(4 * linear.in_features for linear, _ in linears)
    return _packed_bytes(linears) + index + 2 * (shapes.total - _parameters(linear for linear, _ in linears))


def estimate_quantize(
    recipe: Recipe, shapes: ModelShapes, work: Workload, machine: Machine, *, merging_seconds: float
) -> StageEstimate:
    """GPTQ. `merging_seconds` is what merging takes on the way; no time is known for another engine than our own."""
    linears = quantized_linears(recipe, shapes)
    together = solved_together(linears)
    itemsize = BYTES[recipe.merge.dtype]
    asymmetric = recipe.quantize.asymmetric_calibration > 0
    calibration, models = work.calibration, 1 + asymmetric
    token_bytes = shapes.hidden_size * itemsize
    own, of_full = (
        calibration.tokens * token_bytes,
        min(calibration.tokens, FULL_MODEL_TOKENS) * token_bytes * asymmetric,
    )
    # Of both models, what attention's last projection gets is kept while the rest of a layer is quantized.
    hidden_states = 2 * (own + of_full)
    limits = (HIDDEN_STATES_ON_DEVICE_BYTES, REPLAYED_ON_DEVICE_BYTES)
    kept = sum(min(size, limit) for size in (own, of_full) for limit in limits) if machine.on_gpu else 0
    width = max(max(linear.in_features, linear.out_features) for linear in shapes.linears)
    batch = min(max(batch_tokens(machine.device, width), calibration.longest), calibration.tokens)
    sums = _statistics_elements(together, one_by_one=recipe.quantize.true_sequential, asymmetric=asymmetric)
    # One input after the other is solved: what counts is the one that needs most.
    factors = {group: _factors(group, asymmetric=asymmetric) for group in together}
    worst = max(together, key=lambda group: sums[group] + factors[group] + SOLVER_COPIES * group.parameters)
    parts = {
        "one layer": models * itemsize * shapes.largest_layer,
        "statistics of inputs": 4 * sums[worst],
        "Hessian and its factors": 4 * factors[worst],
        "weights being solved": 4 * SOLVER_COPIES * worst.parameters,
        "activations of a batch": ACTIVATION_COPIES * itemsize * batch * shapes.feed_forward_size,
        **({"hidden states": kept} if machine.on_gpu else {}),
    }
    disk = gptq_disk_bytes(recipe, shapes)
    # In host memory: this layer and the next, which is read meanwhile; hidden states that the GPU does not hold.
    layers = 2 * shapes.largest_layer * (itemsize if recipe.merge.write else 4)
    seconds = None
    if recipe.quantize.engine == "native":
        computing = _quantize_seconds(recipe, shapes, together, work, machine)
        # The next layer is read, and the last one written, while one computes.
        moving = (itemsize * shapes.total + disk) / STORAGE_RATE
        seconds = None if computing is None else max(computing, moving) + merging_seconds
    return stage_estimate("quantize", machine, parts, host=layers + hidden_states - kept, disk=disk, seconds=seconds)


def estimate_refine(recipe: Recipe, shapes: ModelShapes, work: Workload, machine: Machine) -> StageEstimate:
    """Tuning scales and norms after GPTQ, with layers recomputed in the backward; it saves what fits instead."""
    section, rows = recipe.quantize.refine, work.refinement
    assert section is not None and rows is not None, "the recipe refines"
    linears = quantized_linears(recipe, shapes)
    itemsize = BYTES[recipe.merge.dtype]
    learned = round((1 - section.held_out) * rows.tokens)
    step_tokens = min(max(section.tokens_per_step, rows.longest), learned)
    scales = sum(_groups(linear, settings) * linear.out_features for linear, settings in linears)
    checkpoints = shapes.layers * shapes.hidden_size * itemsize
    logits = min(LOGITS_ELEMENTS["cuda" if machine.on_gpu else "cpu"], step_tokens * shapes.vocab_size)
    parts = {
        "packed weights": _packed_bytes(linears),
        "scales in training": SCALE_BYTES * scales,
        "embeddings, head and norms": itemsize * (shapes.total - _parameters(linear for linear, _ in linears)),
        "saved activations": (checkpoints + layer_activation_bytes(shapes, itemsize)) * step_tokens,
        "logits": LOGITS_COPIES * 4 * logits,
        "dequantized weights": 3 * itemsize * max(linear.parameters for linear, _ in linears),
    }
    teacher_states = rows.tokens * shapes.hidden_size * itemsize
    layers = 2 * shapes.largest_layer * (itemsize if recipe.merge.write else 4)
    teaching = machine.seconds(layers_flops(shapes, rows.longest) * rows.tokens, STREAMING)
    multiplied = shapes.active + shapes.head
    # The rows held back are looked at before and after, each time at about half the cost of a step.
    learning = section.steps * step_tokens + (rows.tokens - learned)
    training = machine.seconds(REFINE_FLOPS * multiplied * learning, REFINING)
    seconds = None
    if teaching is not None and training is not None:
        reading = itemsize * shapes.total / STORAGE_RATE
        seconds = max(teaching, reading) + training
    return stage_estimate("refine", machine, parts, host=layers + teacher_states, disk=0, seconds=seconds)


def solved_together(linears: Iterable[tuple[LinearShape, GPTQSettings]]) -> list[SolvedTogether]:
    """Linears by the input they read, as far as their names tell."""
    groups: dict[tuple, list[LinearShape]] = {}
    for linear, settings in linears:
        parent, _, leaf = linear.name.rpartition(".")
        first = next((parts[0] for parts in SHARED_INPUT if leaf in parts), leaf)
        alike = (settings.bits, settings.group_size, settings.sym)
        groups.setdefault((f"{parent}.{first}", alike), []).append(linear)
    found = []
    for (name, _), members in groups.items():
        layer = re.match(r"(.*?\.)?\d+\.", name)
        assert layer is not None, "a linear of a decoder layer has the layer's number in its name"
        stage = layer[0] + re.sub(r"\.\d+\.", ".*.", name[layer.end() :])
        found.append(SolvedTogether(layer[0], stage, tuple(members)))
    return found


def layers_flops(shapes: ModelShapes, sequence: float) -> float:
    """FLOPs per token of one forward through the decoder layers, without the output head."""
    return 2.0 * shapes.active + shapes.attention_flops * sequence


def _quantize_seconds(
    recipe: Recipe, shapes: ModelShapes, together: list[SolvedTogether], work: Workload, machine: Machine
) -> float | None:
    section, tokens = recipe.quantize, work.calibration.tokens
    asymmetric = section.asymmetric_calibration > 0
    seen_by_full = min(tokens, FULL_MODEL_TOKENS) if asymmetric else 0
    forwards = FORWARDS[section.true_sequential] * tokens + seen_by_full
    flops = forwards * layers_flops(shapes, work.calibration.longest)
    for group in together:
        # How far inputs have drifted is a second sum, and not symmetric.
        drift = 0 if group.routed else 2 * seen_by_full
        flops += (STATISTICS_FLOPS * tokens + drift) * group.inputs**2 * group.tokens_share
    streaming = machine.seconds(flops, STREAMING)
    if streaming is None:
        return None
    if not machine.on_gpu:
        return streaming + _parameters(_all(together)) / (CPU_SOLVING_RATE * machine.cores)
    return STARTING_SECONDS + streaming + _solving_seconds(together, machine, asymmetric=asymmetric)


def _solving_seconds(together: list[SolvedTogether], machine: Machine, *, asymmetric: bool) -> float:
    """On a GPU whose peak is known."""
    assert machine.peak is not None
    square, cube = CHOLESKY_SECONDS
    factors = sum(square * group.inputs**2 + cube * group.inputs**3 for group in together)
    # Asymmetric: a product with the drift, and two triangular solves.
    products = sum(
        (5.0 if asymmetric and not group.routed else 1.0) * group.parameters * group.inputs for group in together
    )
    scaled = factors + products / UPDATE_FLOPS + _parameters(_all(together)) / PACKING_RATE
    columns = sum(group.inputs for group in together)
    return scaled * H100_PEAK / machine.peak + columns * COLUMN_SECONDS


def _statistics_elements(
    together: list[SolvedTogether], *, one_by_one: bool, asymmetric: bool
) -> dict[SolvedTogether, int]:
    """Elements of the K×K sums that exist while a group is solved: of one stage of its layer, or of all."""
    sums: dict[str, int] = {}
    keys = {group: group.stage if one_by_one else group.layer for group in together}
    for group, key in keys.items():
        sums[key] = sums.get(key, 0) + (2 if asymmetric and not group.routed else 1) * group.inputs**2
    return {group: sums[key] for group, key in keys.items()}


def _factors(group: SolvedTogether, *, asymmetric: bool) -> int:
    """Elements of what the solver makes beside the sums: a copy of the Hessian, which takes the place of a second sum
    where there is one, unless that is solved for itself."""
    narrow = group.parameters < group.inputs**2
    return 0 if asymmetric and narrow and not group.routed else group.inputs**2


def _packed_bytes(linears: Iterable[tuple[LinearShape, GPTQSettings]]) -> int:
    """Codes, fp16 scales and zero points."""
    packed = 0.0
    for linear, settings in linears:
        groups = _groups(linear, settings)
        packed += linear.parameters * settings.bits / 8 + groups * linear.out_features * (2 + settings.bits / 8)
    return round(packed)


def _groups(linear: LinearShape, settings: GPTQSettings) -> int:
    return 1 if settings.group_size == -1 else math.ceil(linear.in_features / settings.group_size)


def _all(together: Iterable[SolvedTogether]) -> list[LinearShape]:
    return [linear for group in together for linear in group.linears]


def _parameters(linears: Iterable[LinearShape]) -> int:
    return sum(linear.parameters for linear in linears)
