"""Rotary position embedding of queries and keys in one pass each: y = x·cos + rotate_half(x)·sin.

With x in halves x₁, x₂ along the width of a head, y₁ = x₁·c₁ − x₂·s₁ and y₂ = x₂·c₂ + x₁·s₂ (Su et al. 2021,
arXiv:2104.09864, §3.4.2); backwards dx₁ = dy₁·c₁ + dy₂·s₂ and dx₂ = dy₂·c₂ − dy₁·s₁. Computed in fp32 and rounded
once; for the backward cosines and sines are kept, and nothing of the size of x.

Shapes: B rows, H heads, T tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None


_again_with_gradients = False


@contextmanager
def again_with_gradients() -> Iterator[None]:
    """A forward without gradients that will run again with them, and has to come to the same then."""
    global _again_with_gradients
    _again_with_gradients = True
    try:
        yield
    finally:
        _again_with_gradients = False


def learns(*tensors: torch.Tensor) -> bool:
    """Whether what is computed from these has a backward, now or when it runs again."""
    return _again_with_gradients or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def rotate(
    query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both rotated, of their dtype and layout; `cos_BTD` and `sin_BTD` may be of one row for all."""
    return _Rotate.apply(query_BHTD, cos_BTD, sin_BTD), _Rotate.apply(key_BHTD, cos_BTD, sin_BTD)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_BTD, sin_BTD)
        return _rotated(x_BHTD, cos_BTD, sin_BTD, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rotated(grads[0], *ctx.saved_tensors, backward=True), None, None


def _rotated(x_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, *, backward: bool) -> torch.Tensor:
    if x_BHTD.is_cuda and triton is not None:
        return _with_triton(x_BHTD, cos_BTD, sin_BTD, backward)
    cos_B1TD, sin_B1TD = (each[:, None].float() for each in (cos_BTD, sin_BTD))
    x = x_BHTD.float()
    other = x * sin_B1TD if backward else x
    first, second = other.chunk(2, dim=-1)
    turned = torch.cat((second, -first) if backward else (-second, first), dim=-1)
    return (x * cos_B1TD + (turned if backward else turned * sin_B1TD)).to(x_BHTD.dtype)


def _with_triton(x_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, backward: bool) -> torch.Tensor:
    rows, heads, tokens, width = x_BHTD.shape
    x_BHTD = x_BHTD if x_BHTD.stride(-1) == 1 else x_BHTD.contiguous()
    out_BHTD = torch.empty(rows, tokens, heads, width, dtype=x_BHTD.dtype, device=x_BHTD.device).transpose(1, 2)
    cos_BTD, sin_BTD = cos_BTD.contiguous(), sin_BTD.contiguous()
    by_row = cos_BTD.stride(0) if len(cos_BTD) > 1 else 0
    half = width // 2
    _kernel[(tokens, rows)](
        x_BHTD, out_BHTD, cos_BTD, sin_BTD,
        *x_BHTD.stride()[:3], *out_BHTD.stride()[:3], by_row, cos_BTD.stride(1),
        BACKWARD=backward, HEADS=heads, HALF=half,
        HEADS_UP=triton.next_power_of_2(heads), HALF_UP=triton.next_power_of_2(half),
    )  # fmt: skip
    return out_BHTD


if triton is not None:

    @triton.jit
    def _kernel(
        x_ptr, out_ptr, cos_ptr, sin_ptr,
        x_row, x_head, x_token, out_row, out_head, out_token, angle_row, angle_token,
        BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
        HEADS_UP: tl.constexpr, HALF_UP: tl.constexpr,
    ):  # fmt: skip
        """One program per token turns all its heads."""
        token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        head, at = tl.arange(0, HEADS_UP)[:, None], tl.arange(0, HALF_UP)[None, :]
        inside = (head < HEADS) & (at < HALF)
        angles = row * angle_row + token * angle_token + at
        cos_1 = tl.load(cos_ptr + angles, mask=at < HALF, other=0.0).to(tl.float32)
        cos_2 = tl.load(cos_ptr + angles + HALF, mask=at < HALF, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin_ptr + angles, mask=at < HALF, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin_ptr + angles + HALF, mask=at < HALF, other=0.0).to(tl.float32)
        place = x_ptr + row * x_row + token * x_token + head * x_head + at
        x_1 = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        x_2 = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            y_1 = x_1 * cos_1 + x_2 * sin_2
            y_2 = x_2 * cos_2 - x_1 * sin_1
        else:
            y_1 = x_1 * cos_1 - x_2 * sin_1
            y_2 = x_2 * cos_2 + x_1 * sin_2
        place = out_ptr + row * out_row + token * out_token + head * out_head + at
        tl.store(place, y_1.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(place + HALF, y_2.to(out_ptr.dtype.element_ty), mask=inside)
