"""Decoder layers whose residual stream is added to, normalized and differentiated in one pass instead of two or three.

    x → x + attention(norm(x)) → x + mlp(norm(x)), the layer of Llama and its many relatives

A layer counts as one if it has these four parts, no others, and on random inputs gives what its own forward gives.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora.kernels.norms import RmsNorm, recognized
from qlora.quantization.modules import decoder_layers

FIRST, SECOND = "input_layernorm", "post_attention_layernorm"
PARTS = {FIRST, "self_attn", SECOND, "mlp"}
ADDS_RESIDUAL = "qlora_adds_residual"
"""Attribute of a feed-forward block's forward that takes the residual stream and adds it."""
# Tokens that a layer is tried on.
TRIAL = 7


@dataclass(frozen=True)
class _PreNorm:
    """The forward of such a layer."""

    first: RmsNorm
    second: RmsNorm

    def forward(self, layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden, normed = self.first.after_adding(layer.input_layernorm, hidden_states)
        attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
        hidden, normed = self.second.after_adding(layer.post_attention_layernorm, hidden, attended)
        adds = getattr(layer.mlp.forward, ADDS_RESIDUAL, False)
        out: torch.Tensor = layer.mlp(normed, residual=hidden) if adds else hidden + layer.mlp(normed)
        return out


def fuse_layers(causal: Any, tolerance: float) -> int:
    """Give decoder layers such a forward where they are of that kind and their norms do not learn; returns how many.

    tolerance: relative, of a layer against its own forward.
    """
    rotary = getattr(causal.get_decoder(), "rotary_emb", None)
    fused = 0
    for layer in decoder_layers(causal)[1]:
        parts = dict(layer.named_children())
        if set(parts) != PARTS or rotary is None:
            continue
        first, second = (_frozen_norm(parts[name]) for name in (FIRST, SECOND))
        if first is not None and second is not None and _same(layer, _PreNorm(first, second), rotary, tolerance):
            layer.forward = types.MethodType(_PreNorm(first, second).forward, layer)
            fused += 1
    return fused


def _frozen_norm(norm: nn.Module) -> RmsNorm | None:
    weight = getattr(norm, "weight", None)
    return recognized(norm, weight.device.type) if weight is not None and not weight.requires_grad else None


@torch.no_grad()
def _same(layer: Any, pre_norm: _PreNorm, rotary: nn.Module, tolerance: float) -> bool:
    gain: Any = layer.input_layernorm.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TRIAL, len(gain), generator=generator).to(gain)
    trains = layer.training
    layer.eval()
    try:
        places = rotary(x, torch.arange(TRIAL, device=x.device)[None])
        expected = layer(x, position_embeddings=places, attention_mask=None)
        found = pre_norm.forward(layer, x, position_embeddings=places, attention_mask=None)
    except (TypeError, ValueError, AttributeError, RuntimeError):  # a layer of other inputs or outputs
        return False
    finally:
        layer.train(trains)
    # Of what the layer adds, its input is most of its output; and the rounding of that.
    added, rounding = (expected - x).float().norm(), torch.finfo(x.dtype).eps * expected.float().norm()
    return bool((found - expected).float().norm() <= tolerance * added + rounding)
