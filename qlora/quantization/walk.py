"""Inside one decoder layer: which linears share an input and in which order, and the statistics of these inputs.

Shapes: B rows, T tokens of the longest row, K inputs of a linear.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from qlora.errors import Problem, UserError
from qlora.quantization.calibration import Batch
from qlora.quantization.experts import Experts, routed_tokens
from qlora.quantization.hessian import InputStatistics
from qlora.quantization.modules import Linear, weight_shape
from qlora.quantization.states import CalibrationStates, Replay, select_real


@dataclass(frozen=True)
class InputGroup:
    """Linears of a decoder layer that have one input: q, k and v, or gate and up."""

    names: tuple[str, ...]

    @property
    def first(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Ending:
    """A part of a decoder layer whose output is that of one linear in it: attention, of its output projection."""

    part: str
    behind: tuple[None, ...] | None
    """What stands behind the output in a tuple; None where it stands alone."""


@dataclass(frozen=True)
class LayerOrder:
    """In which order a layer's linears are quantized."""

    stages: list[list[InputGroup]]
    """In the order of a forward. A stage is calibrated together, on what the quantized stages before it make of the
    calibration rows: one group, or the like groups of all experts; everything when not sequential."""
    unreached: list[str]
    """Linears of experts that no token reached."""
    endings: dict[str, Ending]
    """Linear → the part that ends in it, where all else in that part belongs to earlier stages, and it is not in the
    last: later stages need no more of the part than this linear's input."""


