"""Inside one decoder layer: which linears share an input and in which order, their Hessians, and the layer's output.

Shapes: B rows, T tokens of the longest row, D width of the hidden states, K inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qlora.errors import Problem, UserError
from qlora.quantization.calibration import Batch, LayerCall, record_layer_inputs
from qlora.quantization.hessian import HessianAccumulator
from qlora.quantization.skeleton import Skeleton

# Hidden states of all calibration rows stay on the GPU up to this size, beyond it in host memory.
HIDDEN_STATES_ON_DEVICE_BYTES = 4 * 2**30


@dataclass
class CalibrationStates:
    """The hidden states of every batch between two layers, and how to call the layers with them."""

    batches: Sequence[Batch]
    calls: Sequence[Sequence[LayerCall]]
    """Per batch, per layer."""
    hidden_BTD: list[torch.Tensor]
    """Per batch: what goes into the next layer."""
    device: str

    def __post_init__(self) -> None:
        size = sum(hidden.nbytes for hidden in self.hidden_BTD)
        self._home = self.device if size <= HIDDEN_STATES_ON_DEVICE_BYTES else "cpu"
        self.hidden_BTD = [hidden.to(self._home) for hidden in self.hidden_BTD]

    def run(self, layer: nn.Module, index: int, batch: int) -> torch.Tensor:
        """The output of decoder layer number `index` for one batch."""
        call = self.calls[batch][index]
        output = layer(self.hidden_BTD[batch].to(self.device, non_blocking=True), *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, layer: nn.Module, index: int) -> None:
        """Replace the hidden states by the layer's output. Raises UserError when it is not finite."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for batch, padded in enumerate(self.batches):
            output = self.run(layer, index, batch)
            finite &= torch.isfinite(real_tokens(output, padded)).all()
            self.hidden_BTD[batch] = output.to(self._home)
        if not bool(finite):
            raise UserError(
                f"the output of decoder layer {index} is not finite",
                fix="check the merged model with `qlora evaluate`; float16 overflows where bfloat16 does not",
            )


def enter_model(skeleton: Skeleton, batches: Sequence[Batch], device: str) -> CalibrationStates:
    """The states before the first decoder layer."""
    with skeleton.filled_entrance(device) as decoder:
        inputs = record_layer_inputs(decoder, skeleton.layers, batches, device)
    return CalibrationStates(batches, [item.calls for item in inputs], [item.hidden_BTD for item in inputs], device)


def real_tokens(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[tokens, K] of an activation [B, T, K] or [B·T, K]: padding left out."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if batch.real is None else flat.index_select(0, batch.real)


def shared_inputs(
    linears: Mapping[str, nn.Linear], layer: nn.Module, states: CalibrationStates, index: int
) -> list[list[str]]:
    """The linears of a layer in groups with one input each, in the order in which a forward reaches them.

    q, k and v are such a group, gate and up another. Found by watching one forward of the smallest batch. Raises
    UserError when a linear runs never or twice.
    """
    seen: list[tuple[str, torch.Tensor]] = []
    smallest = min(range(len(states.batches)), key=lambda batch: states.batches[batch].input_ids_BT.numel())
    with _inputs_of(linears, lambda name, x: seen.append((name, x))):
        states.run(layer, index, smallest)
    calls = [name for name, _ in seen]
    problems = [
        Problem(f"runs {calls.count(name)} times in a forward of layer {index}; once is expected", name)
        for name in linears
        if calls.count(name) != 1
    ]
    if problems:
        raise UserError(problems)
    groups: dict[tuple, list[str]] = {}
    for name, x in seen:
        # `seen` keeps every input alive, so equal addresses mean the same data.
        groups.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(name)
    return list(groups.values())


def collect_hessians(
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Sequence[str]],
    layer: nn.Module,
    states: CalibrationStates,
    index: int,
) -> list[torch.Tensor]:
    """One Hessian [K, K] per group, over all batches. Each forward stops once the last group's input is known."""
    first = {group[0]: linears[group[0]] for group in groups}
    sums = {name: HessianAccumulator(module.in_features, states.device) for name, module in first.items()}
    last = groups[-1][0]
    for number, batch in enumerate(states.batches):

        def add(name: str, x: torch.Tensor, batch: Batch = batch) -> None:
            if x.numel() != batch.input_ids_BT.numel() * x.shape[-1]:
                raise UserError(f"sees other tokens than the layer does ({tuple(x.shape)})", where=name)
            sums[name].add(real_tokens(x, batch))
            if name == last:
                raise _AllSeen

        try:
            with _inputs_of(first, add):
                states.run(layer, index, number)
        except _AllSeen:
            pass
    return [sums[name].mean() for name in first]


class _AllSeen(Exception):
    """Ends a forward whose remaining part nobody needs."""


@contextmanager
def _inputs_of(modules: Mapping[str, nn.Module], note: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `note(name, input)` whenever one of the modules is about to run."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
