"""The trained model as it is defined: what an adapter adds to a product is added before the sum is rounded.

PEFT rounds x·Wᵀ to 16 bits and then adds s·(x·Aᵀ)·Bᵀ to that number. What is less than half of the number's last bit
changes nothing then, wherever it is added, so of a small update most is lost. Here product and adapter's part are
summed up in fp32 and rounded once: the small part moves some of the sums over to their next number, and keeps its size
on average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from qlora.models.frozen import compute_dtype, dense_weight, is_known


def round_once(model: PeftModel) -> PeftModel:
    """Have LoRA layers add their adapter before they round, outside of training; DoRA and others stay PEFT's."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            layer.forward = _forward(layer)
    return model


def _is_plain(layer: LoraLayer) -> bool:
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A:
        return False
    (name,) = layer.active_adapters
    return (
        name not in layer.lora_variant and not layer.lora_bias.get(name) and _multiplies_alone(layer.get_base_layer())
    )


def _multiplies_alone(base: Any) -> bool:
    """Whether training does nothing to the input but multiply it; in int8, GPUs quantize it too."""
    return is_known(base) or (isinstance(base, Linear8bitLt) and base.weight.device.type == "cpu")


def _forward(layer: Any) -> Callable[..., torch.Tensor]:
    base: Any = layer.get_base_layer()
    plain: Callable[..., torch.Tensor] = layer.forward
    (name,) = layer.active_adapters

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = x.dtype if isinstance(base, Linear8bitLt) else compute_dtype(base)
        if args or kwargs or layer.training or layer.disable_adapters or layer.merged or x.dtype != dtype:
            return plain(x, *args, **kwargs)
        down_RK, up_NR = layer.lora_A[name].weight, layer.lora_B[name].weight
        weight_NK = dense_weight(base, dtype)
        x_TK = x.reshape(-1, x.shape[-1])
        update_TN = (x_TK.to(down_RK.dtype) @ down_RK.T) @ (layer.scaling[name] * up_NR).T
        if base.bias is not None:
            update_TN = update_TN + base.bias
        return _sum(update_TN, x_TK, weight_NK).view(*x.shape[:-1], -1)

    return forward


def _sum(update_TN: torch.Tensor, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """update + x·Wᵀ in the dtype of x, rounded once."""
    if x_TK.is_cuda and x_TK.dtype != torch.float32:
        # cuBLAS may split a product of 16 bits over its inputs, and round every part before it adds them up.
        return (torch.mm(x_TK, weight_NK.T, out_dtype=torch.float32) + update_TN).to(x_TK.dtype)
    return torch.addmm(update_TN.to(x_TK.dtype), x_TK, weight_NK.T)
