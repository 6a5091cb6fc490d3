"""Inside one decoder layer: which linears share an input and in which order, their statistics, and the layer's output.

Shapes: B rows, T tokens of the longest row, D width of the hidden states, K inputs of a linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qlora.errors import Problem, UserError
from qlora.quantization.calibration import Batch, LayerCall, LayerInputs, record_layer_inputs
from qlora.quantization.experts import Experts, routed_tokens
from qlora.quantization.hessian import InputStatistics
from qlora.quantization.modules import weight_shape
from qlora.quantization.skeleton import Skeleton

# Hidden states of the first batches stay on the GPU up to this size. The others live in pinned host memory, and each is
# copied while the one before it computes, so that the number of calibration rows does not decide what fits.
HIDDEN_STATES_ON_DEVICE_BYTES = 2**30


class CalibrationStates:
    """The hidden states of every batch between two layers, and how to call the layers with them.

    `calls` holds, per batch, one `LayerCall` per layer; `hidden_BTD`, per batch, what goes into the next layer.
    """

    def __init__(self, batches: Sequence[Batch], inputs: Iterable[LayerInputs], device: str) -> None:
        self.batches = batches
        self.device = device
        self.calls: list[Sequence[LayerCall]] = []
        self.hidden_BTD: list[torch.Tensor] = []
        self._on_device_bytes = 0
        self._copies = torch.cuda.Stream(device) if device != "cpu" else None
        for item in inputs:
            self.calls.append(item.calls)
            self.hidden_BTD.append(self._place(item.hidden_BTD))

    def _place(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if self.device == "cpu" or self._on_device_bytes + hidden_BTD.nbytes <= HIDDEN_STATES_ON_DEVICE_BYTES:
            self._on_device_bytes += hidden_BTD.nbytes
            return hidden_BTD
        return torch.empty(hidden_BTD.shape, dtype=hidden_BTD.dtype, pin_memory=True).copy_(hidden_BTD)

    def clone(self) -> CalibrationStates:
        """The same states, to be advanced by another model."""
        copies = (LayerInputs(h.clone(), list(c)) for h, c in zip(self.hidden_BTD, self.calls, strict=True))
        return CalibrationStates(self.batches, copies, self.device)

    def on_device(self) -> Iterator[torch.Tensor]:
        """The hidden states of each batch in turn, on the device."""
        ahead = self._fetch(0)
        for batch in range(len(self.batches)):
            hidden, copied = ahead
            if batch + 1 < len(self.batches):
                ahead = self._fetch(batch + 1)
            if copied is not None:
                torch.cuda.current_stream().wait_event(copied)
                hidden.record_stream(torch.cuda.current_stream())
            yield hidden

    def _fetch(self, batch: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        hidden = self.hidden_BTD[batch]
        if self._copies is None or hidden.is_cuda:
            return hidden, None
        with torch.cuda.stream(self._copies):
            return hidden.to(self.device, non_blocking=True), self._copies.record_event()

    def _store(self, batch: int, output: torch.Tensor) -> None:
        if self._copies is None or self.hidden_BTD[batch].is_cuda:
            self.hidden_BTD[batch] = output
            return
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            self.hidden_BTD[batch].copy_(output, non_blocking=True)
        output.record_stream(self._copies)

    def run(self, layer: nn.Module, index: int, batch: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The output of decoder layer number `index` for one batch."""
        call = self.calls[batch][index]
        output = layer(hidden_BTD, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, layer: nn.Module, index: int) -> None:
        """Replace the hidden states by the layer's output. Raises UserError when it is not finite."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for batch, hidden in enumerate(self.on_device()):
            output = self.run(layer, index, batch, hidden)
            finite &= torch.isfinite(select_real(output, self.batches[batch]).sum(dtype=torch.float32))
            self._store(batch, output)
        if self._copies is not None:
            self._copies.synchronize()
        if not bool(finite):
            raise UserError(
                f"the output of decoder layer {index} is not finite",
                fix="check the merged model with `qlora evaluate`; float16 overflows where bfloat16 does not",
            )


def enter_model(skeleton: Skeleton, batches: Sequence[Batch], device: str) -> CalibrationStates:
    """The states before the first decoder layer."""
    with skeleton.filled_entrance(device) as decoder:
        return CalibrationStates(batches, record_layer_inputs(decoder, skeleton.layers, batches, device), device)


def select_real(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[tokens, K] of an activation [B, T, K] or [B·T, K]: padding left out."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if batch.real is None else flat.index_select(0, batch.real)


@dataclass(frozen=True)
class InputGroup:
    """Linears of a decoder layer that have one input: q, k and v, or gate and up."""

    names: tuple[str, ...]

    @property
    def first(self) -> str:
        return self.names[0]


def input_groups(
    linears: Mapping[str, nn.Module], layer: nn.Module, states: CalibrationStates, index: int, *, sequential: bool
) -> tuple[list[list[InputGroup]], list[str]]:
    """The linears in groups with one input each, in stages in the order of a forward; and those that nothing reached.

    A stage is calibrated together, on what the quantized stages before it make of the calibration rows: one group, or
    the like groups of all experts; everything when not `sequential`. Found by watching forwards of the smallest batch
    first, and of others until every linear ran. Only experts may be reached by no token. Raises UserError when another
    linear runs never, or any runs twice.
    """
    groups: dict[str, InputGroup] = {}
    members: set[str] = set()
    routed = routed_tokens(layer)
    order = sorted(range(len(states.batches)), key=lambda batch: states.batches[batch].input_ids_BT.numel())
    hidden = states.hidden_BTD
    for batch in order:
        seen: list[tuple[str, torch.Tensor]] = []
        with _inputs_of(linears, lambda name, x, seen=seen: seen.append((name, x))):
            states.run(layer, index, batch, hidden[batch].to(states.device))
        calls = [name for name, _ in seen]
        problems = [
            Problem(f"runs {calls.count(name)} times in a forward of layer {index}; once is expected", name)
            for name in linears
            if calls.count(name) > 1 or (name not in calls and name not in routed)
        ]
        if problems:
            raise UserError(problems)
        found: dict[tuple, list[str]] = {}
        for name, x in seen:
            # `seen` keeps every input alive, so equal addresses mean the same data.
            found.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(name)
        for names in found.values():
            if names[0] not in members:
                groups[names[0]] = InputGroup(tuple(names))
                members.update(names)
        if members >= set(linears):
            break
    if not sequential:
        return [list(groups.values())], [name for name in linears if name not in members]
    stages: dict[str, list[InputGroup]] = {}
    for name, group in groups.items():
        stages.setdefault(re.sub(r"\d+", "*", name) if name in routed else name, []).append(group)
    return list(stages.values()), [name for name in linears if name not in members]


@dataclass(frozen=True)
class FullModel:
    """The model before quantization, walking beside the quantized one for asymmetric calibration."""

    layer: nn.Module
    linears: Mapping[str, nn.Module]
    states: CalibrationStates


def collect_statistics(
    linears: Mapping[str, nn.Module],
    stage: Sequence[InputGroup],
    layer: nn.Module,
    states: CalibrationStates,
    index: int,
    full: FullModel | None = None,
) -> list[InputStatistics]:
    """Statistics of the input of each group over all batches; each forward stops once the last group has its input."""
    first = {group.first: linears[group.first] for group in stage}
    routed = routed_tokens(layer)
    sums = {
        name: InputStatistics(weight_shape(module)[1], states.device, drift=full is not None)
        for name, module in first.items()
    }
    wanted = {name: full.linears[name] for name in first} if full is not None else {}
    hidden_of_full = full.states.on_device() if full is not None else iter(())
    for number, hidden in enumerate(states.on_device()):
        batch = states.batches[number]
        inputs_of_full = {}
        if full is not None:
            with _inputs_of(wanted, inputs_of_full.__setitem__, stop_after=len(wanted)):
                full.states.run(full.layer, index, number, next(hidden_of_full))

        def add(name: str, x: torch.Tensor, batch: Batch = batch, of_full: dict = inputs_of_full) -> None:
            x_TK, weight_T = _weighted_tokens(name, x, batch, routed.get(name))
            full_TK = select_real(of_full.pop(name), batch) if full is not None else None
            sums[name].add(x_TK, full_TK, weight_T)

        with _inputs_of(first, add, stop_after=len(first)):
            states.run(layer, index, number, hidden)
    return list(sums.values())


def _weighted_tokens(
    name: str, x: torch.Tensor, batch: Batch, experts: Experts | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(inputs of real tokens, their weights) of a linear that sees all tokens, or of an expert that sees some."""
    positions = batch.input_ids_BT.numel()
    if experts is not None:
        index = experts.tokens
        assert index is not None, "the experts are running"
        if batch.real is not None:
            is_real = torch.zeros(positions, dtype=torch.bool, device=x.device)
            is_real[batch.real] = True
            x, index = x[is_real[index]], index[is_real[index]]
        return x, batch.weight[index] if batch.weight is not None else None
    if x.numel() != positions * x.shape[-1]:
        raise UserError(f"sees other tokens than the layer does ({tuple(x.shape)})", where=name)
    weight = batch.weight
    if weight is not None and batch.real is not None:
        weight = weight.index_select(0, batch.real)
    return select_real(x, batch), weight


class _AllSeen(Exception):
    """Ends a forward whose remaining part nobody needs."""


@contextmanager
def _inputs_of(
    modules: Mapping[str, nn.Module], note: Callable[[str, torch.Tensor], None], stop_after: int | None = None
) -> Iterator[None]:
    """Call `note(name, input)` whenever one of the modules is about to run; end the block after `stop_after` calls."""
    calls = 0

    def hook(name: str, args: tuple) -> None:
        nonlocal calls
        note(name, args[0])
        calls += 1
        if calls == stop_after:
            raise _AllSeen

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: hook(name, args))
        for name, module in modules.items()
    ]
    try:
        yield
    except _AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
