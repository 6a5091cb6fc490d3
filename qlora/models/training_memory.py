"""Memory of a training step by formula, and the division into forwards that trains fastest in the memory there is.

A step holds the base, the adapter with Adam's moments, and activations: of every layer what its backward needs, or,
where that is computed again, its input alone. As the backward goes down, activations make way for gradients. The first
layers are the ones computed again: by the time it comes to them, what all others kept is gone. So the peak is at the
output head, where it comes to the layers computed again, or at its end:

    static + max(c·m·h + (L − c)·m·S + max(head, work),
                 c·m·h + m·S + work + (L − c)·G     if c > 0,
                 m·h + m·S + work + (L − 1)·G)

m: tokens of a forward, c of L layers computed again, h: bytes of a hidden state, S: of what a layer keeps per token,
G: of a layer's gradients, which are all there throughout if forwards came before in the step. Where processes share the
4-bit weights, static has a part of them and two layers that are whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from qlora.kernels.low_rank import MOST_RANK_BYTES
from qlora.models.resources import (
    BYTES,
    CUDA_CONTEXT,
    FRAGMENTATION,
    FUSED_TRAINING,
    PROCESS,
    TRAINING,
    Machine,
    Pass,
    Rate,
    layer_activation_bytes,
)
from qlora.models.shapes import AdapterShapes, ModelShapes, training_flops
from qlora.recipe import Recipe

FOUR_BIT_BYTES = 0.5 + 4 / 64  # codes, and an fp32 absmax per block
DOUBLE_QUANT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # the absmax in 8 bits, with an fp32 scale per 256 of them
EIGHT_BIT_ROW_BYTES = 4  # an fp32 scale for each output, beside a byte a weight
HEAD_TILE = (4096, 32768)  # tokens × vocabulary of TRL's fused output head
FUSED_HEAD_BYTES = 2**29  # logits of our own at a time
# Weights/s that are dequantized, once in every forward, backward and recomputation.
DEQUANTIZE_RATE = {"cuda": 1e12, "cpu": 1e9}
# Bytes/s in which a device gets what other processes have of a layer, beside what it computes; assumed: PCIe 4.0 x16.
GATHER_RATE = {"cuda": 2e10, "cpu": 2e9}
# Seconds of a forward and backward pass that do not depend on its tokens, per layer: kernels that begin and end.
PASS_SECONDS = {"cuda": 3e-4, "cpu": 1e-3}
# Seconds per layer in which Python launches the kernels of a pass, while others run; where it was not measured.
LAUNCH_SECONDS = 2e-3
# Inputs of layers that are on the device at a time, of those that wait in host memory.
OFFLOADED_ON_DEVICE = 3
WORKSPACES = 2 * 2**25  # of cuBLAS, for the thread of the forward and that of the backward
OFFLOADING_SLOWER = 1.05  # copies beside the computation take some of the memory's bandwidth
UNKNOWN_PEAK = 100e12  # of a GPU that is not known


@dataclass(frozen=True)
class Probe:
    """What one decoder layer was found to take."""

    kept_bytes: float
    """Per token, for its backward."""
    launch_seconds: float | None
    """Of a host that launches its forward and backward; None on a CPU."""


@dataclass(frozen=True)
class Trained:
    """What is trained, on what; all that the formulas need."""

    recipe: Recipe
    shapes: ModelShapes
    adapter: AdapterShapes
    machine: Machine
    sequence: float
    """Mean tokens that a token's row has."""
    measured: Probe | None = None
    """By formula where there is none."""
    records: bool = False
    """Whether passes can be recorded as CUDA graphs, which are launched in no time."""
    shards: int = 1
    """Processes that share the 4-bit weights."""

    @property
    def fused(self) -> bool:
        """Whether layers train on the fused path, and keep less. It does not take int8."""
        on_gpu = self.machine.on_gpu and self.recipe.train.kernels == "auto"
        return on_gpu and self.recipe.model.quantization != "int8"

    @property
    def rate(self) -> Rate:
        return FUSED_TRAINING if self.fused else TRAINING

    @property
    def itemsize(self) -> int:
        return BYTES[self.recipe.model.dtype]

    @property
    def quantized(self) -> int:
        """Weights that are dequantized in every pass."""
        return 0 if self.recipe.model.quantization == "none" else self.shapes.quantized

    def passes(self, tokens: int) -> Iterator[Pass]:
        """Ways to take so many tokens, of which each next one needs less memory."""
        layers = self.shapes.layers
        counts = {None: range(layers + 1), False: range(1), True: range(layers, layers + 1)}
        found = Pass(tokens, 0)
        for count in counts[self.recipe.train.gradient_checkpointing]:
            found = Pass(tokens, count)
            yield found
        if self.machine.on_gpu and found.recomputed:
            yield replace(found, offloaded=True)

    def with_dense(self, one: Pass, budget: int) -> Pass:
        """The same with as many layers' weights in 16 bits too as the budget has room for."""
        if not self.fused or not self.quantized or self.shards > 1:
            return one
        layers = self.shapes.layers
        every = replace(one, dense=layers)
        if self.peak(every) <= budget:
            return every
        each = FRAGMENTATION * self.itemsize * self.quantized / layers
        return replace(one, dense=min(layers - 1, max(0, int((budget - self.peak(one)) / each))))

    def parts(self, one: Pass) -> dict[str, int]:
        """Bytes that are live on the device at the peak of training, by name, without the process itself."""
        shapes, itemsize = self.shapes, self.itemsize
        # In 8 bits a weight is also turned around, and comes to half of that.
        float8 = self.recipe.model.compute_dtype == "float8"
        dequantized = (2.5 if float8 else 1 if self.fused else 2) * itemsize
        dequantized = dequantized if self.quantized and one.dense < shapes.layers else 0
        on_host = itemsize * shapes.embeddings if one.offloaded and self.fused else 0
        copies = itemsize if self.fused else 0
        return {
            "base": base_bytes(self.recipe, shapes, self.shards) - on_host,
            "two layers that are gathered": 2 * self._packed_bytes // shapes.layers if self.shards > 1 else 0,
            "adapter and optimizer": (3 * BYTES[self.recipe.lora.dtype] + copies) * self.adapter.trainable,
            **self._at_peak(one),
            "workspaces of cuBLAS": WORKSPACES if self.machine.on_gpu else 0,
            "dequantized weights": round(dequantized * self._largest_dequantized),
            "weights in 16 bits too": itemsize * self.quantized * one.dense // shapes.layers,
        }

    @property
    def _largest_dequantized(self) -> int:
        """Weights of the largest linear; experts are in 16 bits."""
        return max((linear.parameters for linear in self.shapes.linears if linear.experts == 1), default=0)

    def _at_peak(self, one: Pass) -> dict[str, int]:
        return max(self._moments(one), key=lambda parts: sum(parts.values()))

    def _moments(self, one: Pass) -> Iterator[dict[str, int]]:
        """What of a backward is live at its beginning, where it comes to layers computed again, and at its end."""
        layers, each = self.shapes.layers, one.tokens * self.shapes.hidden_size * self.itemsize
        kept, work = round(self.kept_bytes * one.tokens), round(self.working_bytes * one.tokens)
        gradients = BYTES[self.recipe.lora.dtype] * self.adapter.trainable
        # CUDA graphs write gradients to the same place in every step.
        throughout = one.accumulated or self.recorded(one)

        def moment(layer: int, saved: int, working: int) -> dict[str, int]:
            """layer: how many are yet to come; saved: of how many all is there that their backward needs."""
            inputs = min(layer, one.recomputed, OFFLOADED_ON_DEVICE if one.offloaded else one.recomputed)
            return {
                "gradients": gradients if throughout else gradients * (layers - layer) // layers,
                "inputs of recomputed layers": inputs * each,
                "saved activations": saved * kept,
                "output head or backward": working,
            }

        yield moment(layers, layers - one.recomputed, max(self._head_bytes(one.tokens), work))
        if one.recomputed:
            yield moment(one.recomputed, 1, work)
        yield moment(1, 1, work)

    def peak(self, one: Pass) -> int:
        """Bytes of the device, with what the process itself takes and the allocator's slack."""
        process = CUDA_CONTEXT if self.machine.on_gpu else PROCESS
        return round(FRAGMENTATION * (process + sum(self.parts(one).values())))

    def seconds(self, one: Pass) -> float:
        """Of a pass; where the device's peak is not known, right up to a factor."""
        device = "cuda" if self.machine.on_gpu else "cpu"
        share = one.recomputed / self.shapes.layers
        packed = self.quantized * (1 - one.dense / self.shapes.layers)
        dequantizing = (2 + share) * packed / DEQUANTIZE_RATE[device]
        slower = OFFLOADING_SLOWER if one.offloaded else 1
        busy = slower * self._computing(one) + dequantizing + PASS_SECONDS[device] * self.shapes.layers
        gathering = 2 * (1 - 1 / self.shards) * self._packed_bytes / GATHER_RATE[device]  # forward and backward
        launched_alone = self.fused and not (self.records and not one.offloaded)
        return max(busy, gathering, self._launching(one) if launched_alone else 0.0)

    @property
    def _packed_bytes(self) -> int:
        return packed_bytes(self.recipe, self.shapes)

    def recorded(self, one: Pass) -> bool:
        """Whether such passes are recorded: where they can be, and a GPU is done with kernels before others come."""
        return self.records and self.fused and not one.offloaded and self._computing(one) < self._launching(one)

    def _launching(self, one: Pass) -> float:
        """Seconds in which a host launches a pass: of what is computed again, a third twice."""
        found = LAUNCH_SECONDS if self.measured is None else self.measured.launch_seconds or 0.0
        return found * (self.shapes.layers + one.recomputed / 3)

    def _computing(self, one: Pass) -> float:
        share = one.recomputed / self.shapes.layers
        flops = one.tokens * training_flops(self.shapes, self.adapter, self.sequence, recomputed=share)
        seconds = self.machine.seconds(flops, self.rate)
        return flops / (self.rate.share_of_peak * UNKNOWN_PEAK) if seconds is None else seconds

    @property
    def kept_bytes(self) -> float:
        """What a layer keeps per token for its backward."""
        if self.measured is not None:
            return self.measured.kept_bytes
        if not self.fused:
            return layer_activation_bytes(self.shapes, self.itemsize)
        shapes = self.shapes
        query, value = shapes.attention_heads * shapes.head_dim, shapes.key_value_heads * shapes.head_dim
        # The layer's input and its middle; rotated q and k, v, and what attention made of them; gate and up; ranks.
        elements = 2 * shapes.hidden_size + 2 * query + 2 * value + 2 * shapes.feed_forward_size
        elements += self.recipe.lora.r * len(shapes.linears) // shapes.layers
        return self.itemsize * elements + 4 * shapes.attention_heads

    @property
    def working_bytes(self) -> float:
        """What the backward of a feed-forward block holds per token, beside what was kept for it."""
        if not self.fused:
            return 0  # the plain path's layers are counted with all that they hold
        # Others take the place of what was kept.
        gradients = 1 if self.recipe.lora.r * self.itemsize <= MOST_RANK_BYTES else 4
        width, hidden = self.shapes.feed_forward_size, self.shapes.hidden_size
        # In 8 bits: one of them again, and a product that is yet to be added.
        again = width + self.itemsize * hidden if self.recipe.model.compute_dtype == "float8" else 0
        return self.itemsize * (gradients * width + 2 * hidden) + again

    def _head_bytes(self, tokens: int) -> int:
        hidden = self.itemsize * tokens * self.shapes.hidden_size
        if self.recipe.train.kernels == "auto":
            # The last layer's output, its norm, what of it predicts, and the gradient of that.
            return 4 * hidden + min(FUSED_HEAD_BYTES, self.itemsize * tokens * self.shapes.vocab_size)
        tile = min(tokens, HEAD_TILE[0]) * min(self.shapes.vocab_size, HEAD_TILE[1])
        return tile * (self.itemsize + 4) + 4 * tokens * self.shapes.hidden_size


