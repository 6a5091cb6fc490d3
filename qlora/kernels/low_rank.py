"""y + u·Vᵀ + r in one pass over y: what an adapter adds to a product, and a residual beside it.

A product with few ranks is bound by memory; cuBLAS reads and writes y for it at two thirds of the bandwidth, and the
residual would be a pass of its own.

Shapes: T tokens, N outputs, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

# Of the row of an adapter that a tile can be multiplied with in registers; larger ones have passes of their own.
MOST_RANK_BYTES = 128
# Tokens and columns that a program holds at a time; of the tiles that it has under way, one is computed while the next
# ones are read. Programs that a multiprocessor runs at a time.
TILE = (64, 64)
RESIDENT = 3


def add_low_rank_(
    y_TN: torch.Tensor, u_TR: torch.Tensor, v_NR: torch.Tensor, beside_TN: torch.Tensor | None = None
) -> torch.Tensor:
    """y + u·vᵀ, and r where there is one, in the memory of y and in its dtype; v may be a transposed tensor."""
    if not in_registers(y_TN, [u_TR.shape[1]]):
        y_TN.addmm_(u_TR, v_NR.T)
        return y_TN if beside_TN is None else y_TN.add_(beside_TN)
    tokens, width = y_TN.shape
    beside_TN = None if beside_TN is None else beside_TN.contiguous()
    columns = triton.cdiv(width, TILE[1])
    each = tiles_each(triton.cdiv(tokens, TILE[0]), columns, RESIDENT, y_TN.device)
    _add_kernel[(columns, triton.cdiv(tokens, TILE[0] * each))](
        y_TN, u_TR, v_NR, y_TN if beside_TN is None else beside_TN, tokens, width, each * TILE[0],
        y_TN.stride(0), u_TR.stride(0), v_NR.stride(0), v_NR.stride(1),
        BESIDE=beside_TN is not None, RANK=u_TR.shape[1], RANKS=room([u_TR.shape[1]]),
        TOKENS=TILE[0], COLUMNS=TILE[1], STAGES=stages(y_TN), num_warps=4,
    )  # fmt: skip
    return y_TN


def in_registers(x: torch.Tensor, ranks: Sequence[int]) -> bool:
    """Whether kernels here and in `gated_tiles` multiply with adapters of these ranks."""
    return x.is_cuda and triton is not None and max(ranks) * x.element_size() <= MOST_RANK_BYTES


@cache
def tiles_each(tiles: int, programs: int, resident: int, device: torch.device) -> int:
    """How many of `tiles` one program takes, where `programs` do so each: so that few multiprocessors idle at the end.

    resident: programs that a multiprocessor runs at a time.
    """
    slots = resident * torch.cuda.get_device_properties(device).multi_processor_count

    def duration(each: int) -> int:  # a tile more for the start and the end of each
        return -(-programs * -(-tiles // each) // slots) * (each + 1)

    return min(range(1, tiles + 1), key=duration)


def room(ranks: Sequence[int]) -> int:
    """Of each adapter in a product of tiles, which has 16 rows or more; 0 for none."""
    return max(16, triton.next_power_of_2(max(ranks))) if any(ranks) else 0


def stages(x: torch.Tensor) -> int:
    """Tiles under way at a time: what shared memory has room for."""
    return 3 if x.element_size() == 2 else 2


if triton is not None:

    @triton.jit(do_not_specialize=["tokens", "each"])
    def _add_kernel(
        y_ptr, u_ptr, v_ptr, beside_ptr, tokens, width, each, y_stride, u_stride, v_stride, v_rank_stride,
        BESIDE: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
        TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """Some columns of `each` tokens, tile by tile."""
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        rank = tl.arange(0, RANKS)
        v_at = column[None, :] * v_stride + rank[:, None] * v_rank_stride
        v = tl.load(v_ptr + v_at, mask=(column < width)[None, :] & (rank < RANK)[:, None], other=0.0)
        first = tl.program_id(1) * each
        for start in tl.range(first, min(first + each, tokens), TOKENS, num_stages=STAGES):
            token = start + tl.arange(0, TOKENS)
            inside = (token < tokens)[:, None] & (column < width)[None, :]
            at = token.to(tl.int64)[:, None]
            u_inside = (token < tokens)[:, None] & (rank < RANK)[None, :]
            u = tl.load(u_ptr + at * u_stride + rank[None, :], mask=u_inside, other=0.0)
            y = tl.load(y_ptr + at * y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            if BESIDE:
                y += tl.load(beside_ptr + at * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
            y += tl.dot(u, v, input_precision="ieee")
            tl.store(y_ptr + at * y_stride + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
