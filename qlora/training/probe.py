"""What a model's layers really take in training, from a few short forwards of the model as it will train."""

from __future__ import annotations

import time
from typing import Any

import torch

from qlora.models.training_memory import Probe
from qlora.training.packed import IGNORED, pack, pad

# Tokens of the two forwards that memory is told from: what does not grow with them cancels out.
SHORT, LONG = 64, 192
# Forwards with their backwards that are timed; the first ones build kernels.
TIMED = 3


def probe(model: Any, layers: int, *, packed: bool) -> Probe:
    """Of one decoder layer of a model with so many layers and nothing computed again.

    Kept is all that autograd saves, once where several operations save it, and no parameters. Launching is timed on a
    row so short that a GPU has nothing to do but wait. The model's mode stays what it was, gradients are not touched.
    """
    device = next(model.parameters()).device
    trains = model.training
    model.train()
    found = [_kept(model, tokens, packed) for tokens in (SHORT, LONG)]
    launching = min(_seconds(model, packed) for _ in range(TIMED)) / layers if device.type == "cuda" else None
    model.train(trains)
    return Probe((found[1] - found[0]) / (LONG - SHORT) / layers, launching)


def _kept(model: Any, tokens: int, packed: bool) -> int:
    """Bytes that a forward keeps."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # an output as it is would keep its own graph alive, for good

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = _forward(model, tokens, packed)
    del output
    return sum(kept.values())


def _seconds(model: Any, packed: bool) -> float:
    """Of a forward and its backward of a short row on a GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    output = _forward(model, SHORT, packed).last_hidden_state
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.autograd.grad(output, learning, torch.ones_like(output), allow_unused=True)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _forward(model: Any, tokens: int, packed: bool) -> Any:
    device = next(model.parameters()).device
    row = (list(range(1, tokens + 1)), [IGNORED] * tokens)
    batch = pack([row]) if packed else pad([row])
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key not in ("labels", "targets", "predicting")
    }
    decoder = getattr(model.get_base_model(), model.get_base_model().base_model_prefix)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16)
    with torch.enable_grad(), autocast:
        return decoder(**inputs, use_cache=False)
