"""Calibration rows as batches, and the inputs that a model hands to each of its decoder layers for them.

Rows are padded on the right and no attention mask is made: in a causal model a token sees only what is before it, so
that padding changes no real token, and the kernels for plain causal attention apply. What the model computes at padding
is dropped before it reaches a Hessian.

Shapes: B rows, T tokens of the longest row, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlora.errors import Problem, UserError


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded to one."""

    input_ids_BT: torch.Tensor
    """int64, on the CPU; padding is token 0."""
    real: torch.Tensor | None
    """int64 indices of the real tokens among the B·T, on the compute device; None when there is no padding."""
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


def make_batches(rows: Sequence[Sequence[int]], max_tokens: int, vocabulary: int, device: str) -> list[Batch]:
    """Rows sorted by length, longest first, in batches of at most `max_tokens` tokens (a longer row makes one alone).

    Raises UserError for an empty calibration set, empty rows, and token ids outside the vocabulary.
    """
    problems = [Problem("no tokens", f"calibration row {index}") for index, row in enumerate(rows) if not len(row)]
    problems += [
        Problem(f"token {max(row)} is outside the vocabulary of {vocabulary}", f"calibration row {index}")
        for index, row in enumerate(rows)
        if len(row) and max(row) >= vocabulary
    ]
    if not rows:
        problems.append(Problem("no rows to calibrate on", "calibration", "raise quantize.calibration.samples"))
    if problems:
        raise UserError(problems)
    ordered = sorted(rows, key=len, reverse=True)
    batches = []
    start = 0
    while start < len(ordered):
        longest = len(ordered[start])
        count = max(1, max_tokens // longest)
        batches.append(_pad(ordered[start : start + count], longest, device))
        start += count
    return batches


def _pad(rows: Sequence[Sequence[int]], longest: int, device: str) -> Batch:
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    is_real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        is_real[index, : len(row)] = True
    tokens = int(is_real.sum())
    real = None if tokens == is_real.numel() else is_real.reshape(-1).nonzero().squeeze(1).to(device)
    return Batch(input_ids, real, tokens)


def record_layer_inputs(
    decoder: nn.Module, layers: nn.ModuleList, batches: Sequence[Batch], device: str
) -> list[LayerInputs]:
    """Run the decoder's own forward on each batch with layers that only note how they are called.

    Nothing is assumed about how a model makes masks and positions. Raises UserError for a model that changes the hidden
    states between layers, since a walk from layer to layer would miss that.
    """
    recorder = _Recorder()
    for layer in layers:
        # An attribute of the instance, not another module in its place: models read attributes of their layers.
        layer.forward = recorder.stand_in(layer)
    try:
        return [recorder.record(decoder, batch.input_ids_BT.to(device), len(layers)) for batch in batches]
    finally:
        for layer in layers:
            del layer.forward


@dataclass
class _Recorder:
    calls: list[LayerCall] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    tensors: list[torch.Tensor] = field(default_factory=list)
    """Distinct tensors seen so far; batches of one shape share masks and rotary embeddings."""

    def stand_in(self, layer: nn.Module) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.calls and hidden_states is not self.hidden:
                raise UserError(
                    f"the model changes hidden states between its layers ({type(layer).__name__})",
                    fix="this architecture cannot be quantized yet",
                )
            self.hidden = hidden_states
            self.calls.append(LayerCall(*self._share((args, kwargs))))
            return hidden_states

        return forward

    def record(self, decoder: nn.Module, input_ids: torch.Tensor, layers: int) -> LayerInputs:
        self.calls = []
        decoder(input_ids=input_ids, use_cache=False)
        if len(self.calls) != layers or self.hidden is None:
            raise UserError(
                f"the model called {len(self.calls)} of its {layers} decoder layers",
                fix="this architecture cannot be quantized yet",
            )
        return LayerInputs(self.hidden, self.calls)

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
