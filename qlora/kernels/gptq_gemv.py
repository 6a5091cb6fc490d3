"""Products of few rows with 4-bit weights that read the packed codes once: what decoding spends its time on.

    y[m, n] = Σ_k x[m, k] · scales[g, n] · (q[k, n] − z[g, n]) + added[m, n],   g = k // S

A row at a time is bound by how fast codes come from memory, so a weight must cost few instructions. Set beside the bits
of 1.0, a code of 4 bits at bit 16 or 12 of a word is the fp32 number f = 1 + q/c with c = 2⁷ or 2¹¹: no conversion, and
a shift serves two codes. Of one row, sums of x·f are multiplied by what is common to them once they are summed,

    Σ x·s·(q − z) = s · (c·Σ x·f − (c + z)·Σ x),

and of several, one multiply-add makes the exact weight, s·(q − z) = c·s·f − (c + z)·s with every term in 24 bits.

Inputs are split over programs, for there are too few outputs to fill a GPU. A program leaves its sums in a buffer, and
the last one to arrive adds them up in their order: equal inputs give equal bits. Of one row sums and weights are in
fp32; of several, weights are rounded to the dtype of x for the tensor cores.

Shapes: M rows, K inputs, N outputs, G groups of S inputs, W words of 8 codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import gelu
from torch.nn.functional import silu as silu_of

from qlora.kernels.packed_linear import PackedWeight, dequantize

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

BITS = 4
CODES = 8
"""Of a word."""
MOST_ROWS = 64
"""Rows up to which reading codes beats dequantizing them once for a large product."""
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up."""

    words: int
    """Words along inputs that a program holds at a time: 8 inputs each."""
    columns: int
    """Outputs of a program."""
    warps: int
    per_processor: int
    """Programs that there should be for each multiprocessor; inputs are split to have them."""


# The fastest of those that scripts/bench/gemv.py tries, on an H200. As few columns as half the threads: with more,
# Triton gives scales a layout of their own, and moves all codes to it.
ONE_ROW = Tiles(words=16, columns=64, warps=4, per_processor=12)
FEW_ROWS = Tiles(words=16, columns=128, warps=8, per_processor=6)
GATED_COLUMNS = 512
ONE_IN_FLOAT = 0x3F800000
"""The bits of 1.0. To kernels it is an argument: with a constant, masking and setting take two instructions."""


class Arrivals:
    """Counters by which the last program of a product knows that it is the last; zero between products.

    One of these serves the products of one stream, which run one after the other.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.counters = torch.zeros(columns, dtype=torch.int32, device=device)


def takes(weight: PackedWeight) -> bool:
    """Whether `few_rows_product` reads the codes of this weight by a kernel on a GPU."""
    return triton is not None and weight.bits == BITS and weight.group_size % CODES == 0


def few_rows_product(
    x_MK: torch.Tensor,
    weight: PackedWeight,
    added: torch.Tensor | None,
    arrivals: Arrivals,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """y [M, N] in the dtype of x, fp16 or bf16, for at most `MOST_ROWS` rows of a weight that `takes` takes.

    added: [N] or [M, N], such as a bias or a residual stream; it is added before y is rounded.
    """
    if weight.rows_K is not None:
        x_MK = x_MK.index_select(1, weight.rows_K)
    if tiles is None:
        tiles = ONE_ROW if len(x_MK) == 1 else FEW_ROWS
    return _launch(x_MK.contiguous(), weight, None if added is None else added.contiguous(), arrivals, tiles)


def reference(x_MK: torch.Tensor, weight: PackedWeight, added: torch.Tensor | None) -> torch.Tensor:
    """The same in plain PyTorch, with weights and sums in fp32."""
    y_MN = x_MK.float() @ dequantize(weight, None, torch.float32)
    return (y_MN if added is None else y_MN + added.float()).to(x_MK.dtype)


def gated_halves(both_M2F: torch.Tensor, silu: bool) -> torch.Tensor:
    """act(g)·u [M, F] of rows of g and u one after the other, computed in fp32. Not silu: GELU in its tanh form."""
    rows, width = both_M2F.shape[0], both_M2F.shape[1] // 2
    if triton is None or not both_M2F.is_cuda:
        gate, up = both_M2F.float().chunk(2, dim=1)
        return ((silu_of(gate) if silu else gelu(gate, approximate="tanh")) * up).to(both_M2F.dtype)
    out_MF = torch.empty(rows, width, dtype=both_M2F.dtype, device=both_M2F.device)
    _gated_kernel[(triton.cdiv(width, GATED_COLUMNS), rows)](
        both_M2F.contiguous(), out_MF, width, SILU=silu, COLUMNS=GATED_COLUMNS, num_warps=4
    )
    return out_MF


def split_of(tiles: Tiles, inputs: int, outputs: int, processors: int) -> tuple[int, int]:
    """(programs that share an output's inputs, words of each)."""
    steps = triton.cdiv(inputs, CODES * tiles.words)
    blocks = triton.cdiv(outputs, tiles.columns)
    wanted = min(steps, max(1, triton.cdiv(tiles.per_processor * processors, blocks)))
    each = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, each), each * tiles.words