@dataclass(frozen=True)
class Plan:
    """How a step's rows are divided."""

    forwards: int
    """Per step and process."""
    largest: Pass
    peak: int
    """Bytes by formula."""


def plan(trained: Trained, divisions: Iterable[tuple[int, int]], step_tokens: float, budget: int) -> Plan:
    """The division that takes the least time in `budget` bytes; where none fits, the one of the least memory.

    divisions: (forwards of a step, tokens of the longest) to choose from; step_tokens: mean tokens of a step, of one
    process. `train.gradient_checkpointing` says how many layers may be computed again.
    """
    fastest: tuple[float, Plan] | None = None
    smallest: Plan | None = None
    for forwards, tokens in divisions:
        for one in trained.passes(tokens):
            one = replace(one, accumulated=forwards > 1)
            found = Plan(forwards, one, trained.peak(one))
            smallest = min(smallest or found, found, key=lambda each: each.peak)
            if found.peak <= budget:
                largest = trained.with_dense(one, budget)
                seconds = forwards * trained.seconds(replace(largest, tokens=round(step_tokens / forwards)))
                if fastest is None or seconds < fastest[0]:
                    fastest = seconds, Plan(forwards, largest, trained.peak(largest))
                if not trained.fused or largest.dense == trained.shapes.layers:
                    break  # what needs less is slower
    assert smallest is not None, "there is a division"
    return fastest[1] if fastest else smallest


def base_bytes(recipe: Recipe, shapes: ModelShapes, shards: int = 1) -> int:
    """The frozen base as one of `shards` processes holds it that share its 4-bit weights."""
    rest = BYTES[recipe.model.dtype]
    if recipe.model.quantization == "none":
        return shapes.total * rest
    return packed_bytes(recipe, shapes) // shards + rest * shapes.unquantized


def packed_bytes(recipe: Recipe, shapes: ModelShapes) -> int:
    """All weights that are quantized, with their scales."""
    if recipe.model.quantization == "int8":
        return shapes.quantized + EIGHT_BIT_ROW_BYTES * shapes.quantized_rows
    if recipe.model.quantization == "checkpoint":
        assert shapes.packed_bytes is not None, "shapes are those of training"
        return shapes.packed_bytes
    return round((DOUBLE_QUANT_BYTES if recipe.model.double_quant else FOUR_BIT_BYTES) * shapes.quantized)