@dataclass(frozen=True)
class Walk:
    """A model on its way through one of its decoder layers."""

    layer: nn.Module
    index: int
    linears: Mapping[str, Linear]
    """Of this layer, those that are quantized."""
    states: CalibrationStates
    """Before this layer."""
    replays: dict[str, Replay] = field(default_factory=dict)
    """By linears in which a part of the layer ends."""

    def forward(self, batch: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The layer's output for one batch of its states."""
        return self.states.run(self.layer, self.index, batch, hidden_BTD)

    def advance(self) -> None:
        """Replace the states by the layer's output."""
        self.states.advance(self.layer, self.index)

    def prepare_replays(self, endings: Mapping[str, Ending]) -> None:
        """Have statistics of these linears keep their inputs."""
        for name, ending in endings.items():
            part = self.layer.get_submodule(ending.part)
            self.replays[name] = self.states.replay(part, self.linears[name], ending.behind)

    def start_replays(self, stage: Sequence[InputGroup]) -> None:
        """From now on, replay the parts that end in a linear of this stage."""
        for group in stage:
            if group.first in self.replays:
                self.replays[group.first].start()


def layer_order(walk: Walk, *, sequential: bool) -> LayerOrder:
    """The groups of linears with one input each, in stages.

    Found by watching forwards of the smallest batch first, and of others until every linear ran. Only experts may be
    reached by no token. Raises UserError when another linear runs never, or any runs twice.
    """
    groups: dict[str, InputGroup] = {}
    members: set[str] = set()
    endings: dict[str, Ending] = {}
    linears, states = walk.linears, walk.states
    routed = routed_tokens(walk.layer)
    order = sorted(range(len(states.batches)), key=lambda batch: states.batches[batch].input_ids_BT.numel())
    for batch in order:
        seen: list[tuple[str, torch.Tensor]] = []

        def note(name: str, x: torch.Tensor, seen: list[tuple[str, torch.Tensor]] = seen) -> None:
            seen.append((name, x))

        with _inputs_of(linears, note), _watching_endings(walk.layer, linears, endings):
            walk.forward(batch, states.hidden(batch))
        calls = [name for name, _ in seen]
        problems = [
            Problem(f"runs {calls.count(name)} times in a forward of layer {walk.index}; once is expected", name)
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
    unreached = [name for name in linears if name not in members]
    if not sequential:
        return LayerOrder([list(groups.values())], unreached, {})
    stages: dict[str, list[InputGroup]] = {}
    for name, group in groups.items():
        stages.setdefault(re.sub(r"\d+", "*", name) if name in routed else name, []).append(group)
    return LayerOrder(list(stages.values()), unreached, _useful(endings, list(stages.values())))


def _useful(endings: Mapping[str, Ending], stages: Sequence[Sequence[InputGroup]]) -> dict[str, Ending]:
    """Those that `LayerOrder.endings` promises."""
    chosen = {}
    for number, stage in enumerate(stages[:-1]):
        waiting = [name for later in stages[number:] for group in later for name in group.names]
        for group in stage:
            ending = endings.get(group.first)
            if ending and [name for name in waiting if name.startswith(f"{ending.part}.")] == [group.first]:
                chosen[group.first] = ending
    return chosen


@contextmanager
def _watching_endings(layer: nn.Module, linears: Mapping[str, Linear], endings: dict[str, Ending]) -> Iterator[None]:
    """Note in `endings` which parts of the layer return what one of the linears in them returned.

    Unchanged, that is, by the part and by what the layer does with it.
    """
    outputs: dict[str, tuple[torch.Tensor, int]] = {}

    def linear_ran(name: str, output: torch.Tensor) -> None:
        outputs[name] = output, output._version

    def part_ran(part: str, output: Any) -> None:
        first, behind = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if not isinstance(first, torch.Tensor) or any(item is not None for item in behind or ()):
            return
        for name, (tensor, version) in outputs.items():
            same = first.data_ptr() == tensor.data_ptr() and first.shape == tensor.shape and first._version == version
            if same and name.startswith(f"{part}."):
                endings[name] = Ending(part, behind)

    def hook(module: nn.Module, name: str, ran: Callable[[str, Any], None]) -> RemovableHandle:
        return module.register_forward_hook(lambda _, args, output: ran(name, output))

    handles = [hook(module, name, linear_ran) for name, module in linears.items()]
    handles += [hook(module, name, part_ran) for name, module in layer.named_children()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, (tensor, version) in outputs.items():
            if tensor._version != version:
                endings.pop(name, None)


def collect_statistics(
    stage: Sequence[InputGroup], walk: Walk, full: Walk | None = None, *, advance_full: bool = False
) -> list[InputStatistics]:
    """Statistics of the input of each group over all batches; each forward stops once the last group has its input.

    full: the model before quantization, with states for some of the batches. Where there is one, also how far its
    inputs are from these; not for experts, which see other tokens in it.
    advance_full: let the full model's forwards go on to their end and advance its states, in the same pass.
    """
    first = {group.first: walk.linears[group.first] for group in stage}
    routed = routed_tokens(walk.layer)
    sums = {
        name: InputStatistics(
            weight_shape(module)[1], walk.states.device, drift=full is not None and name not in routed
        )
        for name, module in first.items()
    }
    wanted = {name: full.linears[name] for name in first if name not in routed} if full is not None else {}
    hidden_of_full = full.states.on_device() if full is not None else iter(())
    for number, hidden in enumerate(walk.states.on_device()):
        batch = walk.states.batches[number]
        inputs_of_full: dict[str, torch.Tensor] = {}
        if full is not None and number in full.states.numbers and (wanted or advance_full):
            place = full.states.numbers.index(number)

            def note(name: str, x: torch.Tensor, inputs: dict = inputs_of_full, full: Walk = full) -> None:
                inputs[name] = x
                if name in full.replays:
                    full.replays[name].keep(x)

            with _inputs_of(wanted, note, stop_after=None if advance_full else len(wanted)):
                output = full.forward(place, next(hidden_of_full))
                full.states.store(place, output)  # not reached by a forward that stops early

        def add(name: str, x: torch.Tensor, batch: Batch = batch, of_full: dict = inputs_of_full) -> None:
            if name in walk.replays:
                walk.replays[name].keep(x)
            x_TK, weight_T = _weighted_tokens(name, x, batch, routed.get(name))
            full_TK = select_real(of_full.pop(name), batch) if name in of_full else None
            sums[name].add(x_TK, full_TK, weight_T)

        with _inputs_of(first, add, stop_after=len(first)):
            walk.forward(number, hidden)
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
        # The frames of the forward hold its activations, in reference cycles; Python 3.12 clears them only in part.
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
    finally:
        for handle in handles:
            handle.remove()