def _launch(
    x_MK: torch.Tensor, weight: PackedWeight, added: torch.Tensor | None, arrivals: Arrivals, tiles: Tiles
) -> torch.Tensor:
    (rows, inputs), outputs = x_MK.shape, weight.shape[0]
    split, each = split_of(tiles, inputs, outputs, _processors(x_MK.device))
    y_MN = torch.empty(rows, outputs, dtype=x_MK.dtype, device=x_MK.device)
    sums = torch.empty(split, rows, outputs, dtype=torch.float32, device=x_MK.device) if split > 1 else y_MN
    kernel = _one_row_kernel if rows == 1 else _few_rows_kernel
    own = {"BF16": x_MK.dtype == torch.bfloat16} if rows == 1 else {"ROOM": max(16, triton.next_power_of_2(rows))}
    words_of_group = weight.group_size // CODES
    # Of one row, inputs come in pairs.
    x = x_MK.view(torch.int32) if rows == 1 else x_MK
    kernel[(triton.cdiv(outputs, tiles.columns), split)](
        x, weight.qweight_WN, weight.zeros_GN, weight.scales_GN, y_MN if added is None else added,
        y_MN, sums, arrivals.counters, rows, inputs // CODES, outputs, each, words_of_group, ONE_IN_FLOAT,
        ONE_GROUP=words_of_group % tiles.words == 0, ADDED=0 if added is None else added.ndim, SPLIT=split,
        SPLIT_UP=triton.next_power_of_2(split), WORDS=tiles.words, COLUMNS=tiles.columns, num_warps=tiles.warps,
        **own,
    )  # fmt: skip
    return y_MN


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


