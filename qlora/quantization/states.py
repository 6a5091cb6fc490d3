"""The hidden states of all calibration rows between two decoder layers, and the forwards that take them on.

Device memory holds a bounded part of them, whatever the number of rows. The rest lives in pinned host memory, and each
batch is copied while the one before it computes.

Shapes: B rows, T tokens of the longest row, D width of the hidden states, K inputs of a linear.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlora.errors import UserError
from qlora.quantization.calibration import Batch, LayerCall, LayerInputs, record_layer_inputs
from qlora.quantization.skeleton import Skeleton

# What stays on the GPU of the hidden states of one model, and of the outputs of one replayed module.
HIDDEN_STATES_ON_DEVICE_BYTES = 3 * 2**29
REPLAYED_ON_DEVICE_BYTES = 2**29
BATCHES_AHEAD = 2


class BatchTensors:
    """One tensor per batch: on the device up to a number of bytes, the others in pinned host memory."""

    def __init__(self, device: str, on_device_bytes: int) -> None:
        self.device = device
        self._left = on_device_bytes
        self._places: dict[int, torch.Tensor] = {}
        self._coming: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._copies = torch.cuda.Stream(device) if device != "cpu" else None

    def put(self, batch: int, tensor: torch.Tensor) -> None:
        """Keep a tensor of the device, which must not change any more; it replaces what was there, of its shape."""
        self._coming.pop(batch, None)  # what was fetched and never asked for is old now
        place = self._places.get(batch)
        if place is None and self._copies is not None:
            if tensor.nbytes > self._left:
                place = self._places[batch] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            else:
                self._left -= tensor.nbytes
        if self._copies is None or place is None or place.is_cuda:
            self._places[batch] = tensor
            return
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            place.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._copies)

    def prefetch(self, batch: int) -> None:
        """Begin to copy a tensor to the device."""
        place = self._places[batch]
        if self._copies is not None and not place.is_cuda and batch not in self._coming:
            with torch.cuda.stream(self._copies):
                self._coming[batch] = place.to(self.device, non_blocking=True), self._copies.record_event()

    def get(self, batch: int) -> torch.Tensor:
        """The tensor on the device."""
        self.prefetch(batch)
        if batch not in self._coming:
            return self._places[batch]
        tensor, copied = self._coming.pop(batch)
        torch.cuda.current_stream().wait_event(copied)
        tensor.record_stream(torch.cuda.current_stream())
        return tensor


class CalibrationStates:
    """What goes into the next layer, for every batch, and how to call the layers with it."""

    def __init__(self, batches: Sequence[Batch], inputs: Iterable[LayerInputs], device: str) -> None:
        """inputs: per batch, the hidden states on the device and one call per layer."""
        self.batches = batches
        self.device = device
        self.running = 0
        """The batch whose forward runs."""
        self._calls: list[Sequence[LayerCall]] = []
        self._hidden = BatchTensors(device, HIDDEN_STATES_ON_DEVICE_BYTES)
        self._replays: list[Replay] = []
        self._replayed: list[BatchTensors] = []
        for batch, item in enumerate(inputs):
            self._calls.append(item.calls)
            self._hidden.put(batch, item.hidden_BTD)

    def some(self, tokens: int) -> tuple[list[int], CalibrationStates]:
        """Every n-th batch, so that they hold about `tokens` tokens: their numbers, and a copy of their states."""
        every = max(1, sum(batch.tokens for batch in self.batches) // tokens)
        chosen = list(range(0, len(self.batches), every))
        inputs = (LayerInputs(self._hidden.get(batch).clone(), list(self._calls[batch])) for batch in chosen)
        return chosen, CalibrationStates([self.batches[batch] for batch in chosen], inputs, self.device)

    def hidden(self, batch: int) -> torch.Tensor:
        """[B, T, D] of one batch, on the device."""
        return self._hidden.get(batch)

    def on_device(self) -> Iterator[torch.Tensor]:
        """The hidden states of each batch in turn, on the device.

        The CPU may be a few batches ahead of the GPU and no more: memory in flight cannot be used again.
        """
        computed: deque[torch.cuda.Event] = deque()
        for batch in range(len(self.batches)):
            hidden = self._hidden.get(batch)
            if batch + 1 < len(self.batches):
                self._hidden.prefetch(batch + 1)
                for replay in self._replays:
                    replay.prefetch(batch + 1)
            yield hidden
            if self.device != "cpu":
                computed.append(torch.cuda.current_stream().record_event())
                if len(computed) > BATCHES_AHEAD:
                    computed.popleft().synchronize()

    def store(self, batch: int, output: torch.Tensor) -> None:
        """Put a layer's output in the place of its input, for one batch."""
        self._hidden.put(batch, output)

    def run(self, layer: nn.Module, index: int, batch: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The output of decoder layer number `index` for one batch."""
        call = self._calls[batch][index]
        self.running = batch
        output = layer(hidden_BTD, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, layer: nn.Module, index: int) -> None:
        """Replace the hidden states by the layer's output. Raises UserError when it is not finite."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for batch, hidden in enumerate(self.on_device()):
            output = self.run(layer, index, batch, hidden)
            finite &= torch.isfinite(select_real(output, self.batches[batch]).sum(dtype=torch.float32))
            self.store(batch, output)
        if not bool(finite):
            raise UserError(
                f"the output of decoder layer {index} is not finite",
                fix="check the merged model with `qlora evaluate`; float16 overflows where bfloat16 does not",
            )

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """While inside, `replay` may be called for modules of one layer; their own forwards come back at the end."""
        try:
            yield
        finally:
            for replay in self._replays:
                replay.end()
            self._replays.clear()

    def replay(self, module: nn.Module) -> None:
        """From now on compute what this module of the layer makes of a batch once, and repeat it."""
        number = len(self._replays)
        if number == len(self._replayed):
            self._replayed.append(BatchTensors(self.device, REPLAYED_ON_DEVICE_BYTES))
        self._replays.append(Replay(module, self, self._replayed[number]))


class Replay:
    """Stands in for the forward of a module whose weights and inputs no longer change.

    Outputs other than a tensor, alone or before nothing but None in a tuple, are computed every time.
    """

    def __init__(self, module: nn.Module, states: CalibrationStates, outputs: BatchTensors) -> None:
        self._module = module
        self._replaced = vars(module).get("forward")
        self._forward = module.forward
        self._states = states
        self._outputs = outputs
        self._known: dict[int, tuple[None, ...] | None] = {}
        """Batch → what stands behind the tensor in the tuple; None where it stands alone."""
        module.forward = self._call

    def prefetch(self, batch: int) -> None:
        if batch in self._known:
            self._outputs.prefetch(batch)

    def end(self) -> None:
        """Give the module its own forward back."""
        if self._replaced is None:
            del self._module.forward
        else:
            self._module.forward = self._replaced

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._states.running
        if batch not in self._known:
            output = self._forward(*args, **kwargs)
            first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            if not isinstance(first, torch.Tensor) or any(item is not None for item in rest or ()):
                return output
            self._known[batch] = rest
            self._outputs.put(batch, first)
        # A copy: some models add to what they get in place.
        first, rest = self._outputs.get(batch).clone(), self._known[batch]
        return first if rest is None else (first, *rest)


def enter_model(skeleton: Skeleton, batches: Sequence[Batch], device: str) -> CalibrationStates:
    """The states before the first decoder layer."""
    with skeleton.filled_entrance(device) as decoder:
        return CalibrationStates(batches, record_layer_inputs(decoder, skeleton.layers, batches, device), device)


def select_real(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[tokens, K] of an activation [B, T, K] or [B·T, K]: padding left out."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if batch.real is None else flat.index_select(0, batch.real)
