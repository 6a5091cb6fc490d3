"""Memory, disk and time that each stage will take, by formula: estimates to plan with, not measurements.

Training memory is the sum of what is live at its peak: 4-bit weights (4 bits + an absmax per block of 64, itself in
8 bits with double quantization: 0.516 B per parameter, else 0.5625 B), everything else in the compute dtype, the
adapter with its gradient and Adam's two moments, saved activations, one layer's recomputation, the tiles of the output
head, and two dequantized weights. Time is floating-point work over an assumed rate (see `Machine`).

All sizes are bytes, all counts are tokens or parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora.models.shapes import AdapterShapes, ModelShapes, forward_flops, training_flops
from qlora.quantization.engine import batch_tokens
from qlora.quantization.walk import HIDDEN_STATES_ON_DEVICE_BYTES
from qlora.recipe import Recipe

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FOUR_BIT_BYTES = 0.5 + 4 / 64  # codes, and an fp32 absmax per block
DOUBLE_QUANT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # the absmax in 8 bits, with an fp32 scale per 256 of them
FRAGMENTATION = 1.05  # what an allocator holds beyond the tensors that are live
CUDA_CONTEXT = 500 * 10**6
PROCESS = 1_200 * 10**6  # Python with torch, transformers, TRL and bitsandbytes loaded, on the host
HEAD_TILE = (4096, 32768)  # tokens × vocabulary of TRL's fused output head
SCORING_CHUNK = 2048  # answer tokens whose fp32 log-probabilities evaluation holds at once, three copies of them

# Dense bf16 peak in TFLOP/s by part of the device's name (makers' data sheets).
PEAK_TFLOPS = {
    "A10": 125, "A100": 312, "A6000": 155, "B200": 2250, "H100": 989, "H100 PCIe": 756, "H200": 989, "L4": 121,
    "L40S": 362, "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 209,
}  # fmt: skip
SHARE_OF_PEAK = 0.35  # TRL with NF4 and PEFT reaches about this at 8B and 8,192 tokens a step; small models far less
CPU_FLOPS_PER_CORE = 60e9  # NF4 training of a 135M model: about 150 tokens/s on two AVX-512 cores
QUANTIZE_RATE = {"cuda": 1e9, "cpu": 12e6}  # parameters/s to 4-bit and back in the merge; per core on a CPU
STORAGE_RATE = 1e9  # bytes/s read and written
COLUMN_SECONDS = {"cuda": 100e-6, "cpu": 0.0}  # GPTQ visits columns one by one: on a GPU a dozen kernel launches each


@dataclass(frozen=True)
class Machine:
    """Where the recipe would run. `flops` is an assumed rate (FLOP/s), None for a GPU whose peak is not known."""

    device: str
    name: str
    cores: int
    flops: float | None
    rate_note: str

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Workload:
    """How many tokens the recipe processes, from its rendered rows."""

    train_tokens: int
    """Tokens of all optimizer steps."""
    train_sequence: float
    """Mean tokens per sequence in training."""
    micro_batch_tokens: int
    """Tokens of the largest forward pass in training, padding included."""
    calibration_tokens: int
    calibration_longest: int
    eval_tokens: int
    eval_answer_tokens: int
    eval_longest: int
    eval_longest_answer: int


@dataclass(frozen=True)
class StageEstimate:
    """What a stage needs at its peak. `device` is the compute device's memory (the host's, when it computes)."""

    stage: str
    device: int
    host: int
    disk: int
    seconds: float | None
    parts: dict[str, int]
    """What `device` consists of."""


def assumed_machine(device: str, name: str, cores: int) -> Machine:
    """The rate a device is assumed to reach, and a sentence that says so."""
    if not device.startswith("cuda"):
        rate = CPU_FLOPS_PER_CORE * cores
        return Machine(device, name, cores, rate, f"{rate / 1e9:.0f} GFLOP/s assumed on {cores} cores")
    known = max((key for key in PEAK_TFLOPS if key in name), key=len, default=None)
    if known is None:
        return Machine(device, name, cores, None, f"no peak known for {name}, so no times")
    rate = SHARE_OF_PEAK * PEAK_TFLOPS[known] * 1e12
    return Machine(
        device,
        name,
        cores,
        rate,
        f"{SHARE_OF_PEAK:.0%} of {PEAK_TFLOPS[known]} TFLOP/s assumed; small models reach less",
    )


def estimate_stages(
    recipe: Recipe, shapes: ModelShapes, adapter: AdapterShapes, work: Workload, machine: Machine
) -> list[StageEstimate]:
    """One estimate per stage, in order."""
    return [
        _train(recipe, shapes, adapter, work, machine),
        _merge(recipe, shapes, machine),
        _quantize(recipe, shapes, work, machine),
        _evaluate(recipe, shapes, work, machine),
    ]


def base_bytes(recipe: Recipe, shapes: ModelShapes) -> int:
    """The frozen base as training holds it."""
    rest = BYTES[recipe.model.compute_dtype]
    if recipe.model.quantization == "none":
        return shapes.total * rest
    per_parameter = DOUBLE_QUANT_BYTES if recipe.model.double_quant else FOUR_BIT_BYTES
    return round(per_parameter * shapes.quantized) + rest * shapes.unquantized


def layer_activation_bytes(shapes: ModelShapes, itemsize: int) -> int:
    """What one decoder layer saves per token for its backward pass (eager norms, rotary embedding and gating)."""
    query, value = shapes.attention_heads * shapes.head_dim, shapes.key_value_heads * shapes.head_dim
    return itemsize * (12 * shapes.hidden_size + 3 * query + value + 3 * shapes.feed_forward_size)


def layer_forward_bytes(shapes: ModelShapes, itemsize: int) -> int:
    """What one decoder layer holds per token while it runs without gradients."""
    return itemsize * (4 * shapes.hidden_size + 3 * shapes.feed_forward_size)


def training_parts(
    recipe: Recipe, shapes: ModelShapes, adapter: AdapterShapes, micro_batch_tokens: int
) -> dict[str, int]:
    """What is live on the device at the peak of training, by name, without the process itself.

    With checkpointing the peak is in the head, or in the first layer that is recomputed: whichever is larger.
    """
    itemsize = BYTES[recipe.model.compute_dtype]
    per_layer = layer_activation_bytes(shapes, itemsize) * micro_batch_tokens
    checkpointing = recipe.train.gradient_checkpointing
    checkpoints = shapes.layers * micro_batch_tokens * shapes.hidden_size * itemsize
    tile_tokens, tile_vocabulary = min(micro_batch_tokens, HEAD_TILE[0]), min(shapes.vocab_size, HEAD_TILE[1])
    head = tile_tokens * tile_vocabulary * (itemsize + 4) + 4 * micro_batch_tokens * shapes.hidden_size
    dequantized = 0 if recipe.model.quantization == "none" else 2 * itemsize
    return {
        "base": base_bytes(recipe, shapes),
        "adapter and optimizer": 4 * BYTES[recipe.lora.dtype] * adapter.trainable,
        "saved activations": checkpoints if checkpointing else shapes.layers * per_layer,
        "recomputed layer or output head": max(per_layer, head) if checkpointing else head,
        "dequantized weights": dequantized * max(linear.parameters for linear in shapes.linears),
    }


def gptq_disk_bytes(recipe: Recipe, shapes: ModelShapes) -> int:
    """Size of the GPTQ checkpoint: codes, fp16 scales, zero points and group index per linear, the rest as merged."""
    bits, group_size = recipe.quantize.bits, recipe.quantize.group_size
    packed = 0.0
    for linear in shapes.linears:
        groups = 1 if group_size == -1 else math.ceil(linear.in_features / group_size)
        packed += linear.parameters * bits / 8 + groups * linear.out_features * (2 + bits / 8) + 4 * linear.in_features
    return round(packed) + 2 * (shapes.total - sum(linear.parameters for linear in shapes.linears))


def merged_bytes(recipe: Recipe, shapes: ModelShapes) -> int:
    """Size of the merged checkpoint, if it is written: merged linears in merge.dtype, the rest in 16 bits."""
    if not recipe.merge.write:
        return 0
    return BYTES[recipe.merge.dtype] * shapes.quantized + 2 * shapes.unquantized


def _train(
    recipe: Recipe, shapes: ModelShapes, adapter: AdapterShapes, work: Workload, machine: Machine
) -> StageEstimate:
    parts = training_parts(recipe, shapes, adapter, work.micro_batch_tokens)
    per_token = training_flops(shapes, adapter, work.train_sequence, checkpointing=recipe.train.gradient_checkpointing)
    saved = adapter.trainable * BYTES[recipe.lora.dtype]
    return _estimate(
        "train",
        machine,
        parts,
        host=0,
        disk=saved + 2 * 3 * saved,  # the adapter, and two checkpoints with Adam's moments
        seconds=_seconds(work.train_tokens * per_token / recipe.train.processes, machine),
    )


def _merge(recipe: Recipe, shapes: ModelShapes, machine: Machine) -> StageEstimate:
    largest_linear = max(linear.parameters for linear in shapes.linears)
    copied = 2 * 2 * shapes.largest_tensor  # embeddings pass through in 16 bits
    size = merged_bytes(recipe, shapes)
    seconds = _merging_seconds(shapes, machine) + size / STORAGE_RATE
    parts = {"one linear in fp32, three times": 3 * 4 * largest_linear}
    return _estimate("merge", machine, parts, host=copied, disk=size, seconds=seconds)


def _merging_seconds(shapes: ModelShapes, machine: Machine) -> float:
    """Reading the 16-bit base once, and quantizing it again."""
    rate = QUANTIZE_RATE["cuda"] if machine.on_gpu else QUANTIZE_RATE["cpu"] * machine.cores
    return shapes.quantized / rate + 2 * shapes.total / STORAGE_RATE


def _quantize(recipe: Recipe, shapes: ModelShapes, work: Workload, machine: Machine) -> StageEstimate:
    widest = max(linear.in_features for linear in shapes.linears)
    largest = max(linear.parameters for linear in shapes.linears)
    itemsize = BYTES[recipe.model.compute_dtype]
    hidden_states = work.calibration_tokens * shapes.hidden_size * itemsize
    width = max(max(linear.in_features, linear.out_features) for linear in shapes.linears)
    batch = max(batch_tokens(machine.device, width), work.calibration_longest)
    on_device = machine.on_gpu and hidden_states <= HIDDEN_STATES_ON_DEVICE_BYTES
    parts = {
        "one layer": 4 * shapes.largest_layer,
        "Hessian and its factors": 3 * 4 * widest**2,
        "weights being solved": 3 * 4 * largest,
        "activations of a batch": layer_forward_bytes(shapes, itemsize) * min(batch, work.calibration_tokens),
        **({"hidden states": hidden_states} if on_device else {}),
    }
    forward = 2 * forward_flops(shapes, work.calibration_longest) * work.calibration_tokens
    hessians = sum(2.0 * linear.in_features**2 * linear.tokens_share for linear in shapes.linears)
    hessians *= work.calibration_tokens
    updates = sum(float(linear.parameters) * linear.in_features for linear in shapes.linears)
    compute = _seconds(forward + hessians + updates, machine)
    columns = sum(linear.in_features for linear in shapes.linears) * COLUMN_SECONDS["cuda" if machine.on_gpu else "cpu"]
    merging = 0.0 if recipe.merge.write else _merging_seconds(shapes, machine)
    # In host memory: this layer and the next, which is read meanwhile; hidden states that the GPU does not hold.
    layers = 2 * shapes.largest_layer * (BYTES[recipe.merge.dtype] if recipe.merge.write else 4)
    return _estimate(
        "quantize",
        machine,
        parts,
        host=layers + (0 if on_device else hidden_states),
        disk=gptq_disk_bytes(recipe, shapes),
        seconds=None if compute is None else compute + columns + merging,
    )


def _evaluate(recipe: Recipe, shapes: ModelShapes, work: Workload, machine: Machine) -> StageEstimate:
    itemsize = BYTES[recipe.model.compute_dtype]
    batch = recipe.evaluate.batch_size * work.eval_longest
    answers = recipe.evaluate.batch_size * work.eval_longest_answer
    parts = {
        "model in 16 bits": itemsize * shapes.total,
        "logits": (batch + answers) * shapes.vocab_size * itemsize,
        "log-probabilities": 3 * 4 * min(answers, SCORING_CHUNK) * shapes.vocab_size,
        "activations": layer_forward_bytes(shapes, itemsize) * batch,
    }
    models = 3 + (recipe.model.quantization != "none") + recipe.merge.write  # base, trained, GPTQ; NF4; merged
    return _estimate(
        "evaluate",
        machine,
        parts,
        host=0,
        disk=2 * work.eval_answer_tokens * shapes.vocab_size,  # the trained model's log-probabilities in fp16
        seconds=_seconds(models * forward_flops(shapes, work.eval_longest) * work.eval_tokens, machine),
    )


def _estimate(
    stage: str, machine: Machine, parts: dict[str, int], *, host: int, disk: int, seconds: float | None
) -> StageEstimate:
    """Adds the process and the allocator's slack; on a CPU the host's part belongs to the same memory."""
    if machine.on_gpu:
        device = {"CUDA context": CUDA_CONTEXT, **parts}
        return StageEstimate(stage, _with_slack(device), PROCESS + host, disk, seconds, device)
    device = {"process": PROCESS, **parts, **({"on the host": host} if host else {})}
    total = _with_slack(device)
    return StageEstimate(stage, total, total, disk, seconds, device)


def _with_slack(parts: dict[str, int]) -> int:
    return round(FRAGMENTATION * sum(parts.values()))


def _seconds(flops: float, machine: Machine) -> float | None:
    return None if machine.flops is None else flops / machine.flops