if triton is not None:

    @triton.jit
    def _load_words(qweight_ptr, word, words, column, outputs):
        """int32 [words, columns], zeros outside."""
        at = word.to(tl.int64)[:, None] * outputs + column[None, :]
        return tl.load(qweight_ptr + at, mask=(word < words)[:, None] & (column < outputs)[None, :], other=0)

    @triton.jit
    def _load_scale(
        scales_ptr, zeros_ptr, word, words, column, outputs, words_of_group, first, ONE_GROUP: tl.constexpr
    ):
        """(scale, zero) in fp32: [1, columns] where a tile is of one group, else [words, columns]."""
        if ONE_GROUP:
            at = ((first // words_of_group).to(tl.int64) * outputs + column)[None, :]
            inside = (column < outputs)[None, :]
        else:
            at = (word // words_of_group).to(tl.int64)[:, None] * outputs + column[None, :]
            inside = (word < words)[:, None] & (column < outputs)[None, :]
        scale = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
        return scale, tl.load(zeros_ptr + at, mask=inside, other=0).to(tl.float32)

    @triton.jit
    def _beside_one(word, one, CODE: tl.constexpr):
        """f of code CODE of each word: 1 + q·2⁻⁷ if CODE is even, else 1 + q·2⁻¹¹."""
        PLACE: tl.constexpr = 16 if CODE % 2 == 0 else 12
        LEFT: tl.constexpr = PLACE - 4 * CODE
        if LEFT > 0:
            word = word << LEFT
        elif LEFT < 0:
            word = word >> -LEFT  # with the sign, which the mask drops
        return ((word & (15 << PLACE)) | one).to(tl.float32, bitcast=True)

    @triton.jit
    def _weight(word, one, scale, zero, CODE: tl.constexpr):
        """What code CODE of each word stands for, in fp32 and exact."""
        RISE: tl.constexpr = 128.0 if CODE % 2 == 0 else 2048.0
        return _beside_one(word, one, CODE) * (scale * RISE) - scale * (zero + RISE)

    @triton.jit
    def _load_pair(x_ptr, at, mask, BF16: tl.constexpr):
        """Two neighbouring inputs of a row, in fp32."""
        pair = tl.load(x_ptr + at, mask=mask, other=0)
        if BF16:
            return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
        low = pair.to(tl.int16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

    @triton.jit
    def _load_added(added_ptr, at, column, inside, DIMENSIONS: tl.constexpr):
        place = at if DIMENSIONS == 2 else column[None, :] + at * 0
        return tl.load(added_ptr + place, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _one_row_kernel(
        x_ptr, qweight_ptr, zeros_ptr, scales_ptr, added_ptr, y_ptr, sums_ptr, arrivals_ptr,
        rows, words, outputs, each, words_of_group, one,
        ONE_GROUP: tl.constexpr, ADDED: tl.constexpr, SPLIT: tl.constexpr, SPLIT_UP: tl.constexpr,
        WORDS: tl.constexpr, COLUMNS: tl.constexpr, BF16: tl.constexpr,
    ):  # fmt: skip
        """One program: COLUMNS outputs of `each` words of inputs."""
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        begin = tl.program_id(1) * each
        end = tl.minimum(begin + each, words)
        word = begin + tl.arange(0, WORDS)
        packed = _load_words(qweight_ptr, word, end, column, outputs)
        total = tl.zeros((WORDS, COLUMNS), tl.float32)
        for first in range(begin, end, WORDS):
            word = first + tl.arange(0, WORDS)
            ahead = _load_words(qweight_ptr, word + WORDS, end, column, outputs)
            scale, zero = _load_scale(
                scales_ptr, zeros_ptr, word, end, column, outputs, words_of_group, first, ONE_GROUP
            )
            even, odd = tl.zeros((WORDS, COLUMNS), tl.float32), tl.zeros((WORDS, COLUMNS), tl.float32)
            x_even, x_odd = tl.zeros((WORDS,), tl.float32), tl.zeros((WORDS,), tl.float32)
            for pair in tl.static_range(4):
                low, high = _load_pair(x_ptr, word * 4 + pair, word < end, BF16)
                even += low[:, None] * _beside_one(packed, one, 2 * pair)
                odd += high[:, None] * _beside_one(packed, one, 2 * pair + 1)
                x_even += low
                x_odd += high
            x_part = x_even[:, None] * (128.0 + zero) + x_odd[:, None] * (2048.0 + zero)
            total += scale * (128.0 * even + 2048.0 * odd - x_part)
            packed = ahead
        sum_N = tl.sum(total, axis=0)
        inside = column < outputs
        if SPLIT == 1:
            if ADDED > 0:
                sum_N += tl.load(added_ptr + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_ptr + column, sum_N.to(y_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(sums_ptr + tl.program_id(1) * outputs + column, sum_N, mask=inside)
            tl.debug_barrier()  # every thread's sums are stored before one says so
            arrived = tl.atomic_add(arrivals_ptr + tl.program_id(0), 1, sem="acq_rel")
            if arrived == SPLIT - 1:
                part = tl.arange(0, SPLIT_UP)[:, None]
                at = part * outputs + column[None, :]
                mask = (part < SPLIT) & inside[None, :]
                sum_N = tl.sum(tl.load(sums_ptr + at, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
                if ADDED > 0:
                    sum_N += tl.load(added_ptr + column, mask=inside, other=0.0).to(tl.float32)
                tl.store(y_ptr + column, sum_N.to(y_ptr.dtype.element_ty), mask=inside)
                tl.store(arrivals_ptr + tl.program_id(0), 0)

    @triton.jit
    def _few_rows_kernel(
        x_ptr, qweight_ptr, zeros_ptr, scales_ptr, added_ptr, y_ptr, sums_ptr, arrivals_ptr,
        rows, words, outputs, each, words_of_group, one,
        ONE_GROUP: tl.constexpr, ADDED: tl.constexpr, SPLIT: tl.constexpr, SPLIT_UP: tl.constexpr,
        WORDS: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr,
    ):  # fmt: skip
        """One program: COLUMNS outputs of all rows, for `each` words of inputs."""
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        begin = tl.program_id(1) * each
        end = tl.minimum(begin + each, words)
        row = tl.arange(0, ROOM)
        packed = _load_words(qweight_ptr, begin + tl.arange(0, WORDS), end, column, outputs)
        total = tl.zeros((ROOM, COLUMNS), tl.float32)
        for first in range(begin, end, WORDS):
            word = first + tl.arange(0, WORDS)
            ahead = _load_words(qweight_ptr, word + WORDS, end, column, outputs)
            scale, zero = _load_scale(
                scales_ptr, zeros_ptr, word, end, column, outputs, words_of_group, first, ONE_GROUP
            )
            inside_x = (row < rows)[:, None] & (word < end)[None, :]
            for i in tl.static_range(8):
                at = row[:, None] * (words * 8) + word[None, :] * 8 + i
                x = tl.load(x_ptr + at, mask=inside_x, other=0.0)
                total = tl.dot(x, _weight(packed, one, scale, zero, i).to(x.dtype), total)
            packed = ahead
        at = row[:, None] * outputs + column[None, :]
        inside = (row < rows)[:, None] & (column < outputs)[None, :]
        if SPLIT > 1:
            tl.store(sums_ptr + tl.program_id(1) * rows * outputs + at, total, mask=inside)
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + tl.program_id(0), 1, sem="acq_rel")
            if arrived == SPLIT - 1:
                total = tl.zeros((ROOM, COLUMNS), tl.float32)
                for part in range(SPLIT):
                    total += tl.load(
                        sums_ptr + part * rows * outputs + at, mask=inside, other=0.0, cache_modifier=".cg"
                    )
                if ADDED > 0:
                    total += _load_added(added_ptr, at, column, inside, ADDED)
                tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)
                tl.store(arrivals_ptr + tl.program_id(0), 0)
        else:
            if ADDED > 0:
                total += _load_added(added_ptr, at, column, inside, ADDED)
            tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _gated_kernel(both_ptr, out_ptr, width, SILU: tl.constexpr, COLUMNS: tl.constexpr):
        """One program: COLUMNS of a row."""
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        row, inside = tl.program_id(1).to(tl.int64), column < width
        gate = tl.load(both_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(both_ptr + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            act = gate * tl.sigmoid(gate)
        else:
            act = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        tl.store(out_ptr + row * width + column, (act * up).to(out_ptr.dtype.element_ty), mask=inside)
