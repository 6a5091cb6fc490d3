"""Inside one decoder layer: which linears share an input and in which order, and the statistics of these inputs.

Shapes: B rows, T tokens of the longest row, K inputs of a linear.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qlora.errors import Problem, UserError
from qlora.quantization.calibration import Batch
from qlora.quantization.experts import Experts, routed_tokens
from qlora.quantization.hessian import InputStatistics
from qlora.quantization.modules import Linear, weight_shape
from qlora.quantization.states import CalibrationStates, select_real


@dataclass(frozen=True)
class InputGroup:
    """Linears of a decoder layer that have one input: q, k and v, or gate and up."""

    names: tuple[str, ...]

    @property
    def first(self) -> str:
        return self.names[0]


def input_groups(
    linears: Mapping[str, Linear], layer: nn.Module, states: CalibrationStates, index: int, *, sequential: bool
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
    for batch in order:
        seen: list[tuple[str, torch.Tensor]] = []

        def note(name: str, x: torch.Tensor, seen: list[tuple[str, torch.Tensor]] = seen) -> None:
            seen.append((name, x))

        with _inputs_of(linears, note):
            states.run(layer, index, batch, states.hidden(batch))
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
    linears: Mapping[str, Linear]
    batches: Sequence[int]
    """Numbers of the batches that it sees."""
    states: CalibrationStates
    """Of these batches."""


def collect_statistics(
    linears: Mapping[str, Linear],
    stage: Sequence[InputGroup],
    layer: nn.Module,
    states: CalibrationStates,
    index: int,
    full: FullModel | None = None,
    *,
    advance_full: bool = False,
) -> list[InputStatistics]:
    """Statistics of the input of each group over all batches; each forward stops once the last group has its input.

    full: where there is one, also how far its inputs are from these; not for experts, which see other tokens in it.
    advance_full: let the full model's forwards go on to their end and advance its states, in the same pass.
    """
    first = {group.first: linears[group.first] for group in stage}
    routed = routed_tokens(layer)
    sums = {
        name: InputStatistics(weight_shape(module)[1], states.device, drift=full is not None and name not in routed)
        for name, module in first.items()
    }
    wanted = {name: full.linears[name] for name in first if name not in routed} if full is not None else {}
    hidden_of_full = full.states.on_device() if full is not None else iter(())
    for number, hidden in enumerate(states.on_device()):
        batch = states.batches[number]
        inputs_of_full: dict[str, torch.Tensor] = {}
        if full is not None and number in full.batches and (wanted or advance_full):
            place = full.batches.index(number)
            with _inputs_of(wanted, inputs_of_full.__setitem__, stop_after=None if advance_full else len(wanted)):
                output = full.states.run(full.layer, index, place, next(hidden_of_full))
                full.states.store(place, output)  # not reached by a forward that stops early

        def add(name: str, x: torch.Tensor, batch: Batch = batch, of_full: dict = inputs_of_full) -> None:
            x_TK, weight_T = _weighted_tokens(name, x, batch, routed.get(name))
            full_TK = select_real(of_full.pop(name), batch) if name in of_full else None
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
    except _AllSeen as seen:
        # The frames of the forward hold its activations, in reference cycles on some versions of Python.
        traceback.clear_frames(seen.__traceback__)
    finally:
        for handle in handles:
            handle.remove()
