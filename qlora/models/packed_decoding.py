"""Decoding with packed codes as they are: linears of one input as one, and what lies between linears in few kernels.

A step of a few rows takes as long as its codes take to be read and its kernels to be launched. `speed_up` leaves both
at little: linears read codes by `few_rows_product`; q, k and v, and gate and up, are one linear each; RMS norms, rotary
embeddings, attention of one token and gates are a kernel each, and additions to the residual stream are in the kernels
beside them. For inference alone: there is no backward, and the parts of a merged linear are no parameters of the model
any more.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUTanh, SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.kernels import gptq_gemv, one_token
from qlora.kernels.gptq_gemv import (
    DTYPES,
    MOST_ROWS,
    Arrivals,
    StripedWeight,
    dequantized,
    few_rows_product,
    gated_halves,
)
from qlora.kernels.norms import RmsNorm, fuse_rms_norms, recognized
from qlora.kernels.packed_linear import PackedWeight, dequantize
from qlora.models.packed_module import PackedLinear
from qlora.models.rotary_functions import replace_rotary
from qlora.quantization.modules import decoder_layers

ATTENTION = "qlora_decoding"
CHANGES_ATTENTION = "softcap", "position_bias", "cache", "s_aux"
"""Arguments by which models ask for other than softmax(q·kᵀ + mask)·v."""
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
NORMS = "input_layernorm", "post_attention_layernorm"
PARTS = {*NORMS, "self_attn", "mlp"}
# Relative, of a block or layer against its own forward: two orders of rounding in the dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.005}
TRIAL = 5
"""Rows on which they are compared."""


class DecodingLinear(nn.Module):
    """y = x·Wᵀ + b of packed codes, by `few_rows_product` where there are few rows, else by a dequantized weight."""

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None, arrivals: Arrivals) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        has_kernel = gptq_gemv.takes(weight) and weight.device.type == "cuda"
        self.weight_of_codes: PackedWeight | StripedWeight = gptq_gemv.striped(weight) if has_kernel else weight
        self.bias_of_codes, self._arrivals = bias, arrivals

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[..., K] → [..., N]; residual: [..., N] that is added."""
        x_MK, weight = x.reshape(-1, self.in_features), self.weight_of_codes
        if isinstance(weight, PackedWeight):
            w_KN = dequantize(weight, None, x.dtype)
        elif len(x_MK) > MOST_ROWS or x.dtype not in DTYPES:
            w_KN = dequantized(weight, x.dtype)
        else:
            added = self.bias_of_codes
            if residual is not None:
                added = residual.reshape(-1, self.out_features)
                added = added if self.bias_of_codes is None else added + self.bias_of_codes
            return few_rows_product(x_MK, weight, added, self._arrivals).view(*x.shape[:-1], self.out_features)
        y = (x_MK @ w_KN).view(*x.shape[:-1], self.out_features)
        y = y if self.bias_of_codes is None else y + self.bias_of_codes.to(y.dtype)
        return y if residual is None else residual + y


class _Merged:
    """Linears of one input as one; the first that is called with a tensor computes for all."""

    def __init__(self, linear: DecodingLinear, sizes: Sequence[int]) -> None:
        self.linear, self._sizes = linear, list(sizes)
        self._x: torch.Tensor | None = None
        self._ready: dict[int, torch.Tensor] = {}

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self._x is not x or index not in self._ready:
            self._x = x
            self._ready = dict(enumerate(self.linear(x).split(self._sizes, dim=-1)))
        found = self._ready.pop(index)
        if not self._ready:
            self._x = None
        return found


class _Part(nn.Module):
    """One of the linears of a `_Merged`."""

    def __init__(self, merged: _Merged, index: int) -> None:
        super().__init__()
        self.merged, self._index = merged, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merged.output(self._index, x)


