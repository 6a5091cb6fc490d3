"""Rotary position embedding of queries and keys in one pass: y = x·cos + rotate_half(x)·sin.

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
    query, key = _Rotate.apply(query_BHTD, key_BHTD, cos_BTD, sin_BTD)
    return query, key


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos_BTD, sin_BTD)
        return _rotated(query_BHTD, key_BHTD, cos_BTD, sin_BTD, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        return *_rotated(*grads, *ctx.saved_tensors, backward=True), None, None


def _rotated(
    query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, *, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if query_BHTD.is_cuda and triton is not None:
        return _with_triton(query_BHTD, key_BHTD, cos_BTD, sin_BTD, backward)
    return _in_torch(query_BHTD, cos_BTD, sin_BTD, backward), _in_torch(key_BHTD, cos_BTD, sin_BTD, backward)


def _in_torch(x_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, backward: bool) -> torch.Tensor:
    cos_B1TD, sin_B1TD = (each[:, None].float() for each in (cos_BTD, sin_BTD))
    x = x_BHTD.float()
    other = x * sin_B1TD if backward else x
    first, second = other.chunk(2, dim=-1)
    turned = torch.cat((second, -first) if backward else (-second, first), dim=-1)
    return (x * cos_B1TD + (turned if backward else turned * sin_B1TD)).to(x_BHTD.dtype)


def _with_triton(
    query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, _, tokens, width = query_BHTD.shape
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query_BHTD, key_BHTD))
    out_query, out_key = (
        torch.empty(rows, tokens, x.shape[1], width, dtype=x.dtype, device=x.device).transpose(1, 2)
        for x in (query, key)
    )
    cos_BTD, sin_BTD = cos_BTD.contiguous(), sin_BTD.contiguous()
    by_row = cos_BTD.stride(0) if len(cos_BTD) > 1 else 0
    heads, half = (query.shape[1], key.shape[1]), width // 2
    _kernel[(tokens, rows, 2)](
        query, out_query, key, out_key, cos_BTD, sin_BTD,
        *query.stride()[:3], *out_query.stride()[:3], *key.stride()[:3], *out_key.stride()[:3],
        by_row, cos_BTD.stride(1), BACKWARD=backward, QUERIES=heads[0], KEYS=heads[1], HALF=half,
        QUERIES_UP=triton.next_power_of_2(heads[0]), KEYS_UP=triton.next_power_of_2(heads[1]),
        HALF_UP=triton.next_power_of_2(half),
    )  # fmt: skip
    return out_query, out_key


if triton is not None:

    @triton.jit
    def _kernel(
        query_ptr, out_query_ptr, key_ptr, out_key_ptr, cos_ptr, sin_ptr,
        query_row, query_head, query_token, out_query_row, out_query_head, out_query_token,
        key_row, key_head, key_token, out_key_row, out_key_head, out_key_token, angle_row, angle_token,
        BACKWARD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr,
        QUERIES_UP: tl.constexpr, KEYS_UP: tl.constexpr, HALF_UP: tl.constexpr,
    ):  # fmt: skip
        """One program per token turns all heads of its queries, another those of its keys."""
        token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        angles = row * angle_row + token * angle_token
        if tl.program_id(2) == 0:
            _turn(
                query_ptr + row * query_row + token * query_token, query_head,
                out_query_ptr + row * out_query_row + token * out_query_token, out_query_head,
                cos_ptr + angles, sin_ptr + angles, BACKWARD, QUERIES, HALF, QUERIES_UP, HALF_UP,
            )  # fmt: skip
        else:
            _turn(
                key_ptr + row * key_row + token * key_token, key_head,
                out_key_ptr + row * out_key_row + token * out_key_token, out_key_head,
                cos_ptr + angles, sin_ptr + angles, BACKWARD, KEYS, HALF, KEYS_UP, HALF_UP,
            )  # fmt: skip

    @triton.jit
    def _turn(
        x_ptr, x_head, out_ptr, out_head, cos_ptr, sin_ptr,
        BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
        HEADS_UP: tl.constexpr, HALF_UP: tl.constexpr,
    ):  # fmt: skip
        """All heads of one token."""
        head, at = tl.arange(0, HEADS_UP)[:, None], tl.arange(0, HALF_UP)[None, :]
        inside = (head < HEADS) & (at < HALF)
        cos_1 = tl.load(cos_ptr + at, mask=at < HALF, other=0.0).to(tl.float32)
        cos_2 = tl.load(cos_ptr + at + HALF, mask=at < HALF, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin_ptr + at, mask=at < HALF, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin_ptr + at + HALF, mask=at < HALF, other=0.0).to(tl.float32)
        x_1 = tl.load(x_ptr + head * x_head + at, mask=inside, other=0.0).to(tl.float32)
        x_2 = tl.load(x_ptr + head * x_head + at + HALF, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            y_1 = x_1 * cos_1 + x_2 * sin_2
            y_2 = x_2 * cos_2 - x_1 * sin_1
        else:
            y_1 = x_1 * cos_1 - x_2 * sin_1
            y_2 = x_2 * cos_2 + x_1 * sin_2
        tl.store(out_ptr + head * out_head + at, y_1.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + head * out_head + at + HALF, y_2.to(out_ptr.dtype.element_ty), mask=inside)
