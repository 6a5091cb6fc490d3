"""Attention of one token a row to a cache of keys and values, and putting the token's own into it: a step of decoding.

    o = Σ_s exp(q·k_s·scale + bias_s) · v_s / Σ_s exp(q·k_s·scale + bias_s)

The slots of a cache are split over programs, each with its own maximum, sum of exponentials and sum of values, and the
last program to arrive puts these together (Dao et al. 2023, "Flash-Decoding for long-context inference"). Heads that
share keys are rows of one product. Slots before the first and behind the last that the mask shows are not read: a cache
is longer than its text.

Shapes: B rows, H heads, G heads of keys, R = H / G, S slots, D width of a head.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from qlora.kernels.gptq_gemv import DTYPES, LEAST_ROOM, processors

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

WIDEST = 256
MOST_PARTS = 32
LOOK = 1024
"""Slots of a mask that are looked at together."""
MOST_COUNTERS = 1 << 16


@dataclass(frozen=True)
class Tiles:
    """How attention is cut up."""

    slots: int
    """That a program holds at a time."""
    stages: int
    """Of these that are under way from memory or being multiplied."""
    per_processor: int
    """Programs that there should be for each multiprocessor; slots are split to have them."""


TILES = Tiles(slots=64, stages=2, per_processor=8)
"""The fastest of those that scripts/bench/one_token.py tries, on an H200."""


def takes(query_BH1D: torch.Tensor, key_BGSD: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `attend` has a kernel for these."""
    rows, heads, tokens, width = query_BH1D.shape
    groups = key_BGSD.shape[1]
    return (
        triton is not None
        and query_BH1D.is_cuda
        and query_BH1D.dtype == key_BGSD.dtype in DTYPES
        and tokens == 1
        and width <= WIDEST
        and heads % groups == 0
        and rows * groups <= MOST_COUNTERS
        and query_BH1D.stride(3) == key_BGSD.stride(3) == 1
        and (mask is None or (mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[3] == key_BGSD.shape[2]))
    )