@torch.no_grad()
def speed_up(model: Any) -> int:
    """Have a model with `PackedLinear`s (`load_packed`) decode by kernels; returns how many linears it then has.

    Blocks and layers are fused where, on random inputs, that gives what their own forward gives; all else stays.
    """
    arrivals = _arrivals(model)
    count = 0
    for parent in list(model.modules()):
        for names in SIBLINGS:
            children: list[Any] = [getattr(parent, name, None) for name in names]
            if all(type(child) is PackedLinear for child in children) and _mergeable(children):
                merged = _Merged(_merge(children, arrivals), [child.out_features for child in children])
                count += 1
                for index, name in enumerate(names):
                    setattr(parent, name, _Part(merged, index))
    for name, module in list(model.named_modules()):
        if type(module) is PackedLinear:
            model.set_submodule(name, DecodingLinear(module.packed, module.bias, arrivals))
            count += 1
    fuse_rms_norms(model, device=next(model.parameters()).device.type, learns=False)
    replace_rotary(model, lambda query, key: True)
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)
    for block in list(model.modules()):
        _fuse_block(block, model.dtype)
    _fuse_layers(model)
    return count


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[B, H, T, D] → [B, T, H, D]: one token a row by this package's kernel, all else as in transformers' sdpa."""
    plain = not kwargs.get("dropout") and all(kwargs.get(name) is None for name in CHANGES_ATTENTION)
    if plain and one_token.takes(query, key, attention_mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return one_token.attend(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _arrivals(model: nn.Module) -> Arrivals:
    linears = [module for module in model.modules() if type(module) is PackedLinear]
    columns = sum(sorted(linear.out_features for linear in linears)[-len(SIBLINGS[0]) :])
    return Arrivals(columns, linears[0].qweight.device)


def _mergeable(linears: Sequence[Any]) -> bool:
    """Whether they differ in outputs alone: all or none of them have a bias."""
    weights = [linear.packed for linear in linears]
    kinds = {(weight.bits, weight.inputs, len(weight.scales_GN), weight.scales_GN.dtype) for weight in weights}
    biases = {linear.bias is None for linear in linears}
    return len(kinds) == len(biases) == 1 and all(weight.rows_K is None for weight in weights)


def _merge(linears: Sequence[Any], arrivals: Arrivals) -> DecodingLinear:
    weights = [linear.packed for linear in linears]
    names = "qweight_WN", "zeros_GN", "scales_GN"
    together = {name: torch.cat([getattr(weight, name) for weight in weights], dim=1) for name in names}
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    return DecodingLinear(replace(weights[0], **together), bias, arrivals)


def _fuse_block(block: nn.Module, dtype: torch.dtype) -> bool:
    """Give a gated feed-forward block of merged linears a forward of three kernels, if that does the same."""
    gate, up, down = (getattr(block, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    silu = _is_silu(getattr(block, "act_fn", None))
    if not (isinstance(gate, _Part) and isinstance(up, _Part) and isinstance(down, DecodingLinear)) or silu is None:
        return False
    both, plain = gate.merged.linear, block.forward

    def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        hidden = gated_halves(both(x).reshape(-1, both.out_features), silu)
        return down(hidden.view(*x.shape[:-1], -1), residual)

    x = _trial(both, dtype)
    if not _close(forward(x), plain(x), 0):
        return False
    setattr(forward, "fused", True)  # noqa: B010
    block.forward = forward  # type: ignore[method-assign]
    return True


def _is_silu(module: Any) -> bool | None:
    """None for other activations than SiLU and GELU in its tanh form."""
    if isinstance(module, (nn.SiLU, SiLUActivation)):
        return True
    gelu = isinstance(module, GELUTanh) or (isinstance(module, nn.GELU) and module.approximate == "tanh")
    return False if gelu else None


def _fuse_layers(model: Any) -> int:
    """Layers x → x + attention(norm(x)) → x + mlp(norm(x)) with additions inside other kernels; returns how many."""
    rotary, fused = getattr(model.get_decoder(), "rotary_emb", None), 0
    for layer in decoder_layers(model)[1]:
        parts = dict(layer.named_children())
        if set(parts) != PARTS or rotary is None or not hasattr(parts["mlp"].forward, "fused"):
            continue
        norm: Any = parts[NORMS[1]]
        second = recognized(norm, norm.weight.device.type)
        if second is not None and _same(layer, second, rotary):
            layer.forward = types.MethodType(_layer_forward(second), layer)
            fused += 1
    return fused


def _layer_forward(second: RmsNorm) -> Callable[..., torch.Tensor]:
    def forward(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        hidden, normed = second.after_adding(layer.post_attention_layernorm, hidden_states, attended)
        out: torch.Tensor = layer.mlp(normed, residual=hidden)
        return out

    return forward


def _same(layer: Any, second: RmsNorm, rotary: nn.Module) -> bool:
    x = _trial(layer.mlp.gate_proj.merged.linear, layer.input_layernorm.weight.dtype)[None]
    try:
        places = rotary(x, torch.arange(TRIAL, device=x.device)[None])
        expected = layer(x, position_embeddings=places, attention_mask=None)
        found = _layer_forward(second)(layer, x, position_embeddings=places, attention_mask=None)
    except (TypeError, ValueError, AttributeError, RuntimeError):  # a layer of other inputs or outputs
        return False
    return _close(found, expected, x)


def _trial(linear: DecodingLinear, dtype: torch.dtype) -> torch.Tensor:
    """Random inputs of a linear."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TRIAL, linear.in_features, generator=generator).to(linear.weight_of_codes.device, dtype)


def _close(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor | int) -> bool:
    """Whether both add the same to what was before, within the dtype's rounding."""
    added, rounding = (expected - before).float().norm(), torch.finfo(expected.dtype).eps * expected.float().norm()
    return bool((found - expected).float().norm() <= TOLERANCE[expected.dtype] * added + rounding)
