"""Calibration rows as batches, and the inputs that a model hands to each of its decoder layers for them.

Rows are padded on the right and no attention mask is made: in a causal model a token sees only what is before it, so
that padding changes no real token, and the kernels for plain causal attention apply. What the model computes at padding
is dropped before it reaches a Hessian.

Shapes: B rows, T tokens of the longest row, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlora.data.calibration import CalibrationRow
from qlora.errors import Problem, UserError


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded to one."""

    rows: tuple[int, ...]
    """Which of the calibration rows these are."""
    input_ids_BT: torch.Tensor
    """int64, on the CPU; padding is token 0."""
    real: torch.Tensor | None
    """int64 indices of the real tokens among the B·T, on the compute device; None when there is no padding."""
    weight: torch.Tensor | None
    """fp32 weights of all B·T positions, zero for padding, on the compute device; None when every token weighs 1."""
    tokens: int
    """Real tokens."""


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer is called with beside the hidden states: positions, masks, rotary embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class LayerInputs:
    """The model's way into its decoder layers for one batch."""

    hidden_BTD: torch.Tensor
    calls: list[LayerCall]
    """One per decoder layer: layers with other attention get other masks and rotary embeddings."""


def make_batches(
    rows: Sequence[CalibrationRow], max_tokens: int, vocabulary: int, device: str, prompt_weight: float = 1.0
) -> list[Batch]:
    """Rows sorted by length, longest first, in batches of at most `max_tokens` tokens (a longer row makes one alone).

    Positions whose prediction carried no loss in training weigh `prompt_weight`, all others 1.
    Raises UserError for an empty calibration set, empty rows, and token ids outside the vocabulary.
    """
    problems = [
        Problem("no tokens", f"calibration row {index}") for index, row in enumerate(rows) if not len(row.input_ids)
    ]
    problems += [
        Problem(f"token {max(row.input_ids)} is outside the vocabulary of {vocabulary}", f"calibration row {index}")
        for index, row in enumerate(rows)
        if len(row.input_ids) and max(row.input_ids) >= vocabulary
    ]
    if not rows:
        problems.append(Problem("no rows to calibrate on", "calibration", "raise quantize.calibration.samples"))
    if problems:
        raise UserError(problems)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids), reverse=True)
    batches = []
    start = 0
    while start < len(order):
        longest = len(rows[order[start]].input_ids)
        count = max(1, max_tokens // longest)
        batches.append(_pad(rows, tuple(order[start : start + count]), longest, device, prompt_weight))
        start += count
    return batches


def _pad(
    rows: Sequence[CalibrationRow], chosen: tuple[int, ...], longest: int, device: str, prompt_weight: float
) -> Batch:
    input_ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
    weight = torch.zeros(len(chosen), longest)
    is_real = torch.zeros(len(chosen), longest, dtype=torch.bool)
    for place, index in enumerate(chosen):
        row = rows[index]
        length = len(row.input_ids)
        input_ids[place, :length] = torch.tensor(row.input_ids, dtype=torch.int64)
        is_real[place, :length] = True
        weight[place, :length] = 1.0
        if row.loss is not None:
            weight[place, :length][~torch.tensor(row.loss)] = prompt_weight
    tokens = int(is_real.sum())
    real = None if tokens == is_real.numel() else is_real.reshape(-1).nonzero().squeeze(1).to(device)
    weighted = bool((weight[is_real] != 1).any())
    return Batch(chosen, input_ids, real, weight.reshape(-1).to(device) if weighted else None, tokens)


def record_layer_inputs(
    decoder: nn.Module, layers: nn.ModuleList, batches: Sequence[Batch], device: str
) -> Iterator[LayerInputs]:
    """Run the decoder's own forward on each batch with layers that only note how they are called.

    Nothing is assumed about how a model makes masks and positions. Raises UserError for a model that changes the hidden
    states between layers, since a walk from layer to layer would miss that.
    """
    recorder = _Recorder()
    for layer in layers:
        # An attribute of the instance, not another module in its place: models read attributes of their layers.
        layer.forward = recorder.stand_in(layer)
    try:
        for batch in batches:
            yield recorder.record(decoder, batch.input_ids_BT.to(device), len(layers))
    finally:
        for layer in layers:
            del layer.forward


@dataclass
class _Recorder:
    calls: list[LayerCall] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    in_tuple: bool = False
    """Whether the model expects its layers to return a tuple; learnt from what it does with a tensor."""
    tensors: list[torch.Tensor] = field(default_factory=list)
    """Distinct tensors seen so far; batches of one shape share masks and rotary embeddings."""

    def stand_in(self, layer: nn.Module) -> Callable[..., torch.Tensor | tuple[torch.Tensor]]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor]:
            if self.calls and hidden_states is not self.hidden:
                if not self.in_tuple and _is_first_of(self.hidden, hidden_states):
                    raise _TupleExpected
                raise UserError(
                    f"the model changes hidden states between its layers ({type(layer).__name__})",
                    fix="this architecture cannot be quantized yet",
                )
            self.hidden = hidden_states
            self.calls.append(LayerCall(*self._share((args, kwargs))))
            return (hidden_states,) if self.in_tuple else hidden_states

        return forward

    def record(self, decoder: nn.Module, input_ids: torch.Tensor, layers: int) -> LayerInputs:
        self.calls = []
        try:
            decoder(input_ids=input_ids, use_cache=False)
        except _TupleExpected:
            self.calls, self.in_tuple = [], True
            decoder(input_ids=input_ids, use_cache=False)
        if len(self.calls) != layers or self.hidden is None:
            raise UserError(
                f"the model called {len(self.calls)} of its {layers} decoder layers",
                fix="this architecture cannot be quantized yet",
            )
        hidden, self.hidden = self.hidden, None
        return LayerInputs(hidden, self.calls)

    def _share(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            for known in self.tensors:
                if value is known or (
                    value.shape == known.shape and value.dtype == known.dtype and torch.equal(value, known)
                ):
                    return known
            self.tensors.append(value)
            return value
        if isinstance(value, (tuple, list)):
            return type(value)(self._share(item) for item in value)
        if isinstance(value, dict):
            return {key: self._share(item) for key, item in value.items()}
        return value


class _TupleExpected(Exception):
    """The model took the first element of what a layer returned."""


def _is_first_of(whole: torch.Tensor | None, part: torch.Tensor) -> bool:
    return whole is not None and part.shape == whole.shape[1:] and part.data_ptr() == whole.data_ptr()
