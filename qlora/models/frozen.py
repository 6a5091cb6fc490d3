"""The frozen linears that adapters stand on, as products take them: what computes in which dtype, with which weight."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from qlora.kernels.four_bit import FourBitWeight, dequantize
from qlora.kernels.packed_linear import PackedWeight, frozen_weight
from qlora.models.packed_module import PackedLinear

QUANTIZED = (Linear4bit, PackedLinear)
"""Linears whose weight is dequantized for each product, and that is all they do to it."""


def is_known(linear: nn.Module) -> bool:
    """Whether `kernel_weight` has what this module multiplies with: subclasses may compute something else."""
    return type(linear) in (nn.Linear, *QUANTIZED)


def compute_dtype(linear: Any) -> torch.dtype:
    """What a linear that is known computes in."""
    found: torch.dtype = linear.compute_dtype if isinstance(linear, QUANTIZED) else linear.weight.dtype
    return found


def kernel_weight(linear: Any) -> FourBitWeight | PackedWeight | torch.Tensor:
    """The weight of a linear that is known, sharing its memory."""
    if isinstance(linear, PackedLinear):
        return linear.packed
    weight: Any = linear.weight
    return FourBitWeight.of(weight) if isinstance(linear, Linear4bit) else weight


def dense_weight(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]; of a linear that is known, or of `Linear8bitLt`. Those that are not quantized have it in their own."""
    if isinstance(linear, Linear8bitLt):
        return eight_bit_weight(*eight_bit_codes(linear), dtype)
    weight = kernel_weight(linear)
    if isinstance(weight, FourBitWeight):
        return dequantize(weight, dtype)
    return frozen_weight(weight, dtype).T if isinstance(weight, PackedWeight) else weight


def eight_bit_codes(linear: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 codes [N, K], fp32 scales [N]: each row's largest magnitude), wherever bitsandbytes keeps them now."""
    state = linear.state
    return linear.weight.data, linear.weight.SCB if state.SCB is None else state.SCB


def eight_bit_weight(codes_NK: torch.Tensor, scales_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] in `dtype`, in the operations of bitsandbytes (MatMul8bitFp, and the backward of MatMul8bitLt)."""
    return codes_NK.to(dtype).mul_(scales_N.unsqueeze(1).mul(1.0 / 127.0))
