"""What estimates are made of: machines with the rates they are assumed to reach, the work of a recipe, and its cost.

All sizes are bytes, all counts are tokens or parameters. Rates are assumptions, each with the measurement it is from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sized
from dataclasses import dataclass

from qlora.models.shapes import ModelShapes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FRAGMENTATION = 1.05  # what an allocator holds beyond the tensors that are live
CUDA_CONTEXT = 500 * 10**6
PROCESS = 1_200 * 10**6  # Python with torch, transformers, TRL and bitsandbytes loaded, on the host
STORAGE_RATE = 1e9  # bytes/s read and written

# Dense bf16 peak in TFLOP/s by part of the device's name (makers' data sheets).
PEAK_TFLOPS = {
    "A10": 125, "A100": 312, "A6000": 155, "B200": 2250, "H100": 989, "H100 PCIe": 756, "H200": 989, "L4": 121,
    "L40S": 362, "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 209,
}  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """How much of a machine a kind of work uses."""

    share_of_peak: float
    """Of a GPU's dense bf16 peak."""
    per_core: float
    """FLOP/s of a CPU's core."""


# NF4 with LoRA, 8B and 8,192 tokens a forward: TRL and PEFT on an H100, and the fused path; small models far less. A
# 135M model about 150 tokens/s on two AVX-512 cores.
TRAINING, FUSED_TRAINING = Rate(0.35, 60e9), Rate(0.56, 60e9)
# Forwards of one layer in 16 bits in large batches, and sums of x·xᵀ.
STREAMING = Rate(0.5, 144e9)
# Refinement with nothing computed again; assumed. On a CPU with bf16 products.
REFINING = Rate(0.6, 144e9)


@dataclass(frozen=True)
class Machine:
    """Where the recipe would run."""

    device: str
    name: str
    cores: int
    peak: float | None
    """FLOP/s of dense bf16 products; None on a CPU, and for a GPU that is not known."""
    rate_note: str

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def seconds(self, flops: float, rate: Rate) -> float | None:
        """Time of so many FLOPs of work of this kind; None where the peak is not known."""
        if not self.on_gpu:
            return flops / (rate.per_core * self.cores)
        return None if self.peak is None else flops / (rate.share_of_peak * self.peak)


@dataclass(frozen=True)
class Rows:
    """Rows of tokens that a model reads."""

    tokens: int
    longest: int

    @classmethod
    def of(cls, rows: Iterable[Sized]) -> Rows:
        """Counts of rows of token ids; zero of no rows."""
        lengths = [len(row) for row in rows]
        return cls(sum(lengths), max(lengths, default=0))


@dataclass(frozen=True)
class Asked:
    """Held-out rows that have an answer, which models can be asked for."""

    rows: int = 0
    prompt_tokens: int = 0
    longest_answer: int = 0
    """Tokens of it, with the one that ends it."""


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of training."""

    tokens: int
    """Positions, padding included."""
    recomputed: int
    """Decoder layers whose activations are computed again in the backward."""
    offloaded: bool = False
    """Whether the inputs of those layers wait in host memory, where token embeddings are too."""
    dense: int = 0
    """Decoder layers whose quantized weights are kept in 16 bits too, and not dequantized again in every pass."""
    accumulated: bool = False
    """Whether gradients of passes before it, of the same step, are there from its beginning."""


@dataclass(frozen=True)
class Workload:
    """How many tokens the recipe processes, from its rendered rows."""

    train_tokens: int
    """Tokens of all optimizer steps."""
    train_sequence: float
    """Mean tokens per sequence in training."""
    largest_pass: Pass
    """The largest forward and backward pass of training."""
    calibration: Rows
    refinement: Rows | None
    """None where the recipe does not refine."""
    evaluation: Rows
    eval_answer_tokens: int
    eval_longest_answer: int
    eval_rows: int = 0
    eval_asked: Asked = Asked()
    eval_compared_tokens: int = 0
    """Of answers that are compared or judged, with their prompts, which are read beside the rows."""


@dataclass(frozen=True)
class StageEstimate:
    """What a stage needs at its peak. `device` is the compute device's memory (the host's, when it computes)."""

    stage: str
    device: int
    host: int
    disk: int
    seconds: float | None
    """None where nothing is known to compute it from."""
    parts: dict[str, int]
    """What `device` consists of."""
    movable: int = 0
    """Bytes of it that may be in host memory instead, on a GPU, which takes longer."""


def assumed_machine(device: str, name: str, cores: int) -> Machine:
    """The rate a device is assumed to reach, and a sentence that says so."""
    if not device.startswith("cuda"):
        slowest, fastest = (rate.per_core * cores / 1e9 for rate in (TRAINING, STREAMING))
        note = f"{slowest:.0f} (training) to {fastest:.0f} GFLOP/s assumed on {cores} cores"
        return Machine(device, name, cores, None, note)
    known = max((key for key in PEAK_TFLOPS if key in name), key=len, default=None)
    if known is None:
        return Machine(device, name, cores, None, f"no peak known for {name}, so no times")
    shares = f"{TRAINING.share_of_peak:.0%} (TRL's training) to {REFINING.share_of_peak:.0%}"
    note = f"{shares} of {PEAK_TFLOPS[known]} TFLOP/s assumed; small models reach less"
    return Machine(device, name, cores, PEAK_TFLOPS[known] * 1e12, note)


def machine_of(device: str) -> Machine:
    """This machine, or the GPU of it that is named."""
    import torch

    if device.startswith("cuda"):
        return assumed_machine(device, torch.cuda.get_device_name(device), os.cpu_count() or 1)
    return assumed_machine(device, "CPU", torch.get_num_threads())


def layer_activation_bytes(shapes: ModelShapes, itemsize: int) -> int:
    """What one decoder layer saves per token for its backward pass (eager norms, rotary embedding and gating)."""
    query, value = shapes.attention_heads * shapes.head_dim, shapes.key_value_heads * shapes.head_dim
    return itemsize * (12 * shapes.hidden_size + 3 * query + value + 3 * shapes.feed_forward_size)


def layer_forward_bytes(shapes: ModelShapes, itemsize: int) -> int:
    """What one decoder layer holds per token while it runs without gradients."""
    return itemsize * (4 * shapes.hidden_size + 3 * shapes.feed_forward_size)


def stage_estimate(
    stage: str,
    machine: Machine,
    parts: dict[str, int],
    *,
    host: int,
    disk: int,
    seconds: float | None,
    movable: int = 0,
) -> StageEstimate:
    """Adds the process and the allocator's slack; on a CPU the host's part belongs to the same memory."""
    if machine.on_gpu:
        device = {"CUDA context": CUDA_CONTEXT, **parts}
        return StageEstimate(stage, _with_slack(device), PROCESS + host, disk, seconds, device, movable)
    device = {"process": PROCESS, **parts, **({"on the host": host} if host else {})}
    total = _with_slack(device)
    return StageEstimate(stage, total, total, disk, seconds, device)


def _with_slack(parts: dict[str, int]) -> int:
    return round(FRAGMENTATION * sum(parts.values()))
