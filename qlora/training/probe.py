"""What a model's layers really keep for the backward, from two short forwards of the model as it will train."""

from __future__ import annotations

from typing import Any

import torch

from qlora.training.packed import IGNORED, pack, pad

# Tokens of the two forwards: what does not grow with them cancels out.
SHORT, LONG = 64, 192


def kept_bytes_per_token(model: Any, layers: int, *, packed: bool) -> float:
    """Bytes that one decoder layer keeps per token, of a model with so many layers and nothing computed again.

    All that autograd saves, once where several operations save it, and no parameters. The model's mode stays what it
    was, gradients are not touched.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    device = next(model.parameters()).device
    trains = model.training
    model.train()
    found = []
    for tokens in (SHORT, LONG):
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in parameters:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x.detach()  # an output as it is would keep its own graph alive, for good

        row = [list(range(1, tokens + 1)), [IGNORED] * tokens]
        batch = pack([(row[0], row[1])]) if packed else pad([(row[0], row[1])])
        inputs = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
            if key not in ("labels", "targets", "predicting")
        }
        decoder = getattr(model.get_base_model(), model.get_base_model().base_model_prefix)
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
            output = decoder(**inputs, use_cache=False)
        found.append(sum(kept.values()))
        del output
    model.train(trains)
    return (found[1] - found[0]) / (LONG - SHORT) / layers
