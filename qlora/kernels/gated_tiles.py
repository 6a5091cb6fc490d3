"""The passes of a gated feed-forward block over [T, F] on a GPU, a tile at a time, with what adapters have in them.

A program walks over tiles with the sums of an adapter in registers: forwards along the width, for the inner product
h·Aᵀ of the down projection; backwards along the tokens, for the gradients dB of gate and up and dA of down.

Shapes: T tokens, F width of the block, R ranks of gate and up together, r of down.
"""

from __future__ import annotations

import torch

from qlora.kernels.lora_linears import Copies
from qlora.kernels.low_rank import room, stages, tiles_each

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

# Tokens and columns that a program holds at a time, forwards and backwards; programs that a multiprocessor runs at a
# time.
FORWARD_TILE, TILE = (64, 64), (64, 64)
RESIDENT = 2


def gated(
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor,
    silu: bool,
    inner_TR: torch.Tensor | None = None,
    first: Copies | None = None,
    last: Copies | None = None,
    *,
    inner_alone: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """h = act(g)·u and, with adapters, h·Aᵀ [T, r] of the one of down; inner_alone: that, and no h.

    inner_TR, first: what adapters of gate and up have yet to add. Not silu: GELU in its tanh form.
    """
    tokens, width = gate_TF.shape
    out_TF = None if inner_alone else torch.empty_like(gate_TF)
    rows, tiles = triton.cdiv(tokens, FORWARD_TILE[0]), triton.cdiv(width, FORWARD_TILE[1])
    each = tiles_each(tiles, rows, RESIDENT, gate_TF.device)
    programs = triton.cdiv(tiles, each)
    ranks, tensors, sums = [0, 0, 0], [gate_TF] * 4, gate_TF
    if inner_TR is not None and first is not None and last is not None:
        ranks = [*(up.shape[1] for up in first.ups), last.down_RK.shape[0]]
        tensors = [inner_TR, *first.ups, last.down_RK]
        sums = torch.empty(programs, tokens, room(ranks), dtype=torch.float32, device=gate_TF.device)
    _gated_kernel[(rows, programs)](
        gate_TF, up_TF, gate_TF if out_TF is None else out_TF, *tensors, sums, tokens, width, each,
        GATE_RANK=ranks[0], UP_RANK=ranks[1], DOWN_RANK=ranks[2], RANKS=room(ranks), SILU=silu, STORES=not inner_alone,
        TOKENS=FORWARD_TILE[0], COLUMNS=FORWARD_TILE[1], STAGES=stages(gate_TF), num_warps=4,
    )  # fmt: skip
    return out_TF, sums.sum(0)[:, : ranks[2]].to(gate_TF.dtype) if any(ranks) else None


def gated_gradients(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, grad_TF: torch.Tensor, silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dg, du) from dh, nothing added to anything."""
    of_gate_TF, of_up_TF = torch.empty_like(gate_TF), torch.empty_like(up_TF)
    tokens, width = gate_TF.shape
    grid = (triton.cdiv(width, TILE[1]), triton.cdiv(tokens, TILE[0]))
    unused = [gate_TF] * 6
    _gradients_kernel[grid](
        gate_TF, up_TF, grad_TF.contiguous(), of_gate_TF, of_up_TF, *unused, tokens, width, TILE[0],
        GATE_RANK=0, UP_RANK=0, DOWN_RANK=0, RANKS=0,
        SILU=silu, TOKENS=TILE[0], COLUMNS=TILE[1], STAGES=1,
    )  # fmt: skip
    return of_gate_TF, of_up_TF


def all_gradients(
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor,
    grad_TF: torch.Tensor,
    silu: bool,
    inner_TR: torch.Tensor,
    first: Copies,
    u_Tr: torch.Tensor,
    last: Copies,
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """((dg, du) in the memory of g and u, [dB of gate and of up] not scaled yet, dA of down), the last ones in fp32.

    From g, u and dh without what adapters add: inner [T, R] is theirs of gate and up, u [T, r] of down.
    """
    tokens, width = gate_TF.shape
    ranks = (*(up.shape[1] for up in first.ups), last.down_RK.shape[0])
    columns = triton.cdiv(width, TILE[1])
    each = TILE[0] * tiles_each(triton.cdiv(tokens, TILE[0]), columns, RESIDENT, gate_TF.device)
    programs = triton.cdiv(tokens, each)
    sums = torch.empty(programs, 3, width, room(ranks), dtype=torch.float32, device=gate_TF.device)
    _gradients_kernel[(columns, programs)](
        gate_TF, up_TF, grad_TF.contiguous(), gate_TF, up_TF, inner_TR, *first.ups, u_Tr, last.down_RK, sums,
        tokens, width, each,
        GATE_RANK=ranks[0], UP_RANK=ranks[1], DOWN_RANK=ranks[2], RANKS=room(ranks), SILU=silu,
        TOKENS=TILE[0], COLUMNS=TILE[1], STAGES=stages(gate_TF), num_warps=4 if room(ranks) == 16 else 8,
    )  # fmt: skip
    of_gate, of_up, of_down = sums.sum(0)
    of_ups = [of_gate[:, : ranks[0]], of_up[:, : ranks[1]]]
    return (gate_TF, up_TF), of_ups, of_down.view(-1, width)[: ranks[2]]


if triton is not None:

    @triton.jit
    def _act(x, SILU: tl.constexpr):
        """(act(x), act'(x)) of fp32."""
        if SILU:
            share = tl.sigmoid(x)
            return x * share, share * (1 + x * (1 - share))
        else:
            share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
            return x * share, share * (1 + x * (1 - share) * slope)

    @triton.jit
    def _inner(ptr, token, stride, tokens, RANK: tl.constexpr, RANKS: tl.constexpr):
        """[TOKENS, RANKS], of which RANK exist."""
        rank = tl.arange(0, RANKS)[None, :]
        at = token.to(tl.int64)[:, None] * stride + rank
        return tl.load(ptr + at, mask=(token < tokens)[:, None] & (rank < RANK), other=0.0)

    @triton.jit
    def _up(ptr, column, width, RANK: tl.constexpr, RANKS: tl.constexpr):
        """[RANKS, COLUMNS] of B [F, RANK]."""
        rank = tl.arange(0, RANKS)[:, None]
        return tl.load(ptr + column[None, :] * RANK + rank, mask=(column < width)[None, :] & (rank < RANK), other=0.0)

    @triton.jit(do_not_specialize=["tokens", "each"])
    def _gated_kernel(
        gate_ptr, up_ptr, out_ptr, inner_ptr, gate_up_ptr, up_up_ptr, down_ptr, sums_ptr, tokens, width, each,
        GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, DOWN_RANK: tl.constexpr, RANKS: tl.constexpr,
        SILU: tl.constexpr, STORES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """Some tokens of `each` tiles of columns: act(g)·u, and the sums over columns of its product with A."""
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        row = token.to(tl.int64)[:, None]
        if RANKS > 0:
            rank = tl.arange(0, RANKS)
            of_gate = _inner(inner_ptr, token, GATE_RANK + UP_RANK, tokens, GATE_RANK, RANKS)
            of_up = _inner(inner_ptr + GATE_RANK, token, GATE_RANK + UP_RANK, tokens, UP_RANK, RANKS)
            sum_down = tl.zeros((TOKENS, RANKS), tl.float32)
        first = tl.program_id(1) * each
        for tile in tl.range(first, min(first + each, tl.cdiv(width, COLUMNS)), num_stages=STAGES):
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            at = row * width + column[None, :]
            inside = (token < tokens)[:, None] & (column < width)[None, :]
            gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if RANKS > 0:
                down_at = column[:, None] + rank[None, :] * width
                down_inside = (column < width)[:, None] & (rank < DOWN_RANK)[None, :]
                down = tl.load(down_ptr + down_at, mask=down_inside, other=0.0)
                gate += tl.dot(of_gate, _up(gate_up_ptr, column, width, GATE_RANK, RANKS), input_precision="ieee")
                up += tl.dot(of_up, _up(up_up_ptr, column, width, UP_RANK, RANKS), input_precision="ieee")
            act, _ = _act(gate, SILU)
            hidden = (act * up).to(out_ptr.dtype.element_ty)
            if STORES:
                tl.store(out_ptr + at, hidden, mask=inside)
            if RANKS > 0:
                sum_down += tl.dot(hidden, down, input_precision="ieee")
        if RANKS > 0:
            place = (tl.program_id(1).to(tl.int64) * tokens + row) * RANKS + rank[None, :]
            tl.store(sums_ptr + place, sum_down, mask=(token < tokens)[:, None])

    @triton.jit(do_not_specialize=["tokens", "each"])
    def _gradients_kernel(
        gate_ptr, up_ptr, grad_ptr, of_gate_ptr, of_up_ptr,
        inner_ptr, gate_up_ptr, up_up_ptr, u_ptr, down_ptr, sums_ptr, tokens, width, each,
        GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, DOWN_RANK: tl.constexpr, RANKS: tl.constexpr,
        SILU: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """Some columns of `each` tokens, tile by tile: dg and du, and the sums over tokens for dB and dA."""
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        dtype = of_gate_ptr.dtype.element_ty
        if RANKS > 0:
            rank = tl.arange(0, RANKS)
            gate_up = _up(gate_up_ptr, column, width, GATE_RANK, RANKS)
            up_up = _up(up_up_ptr, column, width, UP_RANK, RANKS)
            down_at = rank[:, None] * width + column[None, :]
            down_inside = (rank < DOWN_RANK)[:, None] & (column < width)[None, :]
            down = tl.load(down_ptr + down_at, mask=down_inside, other=0.0)
            sum_gate = tl.zeros((RANKS, COLUMNS), tl.float32)
            sum_up = tl.zeros((RANKS, COLUMNS), tl.float32)
            sum_down = tl.zeros((RANKS, COLUMNS), tl.float32)
        first = tl.program_id(1) * each
        for start in tl.range(first, min(first + each, tokens), TOKENS, num_stages=STAGES):
            token = start + tl.arange(0, TOKENS)
            at = token.to(tl.int64)[:, None] * width + column[None, :]
            inside = (token < tokens)[:, None] & (column < width)[None, :]
            gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if RANKS > 0:
                inner_gate = _inner(inner_ptr, token, GATE_RANK + UP_RANK, tokens, GATE_RANK, RANKS)
                inner_up = _inner(inner_ptr + GATE_RANK, token, GATE_RANK + UP_RANK, tokens, UP_RANK, RANKS)
                u = _inner(u_ptr, token, DOWN_RANK, tokens, DOWN_RANK, RANKS)
                gate += tl.dot(inner_gate, gate_up, input_precision="ieee")
                up += tl.dot(inner_up, up_up, input_precision="ieee")
                grad += tl.dot(u, down, input_precision="ieee")
            act, slope = _act(gate, SILU)
            of_gate = (grad * up * slope).to(dtype)
            of_up = (grad * act).to(dtype)
            tl.store(of_gate_ptr + at, of_gate, mask=inside)
            tl.store(of_up_ptr + at, of_up, mask=inside)
            if RANKS > 0:
                sum_gate += tl.dot(tl.trans(inner_gate), of_gate, input_precision="ieee")
                sum_up += tl.dot(tl.trans(inner_up), of_up, input_precision="ieee")
                sum_down += tl.dot(tl.trans(u), (act * up).to(dtype), input_precision="ieee")
        if RANKS > 0:
            place = column[None, :] * RANKS + rank[:, None]
            sums_ptr += tl.program_id(1).to(tl.int64) * 3 * width * RANKS
            tl.store(sums_ptr + place, sum_gate, mask=(column < width)[None, :])
            tl.store(sums_ptr + width * RANKS + place, sum_up, mask=(column < width)[None, :])
            tl.store(sums_ptr + 2 * width * RANKS + down_at, sum_down, mask=(column < width)[None, :])