def attend(
    query_BH1D: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cut: Tiles = TILES,
) -> torch.Tensor:
    """o [B, 1, H, D] in the dtype of the query, from sums in fp32; for what `takes` holds for.

    mask: [1 or B, 1, 1, S], of booleans (attend where true) or of numbers that are added. Counters are shared by the
    calls of a device, which therefore run one after the other, on one stream.
    """
    (rows, heads, _, width), (groups, slots) = query_BH1D.shape, key_BGSD.shape[1:3]
    tiles = triton.cdiv(slots, cut.slots)
    wanted = triton.cdiv(cut.per_processor * processors(query_BH1D.device), rows * groups)
    each = triton.cdiv(tiles, min(tiles, MOST_PARTS, wanted))
    parts = triton.cdiv(tiles, each)
    out = torch.empty(rows, 1, heads, width, dtype=query_BH1D.dtype, device=query_BH1D.device)
    room = max(LEAST_ROOM, triton.next_power_of_2(heads // groups))
    wide = triton.next_power_of_2(max(16, width))
    sums = torch.empty(parts, rows * heads, wide + 2, dtype=torch.float32, device=out.device) if parts > 1 else out
    look = min(LOOK, triton.next_power_of_2(each * cut.slots))
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    by_row = mask.stride(0) if mask is not None and len(mask) > 1 else 0
    _attend_kernel[(parts, rows * groups)](
        query_BH1D, key_BGSD, value_BGSD, query_BH1D if mask is None else mask, out, sums, _counters(out.device),
        scale * math.log2(math.e), slots, each * cut.slots, rows * heads,
        *query_BH1D.stride()[:2], *key_BGSD.stride()[:3], *value_BGSD.stride()[:3], by_row,
        MASK=kind, GROUPS=groups, SHARED=heads // groups, ROOM=room, WIDTH=width, WIDE=wide, LOOK=look,
        TILE=cut.slots, STAGES=cut.stages, PARTS=parts, PARTS_UP=triton.next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
    return out


def reference(
    query_BH1D: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The same in plain PyTorch, in fp32."""
    shared = query_BH1D.shape[1] // key_BGSD.shape[1]
    key, value = (x.float().repeat_interleave(shared, dim=1) for x in (key_BGSD, value_BGSD))
    scores = query_BH1D.float() @ key.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return (scores.softmax(-1) @ value).transpose(1, 2).to(query_BH1D.dtype)


def append(
    keys_BGSD: torch.Tensor,
    values_BGSD: torch.Tensor,
    positions_T: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
) -> None:
    """Put keys and values of T tokens into the slots of the numbers in `positions_T`, int64 on their device."""
    (rows, groups, _, width), tokens = keys_BGSD.shape, key_BGTD.shape[2]
    contiguous = key_BGTD.stride(3) == value_BGTD.stride(3) == 1
    if triton is None or not keys_BGSD.is_cuda or tokens > 1 or not contiguous:
        keys_BGSD.index_copy_(2, positions_T, key_BGTD)
        values_BGSD.index_copy_(2, positions_T, value_BGTD)
        return
    _append_kernel[(groups, rows)](
        keys_BGSD, values_BGSD, positions_T, key_BGTD, value_BGTD,
        *keys_BGSD.stride()[:3], *values_BGSD.stride()[:3], *key_BGTD.stride()[:2], *value_BGTD.stride()[:2],
        WIDTH=width, WIDE=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    """By which the last program of a head knows that it is the last; zero between calls."""
    return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)


if triton is not None:

    @triton.jit
    def _bias(mask_ptr, slot, end, MASK: tl.constexpr):
        """What is added to scores, for powers of two. MASK: 0 for none, 1 for booleans, 2 for numbers."""
        bias = tl.where(slot < end, 0.0, float("-inf"))
        if MASK == 1:
            bias = tl.where(tl.load(mask_ptr + slot, mask=slot < end, other=0) != 0, bias, float("-inf"))
        if MASK == 2:
            bias += tl.load(mask_ptr + slot, mask=slot < end, other=0.0).to(tl.float32) * 1.4426950408889634
        return bias

    @triton.jit
    def _attend_kernel(
        q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, sums_ptr, arrivals_ptr, scale, slots, each, all_heads,
        q_row, q_head, k_row, k_head, k_slot, v_row, v_head, v_slot, mask_row,
        MASK: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr,
        WIDE: tl.constexpr, LOOK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
        PARTS_UP: tl.constexpr,
    ):  # fmt: skip
        """One program: `each` slots of the heads that share keys. `scale` is for powers of two."""
        part = tl.program_id(0)
        row, group = (tl.program_id(1) // GROUPS).to(tl.int64), tl.program_id(1) % GROUPS
        head, at = group * SHARED + tl.arange(0, ROOM), tl.arange(0, WIDE)
        is_head, in_width = tl.arange(0, ROOM) < SHARED, at < WIDTH
        q_place = q_ptr + row * q_row + head[:, None] * q_head + at[None, :]
        query = tl.load(q_place, mask=is_head[:, None] & in_width[None, :], other=0.0)
        top = tl.full((ROOM,), float("-inf"), tl.float32)
        bottom = tl.zeros((ROOM,), tl.float32)
        total = tl.zeros((ROOM, WIDE), tl.float32)
        begin = part * each
        end = tl.minimum(begin + each, slots)
        mask_ptr += row * mask_row
        if MASK > 0:
            seen_first, seen_last = end, begin - 1
            for first in range(begin, end, LOOK):
                slot = first + tl.arange(0, LOOK)
                seen = _bias(mask_ptr, slot, end, MASK) > float("-inf")
                seen_first = tl.minimum(seen_first, tl.min(tl.where(seen, slot, end), axis=0))
                seen_last = tl.maximum(seen_last, tl.max(tl.where(seen, slot, begin - 1), axis=0))
            begin += (seen_first - begin) // TILE * TILE
            end = seen_last + 1
        k_place = k_ptr + row * k_row + group * k_head + at[None, :]
        v_place = v_ptr + row * v_row + group * v_head + at[None, :]
        for first in tl.range(begin, end, TILE, num_stages=STAGES):
            slot = first + tl.arange(0, TILE)
            inside = (slot < end)[:, None] & in_width[None, :]
            keys = tl.load(k_place + slot[:, None] * k_slot, mask=inside, other=0.0)
            values = tl.load(v_place + slot[:, None] * v_slot, mask=inside, other=0.0)
            scores = tl.dot(query, tl.trans(keys)) * scale + _bias(mask_ptr, slot, end, MASK)[None, :]
            higher = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(higher > float("-inf"), higher, 0.0)  # of a tile that the mask hides whole
            weights = tl.exp2(scores - base[:, None])
            kept = tl.exp2(top - base)
            bottom = bottom * kept + tl.sum(weights, axis=1)
            total = tl.dot(weights.to(values.dtype), values, total * kept[:, None])
            top = higher
        out_place = out_ptr + (row * GROUPS * SHARED + head[:, None]) * WIDTH + at[None, :]
        inside_out = is_head[:, None] & in_width[None, :]
        if PARTS == 1:
            tl.store(out_place, (total / bottom[:, None]).to(out_ptr.dtype.element_ty), mask=inside_out)
        else:
            # Of a part and head: WIDE sums of values, the maximum, and the sum of exponentials.
            mine = sums_ptr + (part.to(tl.int64) * all_heads + row * GROUPS * SHARED + head) * (WIDE + 2)
            tl.store(mine[:, None] + at[None, :], total, mask=is_head[:, None])
            tl.store(mine + WIDE, top, mask=is_head)
            tl.store(mine + WIDE + 1, bottom, mask=is_head)
            tl.debug_barrier()  # every thread's sums are stored before one says so
            if tl.atomic_add(arrivals_ptr + tl.program_id(1), 1, sem="acq_rel") == PARTS - 1:
                tl.store(arrivals_ptr + tl.program_id(1), 0)
                parts = tl.arange(0, PARTS_UP).to(tl.int64)
                for shared in range(SHARED):
                    of_head = row * GROUPS * SHARED + group * SHARED + shared
                    of_parts = sums_ptr + (parts * all_heads + of_head) * (WIDE + 2)
                    is_part = parts < PARTS
                    tops = tl.load(of_parts + WIDE, mask=is_part, other=float("-inf"), cache_modifier=".cg")
                    bottoms = tl.load(of_parts + WIDE + 1, mask=is_part, other=0.0, cache_modifier=".cg")
                    sums = tl.load(
                        of_parts[:, None] + at[None, :], mask=is_part[:, None], other=0.0, cache_modifier=".cg"
                    )
                    weights = tl.exp2(tops - tl.max(tops, axis=0))
                    value = tl.sum(sums * weights[:, None], axis=0) / tl.sum(bottoms * weights, axis=0)
                    tl.store(out_ptr + of_head * WIDTH + at, value.to(out_ptr.dtype.element_ty), mask=in_width)

    @triton.jit
    def _append_kernel(
        keys_ptr, values_ptr, position_ptr, key_ptr, value_ptr,
        keys_row, keys_head, keys_slot, values_row, values_head, values_slot, key_row, key_head, value_row, value_head,
        WIDTH: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """One program: a head of keys, of one token."""
        group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        at = tl.arange(0, WIDE)
        slot = tl.load(position_ptr)
        key = tl.load(key_ptr + row * key_row + group * key_head + at, mask=at < WIDTH)
        value = tl.load(value_ptr + row * value_row + group * value_head + at, mask=at < WIDTH)
        tl.store(keys_ptr + row * keys_row + group * keys_head + slot * keys_slot + at, key, mask=at < WIDTH)
        tl.store(values_ptr + row * values_row + group * values_head + slot * values_slot + at, value, mask=at < WIDTH)
