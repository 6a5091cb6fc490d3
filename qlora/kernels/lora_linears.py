"""Linears with one input, their LoRA adapters on frozen weights, as one differentiable operation.

    y_i = x·W_iᵀ + b_i + s_i·(x·A_iᵀ)·B_iᵀ

With u = [s_i·dy_i·B_i] and A = [A_i], both side by side over all i,

    dx = Σ_i dy_i·W_i + u·A,   dA = uᵀ·x,   dB_i = s_i·dy_iᵀ·(x·A_iᵀ)

so that the backward needs x, the parameters, and x·Aᵀ, which is small and kept; quantized weights are dequantized
again, into one buffer for all of them. Products are in the dtype of x; gradients of adapters come out of them in fp32
where the GPU can. Where x is a norm of something that is kept anyway, x = σ·z·g by rows and columns, it is not made
again: dA = ((uσ)ᵀ·z)·g.

Shapes: T tokens, K inputs, N outputs, R ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from qlora.kernels import float8, packed_linear
from qlora.kernels.float8 import Float8Weight, rows_of
from qlora.kernels.four_bit import FourBitWeight, dequantize
from qlora.kernels.low_rank import add_low_rank_
from qlora.kernels.packed_linear import PackedWeight

_buffers: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


@dataclass(frozen=True)
class FrozenLinear:
    """What does not learn of one linear, and how its adapter is scaled."""

    weight: FourBitWeight | PackedWeight | Float8Weight | torch.Tensor
    """Quantized, or [N, K] in the dtype of x."""
    bias_N: torch.Tensor | None
    scaling: float
    float8: bool = False
    """Products with it are in 8 bits (`float8`), those with the adapter in the dtype of x."""


@dataclass(frozen=True)
class Source:
    """What x is a norm of, in place of which it need not be kept: x = tensor · share · gain."""

    tensor: torch.Tensor
    """[..., K], of as many elements as x."""
    share: torch.Tensor
    """[...], fp32 or better."""
    gain_K: torch.Tensor


@dataclass(frozen=True)
class Copies:
    """Adapters of one input as products want them: in the dtype of x, one below the other, scaled."""

    down_RK: torch.Tensor
    """All A."""
    ups: tuple[torch.Tensor, ...]
    """Each s·B [N, r]."""

    @classmethod
    def of(cls, matrices: Sequence[torch.Tensor], linears: Sequence[FrozenLinear], dtype: torch.dtype) -> Copies:
        """Of A and B of the first linear, of the second, and so on."""
        down_RK = torch.cat([matrix.to(dtype) for matrix in matrices[::2]])
        ups = [(matrix * linear.scaling).to(dtype) for matrix, linear in zip(matrices[1::2], linears, strict=True)]
        return cls(down_RK, tuple(ups))

    @property
    def parts(self) -> list[slice]:
        """Which of the R columns belong to which linear."""
        ends = list(accumulate((up.shape[1] for up in self.ups), initial=0))
        return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]


def lora_linears(
    x_TK: torch.Tensor,
    linears: Sequence[FrozenLinear],
    adapters: Sequence[tuple[torch.Tensor, torch.Tensor]],
    source: Source | None = None,
    copies: Copies | None = None,
) -> tuple[torch.Tensor, ...]:
    """y_i [T, N_i] of every linear; `adapters` are its (A [r, K], B [N, r]), in the dtype of x or in fp32.

    copies: of the adapters as they are until the backward is done; made here if not given.
    """
    matrices = [matrix for pair in adapters for matrix in pair]
    copies = copies or Copies.of([matrix.detach() for matrix in matrices], linears, x_TK.dtype)
    return _LoraLinears.apply(x_TK, tuple(linears), copies, source, *matrices)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        linears: tuple[FrozenLinear, ...],
        copies: Copies,
        source: Source | None,
        *matrices: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        inner_TR = x_TK @ copies.down_RK.T
        ctx.save_for_backward(inner_TR, *kept_input(x_TK, source))
        ctx.linears, ctx.copies, ctx.dtype = linears, copies, matrices[0].dtype
        outputs = products(x_TK, linears)
        add_adapters_(outputs, inner_TR, copies)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inner_TR, *kept = ctx.saved_tensors
        linears, copies = ctx.linears, ctx.copies
        u_TR = into_ranks(grads, copies)
        of_ups = gradients_of_ups(grads, inner_TR, linears, copies, ctx.dtype)
        grad_x_TK = gradient_of_input(grads, u_TR, linears, copies) if ctx.needs_input_grad[0] else None
        of_downs = gradients_of_downs(u_TR, kept, copies, ctx.dtype)
        return grad_x_TK, None, None, None, *in_pairs(of_downs, of_ups)


def kept_input(x_TK: torch.Tensor, source: Source | None) -> list[torch.Tensor]:
    """What `gradients_of_downs` wants of x: itself, or its source, which has no part in the gradient of x."""
    if source is None:
        return [x_TK]
    return [source.tensor.detach().reshape(x_TK.shape), source.share.detach().reshape(-1), source.gain_K.detach()]


def products(x_TK: torch.Tensor, linears: Sequence[FrozenLinear]) -> list[torch.Tensor]:
    """x·W_iᵀ + b_i of every linear."""
    outputs = []
    x_8 = rows_of(x_TK) if any(linear.float8 for linear in linears) else None
    for linear in linears:
        if x_8 is not None and linear.float8:
            output_TN = float8.product(x_8, _in_8_bits(linear.weight, x_TK.dtype, backwards=False), fast=True)
            outputs.append(output_TN if linear.bias_N is None else output_TN.add_(linear.bias_N))
        else:
            outputs.append(torch.nn.functional.linear(x_TK, _dense(linear.weight, x_TK.dtype), linear.bias_N))
    return outputs


def add_adapters_(outputs: Sequence[torch.Tensor], inner_TR: torch.Tensor, copies: Copies) -> None:
    """To x·W_iᵀ what adapters make of x·Aᵀ."""
    for output_TN, up_NR, part in zip(outputs, copies.ups, copies.parts, strict=True):
        add_low_rank_(output_TN, inner_TR[:, part], up_NR)


def into_ranks(grads: Sequence[torch.Tensor], copies: Copies) -> torch.Tensor:
    """u [T, R] of the gradients of every y_i."""
    u_TR = grads[0].new_empty(len(grads[0]), len(copies.down_RK))
    for grad_TN, up_NR, part in zip(grads, copies.ups, copies.parts, strict=True):
        torch.mm(grad_TN, up_NR, out=u_TR[:, part])
    return u_TR


def gradients_of_ups(
    grads: Sequence[torch.Tensor],
    inner_TR: torch.Tensor,
    linears: Sequence[FrozenLinear],
    copies: Copies,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """dB_i in `dtype`."""
    return [
        product(grad_TN.T, inner_TR[:, part], dtype).mul_(linear.scaling)
        for linear, part, grad_TN in zip(linears, copies.parts, grads, strict=True)
    ]


def gradient_of_input(
    grads: Sequence[torch.Tensor], u_TR: torch.Tensor | None, linears: Sequence[FrozenLinear], copies: Copies
) -> torch.Tensor:
    """dx; without what comes through the adapters if there is no u."""
    grad_x_TK = None
    for linear, grad_TN in zip(linears, grads, strict=True):
        if linear.float8:
            weight_8 = _in_8_bits(linear.weight, grad_TN.dtype, backwards=True)
            found_TK = float8.product(rows_of(grad_TN), weight_8, fast=False)
            grad_x_TK = found_TK if grad_x_TK is None else grad_x_TK.add_(found_TK)
        elif grad_x_TK is None:
            grad_x_TK = grad_TN @ _dense(linear.weight, grad_TN.dtype)
        else:
            grad_x_TK.addmm_(grad_TN, _dense(linear.weight, grad_TN.dtype))
    assert grad_x_TK is not None
    return grad_x_TK if u_TR is None else add_low_rank_(grad_x_TK, u_TR, copies.down_RK.T)


def gradients_of_downs(
    u_TR: torch.Tensor, kept: Sequence[torch.Tensor], copies: Copies, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """dA_i in `dtype`, from what `kept_input` gave."""
    x_TK, *norm = kept
    if norm:
        share_T, gain_K = norm
        u_TR = (u_TR * share_T[:, None]).to(u_TR.dtype)
    found_RK = product(u_TR.T, x_TK, dtype)
    return (found_RK.mul_(gain_K) if norm else found_RK).split([up.shape[1] for up in copies.ups])


def in_pairs(of_downs: Sequence[torch.Tensor], of_ups: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of A and B in the order of parameters: dA, dB of the first linear, of the second, and so on."""
    return [matrix for pair in zip(of_downs, of_ups, strict=True) for matrix in pair]


def product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in `dtype`."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(dtype)


def _dense(weight: FourBitWeight | PackedWeight | Float8Weight | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]; a dequantized weight is valid until the next one is asked for."""
    assert not isinstance(weight, Float8Weight), "a weight in 8 bits is multiplied with as it is"
    if isinstance(weight, torch.Tensor):
        return weight
    key, size = (weight.device, dtype), weight.shape[0] * weight.shape[1]
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = _buffers[key] = torch.empty(size, dtype=dtype, device=weight.device)
    if isinstance(weight, PackedWeight):
        return packed_linear.frozen_weight(weight, dtype, buffer[:size]).T
    return dequantize(weight, dtype, buffer[:size])


def _in_8_bits(
    weight: FourBitWeight | PackedWeight | Float8Weight | torch.Tensor, dtype: torch.dtype, *, backwards: bool
) -> float8.Rows:
    """Summed over its inputs, or backwards over its outputs."""
    if isinstance(weight, Float8Weight):
        return weight.backwards if backwards else weight.forwards
    dense_NK = _dense(weight, dtype)
    return rows_of(dense_NK.T if backwards else dense_NK)


def free_buffers() -> None:
    """Give back the memory that weights were dequantized into; the next one that is finds its own."""
    _buffers.clear()
