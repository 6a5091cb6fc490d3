"""One copy of the 4-bit base for all processes of a launch: each keeps a part of every layer, and has whole layers for
as long as they run.

What is frozen has no gradient and no optimizer, so that of FSDP (Zhao et al. 2023, arXiv:2304.11277, §3) the gathering
is left: before the forward of a decoder layer, and before its backward, processes give each other their parts of its
weights. These lie in two buffers that layers take turns in, and while one layer runs, the next one's are on their way.
Adapters, norms, embeddings and the head are whole on every process: gradients are averaged, and files written, as
without sharding.

FSDP2 itself is not used: what it puts in the place of a gathered weight is a plain parameter without the quantization
state that kernels need (torch.distributed.fsdp._fully_shard, 2.13), block scales stay whole, and with accelerate 1.15 a
whole base has to lie on each card first (`fsdp2_prepare_model` does not load 4-bit models in parts).

C: bytes of a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed, nn

from qlora.kernels.four_bit import GATHER
from qlora.models.patches import left_out_of_ddp
from qlora.quantization.modules import decoder_layers

# Bytes that codes and scales begin at multiples of: kernels read them in words.
ALIGNMENT = 256
SHARDING = "qlora_sharding"
"""Attribute of a causal language model that is sharded."""


@dataclass(frozen=True)
class _Part:
    """What a process keeps of the codes and the block scales of one weight, which lie one behind the other."""

    own_C: torch.Tensor
    """uint8."""
    shape: torch.Size
    """Of the packed codes."""
    codes: int
    """Bytes of them."""
    scales: int
    """Bytes of the block scales."""

    @property
    def behind_codes(self) -> int:
        return _aligned(self.codes)


class Sharding:
    """The shared base of one model. Every process does the same with it, in the same order."""

    def __init__(self, process: int, processes: int) -> None:
        self.process, self.processes = process, processes
        self._parts: dict[Any, _Part] = {}
        """By 4-bit linear."""
        self._layers: list[list[tuple[Any, torch.Tensor]]] = []
        """Of each layer: its 4-bit linears, and where their weights are gathered."""
        self._held: list[int | None] = [None, None]
        """Which layer each buffer has, or is about to have."""
        self._works: list[list[Any]] = [[], []]
        """What is on its way into each buffer."""
        self._last = -1
        """The layer that was needed last."""

    @torch.no_grad()
    def take(self, weight: Any) -> None:
        """Keep this process's part of a `Params4bit` that has just been quantized, and nothing else of it."""
        state = weight.quant_state
        codes, scales = (tensor.contiguous().view(torch.uint8).flatten() for tensor in (weight.data, state.absmax))
        size = _aligned(-(-(_aligned(len(codes)) + len(scales)) // self.processes))
        whole = codes.new_zeros(size * self.processes)
        whole[: len(codes)] = codes
        whole[_aligned(len(codes)) :][: len(scales)] = scales
        own_C = whole[self.process * size :][:size].clone()
        self._parts[weight.module] = _Part(own_C, weight.data.shape, len(codes), len(scales))
        weight.data, state.absmax = weight.data.new_empty(0, 1), state.absmax.new_empty(0)

    def install(self, model: Any) -> None:
        """Give the decoder layers of a model whose weights were taken their buffers, and gather what is not in one."""
        layers = decoder_layers(model)[1]
        inside = [[linear for linear in layer.modules() if linear in self._parts] for layer in layers]
        sizes = [sum(self._room(linear) for linear in linears) for linears in inside]
        device = next(iter(self._parts.values())).own_C.device
        buffers = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        for index, (layer, linears) in enumerate(zip(layers, inside, strict=True)):
            *rooms, _ = buffers[index % 2].split([*map(self._room, linears), max(sizes) - sizes[index]])
            self._layers.append([])
            for room, linear in zip(rooms, linears, strict=True):
                self._layers[-1].append((linear, room))
                self._look_into(room, linear)
                setattr(linear.weight, GATHER, partial(self.need, index))
            layer.register_forward_pre_hook(partial(self._before, index))
            layer.register_forward_hook(partial(self._after, index))
        within = {linear for linears in inside for linear in linears}
        for linear in (linear for linear in self._parts if linear not in within):
            room = torch.empty(self._room(linear), dtype=torch.uint8, device=device)
            distributed.all_gather_into_tensor(room, self._parts[linear].own_C)
            self._look_into(room, linear)
        setattr(model, SHARDING, self)

    def need(self, index: int) -> None:
        """Have the weights of a layer, and send for those of the one that comes next: its neighbour, up or down."""
        if index == self._last and not self._works[index % 2] and self._held[index % 2] == index:
            return
        self._send_for(index)
        self._wait(index % 2)
        following = index + 1 if index > self._last else index - 1
        if 0 <= following < len(self._layers):
            self._send_for(following)
        self._last = index

    def walk(self) -> None:
        """What another process does that looks at the weights of all layers, one after the other."""
        for index in range(len(self._layers)):
            self.need(index)

    def leave_out_of_ddp(self, model: nn.Module) -> None:
        """Tell DDP that the shared weights of a model are no copies: it would give all processes the first one's."""
        windows = {id(linear.weight) for linear in self._parts}
        left_out_of_ddp(model, [name for name, parameter in model.named_parameters() if id(parameter) in windows])

    def _room(self, linear: nn.Module) -> int:
        return len(self._parts[linear].own_C) * self.processes

    def _look_into(self, room: torch.Tensor, linear: Any) -> None:
        """Have a linear read its weight from where it is gathered."""
        part, weight = self._parts[linear], linear.weight
        weight.data = room[: part.codes].view(weight.data.dtype).view(part.shape)
        state = weight.quant_state
        state.absmax = room[part.behind_codes :][: part.scales].view(state.absmax.dtype)

    def _send_for(self, index: int) -> None:
        buffer = index % 2
        if self._held[buffer] == index:
            return
        self._wait(buffer)
        # On a GPU this begins behind all that was launched so far, which is what the layer before in this buffer had to
        # do, and runs beside what is launched from now on.
        for linear, room in self._layers[index]:
            if linear.weight.data_ptr() != room.data_ptr():  # accelerate moves models on CPUs, which copies
                self._look_into(room, linear)
            own_C = self._parts[linear].own_C
            self._works[buffer].append(distributed.all_gather_into_tensor(room, own_C, async_op=True))
        self._held[buffer] = index

    def _wait(self, buffer: int) -> None:
        for work in self._works[buffer]:
            work.wait()
        self._works[buffer] = []

    def _before(self, index: int, *_: Any) -> None:
        self.need(index)

    def _after(self, index: int, layer: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:  # called when its gradient is there: the layer's backward is next
            hidden.register_hook(partial(self._before, index))


def sharding_of(model: Any) -> Sharding | None:
    """How the base of a PEFT model is shared, if it is."""
    found: Sharding | None = getattr(model.get_base_model(), SHARDING, None)
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
