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
from qlora.host_tensors import HostTensors
from qlora.quantization.calibration import Batch, LayerCall, LayerInputs, record_layer_inputs
from qlora.quantization.skeleton import Skeleton

# What stays on the GPU of the hidden states of one model, and of what is kept for one replayed part of a layer.
HIDDEN_STATES_ON_DEVICE_BYTES = 2**31
REPLAYED_ON_DEVICE_BYTES = 2**30
BATCHES_AHEAD = 2


class CalibrationStates:
    """What goes into the next layer, for every batch, and how to call the layers with it."""

    def __init__(
        self,
        batches: Sequence[Batch],
        inputs: Iterable[LayerInputs],
        device: str,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """inputs: per batch, the hidden states on the device and one call per layer."""
        self.batches = batches
        self.device = device
        self.numbers = list(range(len(batches)) if numbers is None else numbers)
        """Which of all batches these are, where they are some."""
        self.running = 0
        """The batch whose forward runs."""
        self._calls: list[Sequence[LayerCall]] = []
        self._hidden = HostTensors(device, HIDDEN_STATES_ON_DEVICE_BYTES)
        self._replays: list[Replay] = []
        self._replayed: list[HostTensors] = []
        for batch, item in enumerate(inputs):
            self._calls.append(item.calls)
            self._hidden.put(batch, item.hidden_BTD)

    def some(self, tokens: int) -> CalibrationStates:
        """A copy of every n-th batch's, so that they hold about `tokens` tokens."""
        every = max(1, sum(batch.tokens for batch in self.batches) // tokens)
        chosen = list(range(0, len(self.batches), every))
        inputs = (LayerInputs(self._hidden.get(batch).clone(), list(self._calls[batch])) for batch in chosen)
        return CalibrationStates([self.batches[batch] for batch in chosen], inputs, self.device, chosen)

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
        """While inside, parts of one layer may be replayed; their own forwards come back at the end."""
        try:
            yield
        finally:
            for replay in self._replays:
                replay.end()
            self._replays.clear()

    def replay(self, part: nn.Module, linear: nn.Module, behind: tuple[None, ...] | None) -> Replay:
        """A stand-in for this part of the layer, which returns the output of `linear`, in a tuple before `behind`."""
        number = len(self._replays)
        if number == len(self._replayed):
            self._replayed.append(HostTensors(self.device, REPLAYED_ON_DEVICE_BYTES))
        self._replays.append(Replay(part, linear, behind, self, self._replayed[number]))
        return self._replays[-1]


class Replay:
    """Stands in for the forward of a part of a layer that ends in a linear, once that linear's inputs are final.

    They are kept, and nothing before them is computed again; from the first replay on their place is the output's.
    """

    def __init__(
        self,
        part: nn.Module,
        linear: nn.Module,
        behind: tuple[None, ...] | None,
        states: CalibrationStates,
        kept: HostTensors,
    ) -> None:
        self._part, self._linear, self._behind = part, linear, behind
        self._replaced: Any = vars(part).get("forward")
        self._states = states
        self._kept = kept
        self._started = False
        self._replayed: set[int] = set()

    def keep(self, x: torch.Tensor) -> None:
        """Take the linear's input for the batch that runs; it must not change any more."""
        self._kept.put(self._states.running, x)

    def start(self) -> None:
        """From now on take the part's place. The input of every batch was kept."""
        self._started = True
        self._part.forward = self._call

    def prefetch(self, batch: int) -> None:
        if self._started:
            self._kept.prefetch(batch)

    def end(self) -> None:
        """Give the part its own forward back."""
        if self._started and self._replaced is None:
            del self._part.forward
        elif self._started:
            self._part.forward = self._replaced

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._states.running
        output = self._kept.get(batch)
        if batch not in self._replayed:
            output = self._linear(output)
            self._kept.put(batch, output)
            self._replayed.add(batch)
        return output if self._behind is None else (output, *self._behind)


def enter_model(skeleton: Skeleton, batches: Sequence[Batch], device: str) -> CalibrationStates:
    """The states before the first decoder layer."""
    with skeleton.filled_entrance(device) as decoder:
        return CalibrationStates(batches, record_layer_inputs(decoder, skeleton.layers, batches, device), device)


def select_real(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[tokens, K] of an activation [B, T, K] or [B·T, K]: padding left out."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if batch.real is None else flat.index_select(0, batch.real)
