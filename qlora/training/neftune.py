"""Noise on token embeddings while training: NEFTune (Jain et al. 2023, arXiv:2310.05914, §2).

    x + u · α/√(L·d),  u uniform in [−1, 1]

L is the length of the token's own row, not of the batch that it is packed or padded into.

Shapes: B rows of T positions, or one of packed rows; D width of the embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


def add_noise(model: Any, alpha: float) -> RemovableHandle:
    """Have a causal language model's decoder train on noisy embeddings; in evaluation they are what they are."""

    def replace(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not decoder.training or not torch.is_grad_enabled() or kwargs.get("input_ids") is None:
            return None
        ids = kwargs["input_ids"]
        embedded = model.get_input_embeddings()(ids)
        lengths_BT = row_lengths(ids, kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q"))
        size_BT1 = (alpha / (lengths_BT * embedded.shape[-1]).sqrt())[..., None]
        noise = torch.empty_like(embedded).uniform_(-1, 1) * size_BT1.to(embedded.dtype)
        return args, kwargs | {"input_ids": None, "inputs_embeds": embedded + noise}

    decoder: torch.nn.Module = getattr(model, model.base_model_prefix)
    return decoder.register_forward_pre_hook(replace, with_kwargs=True)


def row_lengths(ids_BT: torch.Tensor, attention_mask: torch.Tensor | None, ends: torch.Tensor | None) -> torch.Tensor:
    """fp32 [B, T], of each position's row: from where packed rows end, or from the mask of padded ones."""
    if ends is not None:
        places = torch.arange(ids_BT.shape[1], device=ids_BT.device, dtype=ends.dtype)
        lengths = ends.diff()[torch.bucketize(places, ends[1:], right=True)][None]
    elif attention_mask is not None and attention_mask.ndim == 2:
        lengths = attention_mask.sum(1, keepdim=True).expand_as(ids_BT)
    else:
        lengths = torch.full_like(ids_BT, ids_BT.shape[1])
    return lengths.clamp(min=1).float()
