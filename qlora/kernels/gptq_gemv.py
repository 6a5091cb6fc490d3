"""Products of few rows with 4-bit weights that read the packed codes once: what decoding spends its time on.

    y[m, n] = Σ_g scales[g, n] · Σ_{k in g} x[m, k] · (q[k, n] − z[g, n]) + added[m, n]

A row at a time is bound by how fast codes come from memory, so a weight must cost few instructions. Set beside the bits
of a power of two that has 4 bits to spare, a code is the 16-bit float c + q (c = 128 in bf16, 1024 in fp16), and
c + q − (c + z) = q − z is exact: no conversion, and one instruction does two codes. Tensor cores multiply these whole
numbers with x; scales are applied in fp32 to the sums of a group.

That takes codes in another order than a GPTQ checkpoint has them, `StripedWeight`: two neighbouring inputs of a tensor
core's product side by side in 32 bits. Codes go from memory to shared memory while earlier ones are multiplied.

Inputs are split over programs, for there are too few outputs to fill a GPU. A program leaves its sums in a buffer, and
the last one to arrive adds them up in their order: equal inputs give equal bits.

Shapes: M rows, K inputs, N outputs, G groups of S inputs, H = K / 4 halfwords of 4 codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import gelu
from torch.nn.functional import silu as silu_of

from qlora.kernels.packed_linear import PackedWeight

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

BITS = 4
CODES = 8
"""Of a word of a checkpoint."""
STRIPES = 4
"""Of a block: as many as a halfword has codes."""
MOST_ROWS = 64
"""Rows up to which reading codes beats dequantizing them once for a large product."""
LEAST_ROOM = 16
"""Rows of a tensor core's product."""
MOST_PARTS = 16
"""Programs that share an output's inputs."""
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up."""

    columns: int
    """Outputs of a program."""
    warps: int
    stages: int
    """Blocks of inputs that are under way from memory or being multiplied."""
    per_processor: int
    """Programs that there should be for each multiprocessor; inputs are split to have them."""


# The fastest of those that scripts/bench/gemv.py tries, on an H200.
FEW_ROWS = Tiles(columns=64, warps=2, stages=3, per_processor=6)
MORE_ROWS = Tiles(columns=64, warps=2, stages=3, per_processor=3)
"""Of more than `LEAST_ROOM`."""
GATED_COLUMNS = 512


@dataclass(frozen=True)
class StripedWeight:
    """A weight of 4-bit codes in the order of `few_rows_product`; all tensors contiguous and on one device.

    A block of inputs is 4 stripes of P inputs each. Halfword p of a block and a column has input p of each stripe, that
    of stripe i in bits 4i to 4i + 3.
    """

    halves_HN: torch.Tensor
    """int16."""
    grids_GN: torch.Tensor
    """int32: an fp16 scale, and above its bits the zero point. Fewer bits would not be loaded asynchronously."""
    stripe: int
    """P."""
    rows_K: torch.Tensor | None
    """As in `PackedWeight`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.halves_HN.shape[1], STRIPES * self.halves_HN.shape[0]

    @property
    def device(self) -> torch.device:
        return self.halves_HN.device

    @property
    def group_size(self) -> int:
        """S."""
        return self.shape[1] // len(self.grids_GN)


class Arrivals:
    """Counters by which the last program of a product knows that it is the last; zero between products.

    One of these serves the products of one stream, which run one after the other.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.counters = torch.zeros(columns, dtype=torch.int32, device=device)


def takes(weight: PackedWeight) -> bool:
    """Whether `striped` has an order for the codes of this weight, and Triton is there to multiply with it."""
    nvidia = triton is not None and torch.version.hip is None  # the kernel has an instruction of NVIDIA's
    return nvidia and weight.bits == BITS and _stripe(weight) is not None and _exact_in_fp16(weight.scales_GN)


def striped(weight: PackedWeight) -> StripedWeight:
    """The same weight in the other order; `takes` must hold for it."""
    stripe = _stripe(weight)
    assert weight.bits == BITS and stripe is not None
    outputs, inputs = weight.shape
    words = weight.qweight_WN.view(-1, STRIPES, stripe // CODES, outputs)
    halves = torch.empty(len(words), stripe // CODES, CODES, outputs, dtype=torch.int16, device=weight.device)
    for code in range(CODES):
        of_stripes = [(words[:, index] >> BITS * code & 2**BITS - 1) << BITS * index for index in range(STRIPES)]
        halves[:, :, code] = sum(of_stripes)
    scales_GN = weight.scales_GN.to(torch.float16).view(torch.int16).to(torch.int32) & 0xFFFF
    grids_GN = weight.zeros_GN.to(torch.int32) << 16 | scales_GN
    return StripedWeight(halves.view(inputs // STRIPES, outputs), grids_GN, stripe, weight.rows_K)


def _exact_in_fp16(scales_GN: torch.Tensor) -> bool:
    if scales_GN.dtype == torch.float16:
        return True
    return torch.equal(scales_GN.to(torch.float16).to(scales_GN.dtype), scales_GN)


def _stripe(weight: PackedWeight) -> int | None:
    """Inputs of a stripe: each is of one group, and blocks are whole."""
    for stripe in (32, 16):
        whole = weight.inputs % (STRIPES * stripe) == 0
        size = weight.group_size
        if whole and (size % (STRIPES * stripe) == 0 or size in (stripe, 2 * stripe)):
            return stripe
    return None


def few_rows_product(
    x_MK: torch.Tensor,
    weight: StripedWeight,
    added: torch.Tensor | None,
    arrivals: Arrivals,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """y [M, N] in the dtype of x, fp16 or bf16, for at most `MOST_ROWS` rows; sums are in fp32.

    added: [N] or [M, N], such as a bias or a residual stream; it is added before y is rounded.
    """
    if weight.rows_K is not None:
        x_MK = x_MK.index_select(1, weight.rows_K)
    if tiles is None:
        tiles = FEW_ROWS if len(x_MK) <= LEAST_ROOM else MORE_ROWS
    return _launch(x_MK.contiguous(), weight, None if added is None else added.contiguous(), arrivals, tiles)


def dequantized(weight: StripedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W [K, N] in `dtype`, rounded once from the exact product of codes and scales."""
    outputs, inputs = weight.shape
    w_KN = torch.empty(inputs, outputs, dtype=dtype, device=weight.device)
    if triton is not None and weight.halves_HN.is_cuda:
        columns = 128
        _dequantize_kernel[(triton.cdiv(outputs, columns), len(weight.halves_HN) // weight.stripe)](
            weight.halves_HN, weight.grids_GN, w_KN, outputs, weight.group_size,
            STRIPE=weight.stripe, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    else:
        halves = weight.halves_HN.view(-1, 1, weight.stripe, outputs)
        shifts = BITS * torch.arange(STRIPES, device=weight.device, dtype=torch.int16)
        codes_KN = ((halves >> shifts[:, None, None]) & 2**BITS - 1).view(inputs, outputs)
        scales_GN = weight.grids_GN.to(torch.int16).view(torch.float16).float()
        steps_GSN = codes_KN.view(len(scales_GN), -1, outputs) - (weight.grids_GN >> 16)[:, None]
        w_KN.copy_((steps_GSN * scales_GN[:, None]).flatten(0, 1))
    if weight.rows_K is None:
        return w_KN
    return torch.empty_like(w_KN).index_copy_(0, weight.rows_K.long(), w_KN)


def reference(x_MK: torch.Tensor, weight: StripedWeight, added: torch.Tensor | None) -> torch.Tensor:
    """What `few_rows_product` gives, in plain PyTorch, with weights and sums in fp32."""
    y_MN = x_MK.float() @ dequantized(weight, torch.float32)
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


def _launch(
    x_MK: torch.Tensor, weight: StripedWeight, added: torch.Tensor | None, arrivals: Arrivals, tiles: Tiles
) -> torch.Tensor:
    rows, (outputs, inputs) = len(x_MK), weight.shape
    block = STRIPES * weight.stripe
    parts, each = _split(tiles, inputs // block, outputs, processors(x_MK.device))
    y_MN = torch.empty(rows, outputs, dtype=x_MK.dtype, device=x_MK.device)
    sums = torch.empty(parts, rows, outputs, dtype=torch.float32, device=x_MK.device) if parts > 1 else y_MN
    _few_rows_kernel[(triton.cdiv(outputs, tiles.columns), parts)](
        x_MK, weight.halves_HN, weight.grids_GN, y_MN if added is None else added,
        y_MN, sums, arrivals.counters, rows, inputs, outputs, each, BLOCKS=max(1, weight.group_size // block),
        BF16=x_MK.dtype == torch.bfloat16, STRIPE=weight.stripe, GROUPS=max(1, block // weight.group_size),
        WHOLE=outputs % tiles.columns == 0, ADDED=0 if added is None else added.ndim, PARTS=parts,
        ROOM=max(LEAST_ROOM, triton.next_power_of_2(rows)), COLUMNS=tiles.columns, STAGES=tiles.stages,
        num_warps=tiles.warps,
    )  # fmt: skip
    return y_MN


def _split(tiles: Tiles, blocks: int, outputs: int, processors: int) -> tuple[int, int]:
    """(programs that share an output's inputs, blocks of each)."""
    wanted = triton.cdiv(tiles.per_processor * processors, triton.cdiv(outputs, tiles.columns))
    each = triton.cdiv(blocks, min(blocks, max(1, min(MOST_PARTS, wanted))))
    return triton.cdiv(blocks, each), each


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of what Triton's interpreter stands in for, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


if triton is not None:
    _INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

    @triton.jit
    def _beside_power(halves, BF16: tl.constexpr, STRIPE_INDEX: tl.constexpr):
        """int16: the bits of 128 + q in bf16, or of 1024 + q in fp16, for code STRIPE_INDEX of each halfword."""
        if _INTERPRETED:  # which knows no assembly
            return ((halves >> 4 * STRIPE_INDEX) & 15) | (0x4300 if BF16 else 0x6400)
        POWER: tl.constexpr = "0x43004300" if BF16 else "0x64006400"
        SHIFT: tl.constexpr = f"shr.u32 t, $1, {4 * STRIPE_INDEX}; "
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; " + SHIFT + "lop3.b32 $0, t, 0x000f000f, " + POWER + ", 0xea; }",
            "=r,r", [halves], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip

    @triton.jit
    def _load_added(added_ptr, at, column, inside, DIMENSIONS: tl.constexpr):
        place = at if DIMENSIONS == 2 else column[None, :] + at * 0
        return tl.load(added_ptr + place, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _few_rows_kernel(
        x_ptr, halves_ptr, grids_ptr, added_ptr, y_ptr, sums_ptr, arrivals_ptr,
        rows, inputs, outputs, each, BLOCKS: tl.constexpr,
        BF16: tl.constexpr, STRIPE: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr, ADDED: tl.constexpr,
        PARTS: tl.constexpr, ROOM: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """One program: COLUMNS outputs of all rows, for `each` blocks of inputs.

        A group has BLOCKS blocks or a block has GROUPS groups; one of both is 1.
        """
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside_N = column < (tl.cdiv(outputs, COLUMNS) * COLUMNS if WHOLE else outputs)
        begin = tl.program_id(1) * each
        end = tl.minimum(begin + each, inputs // (4 * STRIPE))
        row, place = tl.arange(0, ROOM), tl.arange(0, STRIPE)
        x_place = x_ptr + row[:, None] * inputs + place[None, :]
        half_place = halves_ptr + place[:, None] * outputs + column[None, :]
        inside_M = (row < rows)[:, None]
        total = tl.zeros((ROOM, COLUMNS), tl.float32)
        for block in tl.range(begin, end, num_stages=STAGES):
            halves = tl.load(half_place + block * STRIPE * outputs, mask=inside_N[None, :], other=0)
            for stripe in tl.static_range(4):
                if stripe % (4 // GROUPS) == 0:  # a group begins
                    group = block // BLOCKS * GROUPS + stripe // (4 // GROUPS)
                    grid = tl.load(grids_ptr + group * outputs + column, mask=inside_N, other=0)
                    scale = grid.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                    zero = (grid >> 16).to(tl.int16) | (0x4300 if BF16 else 0x6400)
                    zero = zero.to(x_ptr.dtype.element_ty, bitcast=True)
                    sums = tl.zeros((ROOM, COLUMNS), tl.float32)
                x = tl.load(x_place + (block * 4 + stripe) * STRIPE, mask=inside_M, other=0.0)
                code = _beside_power(halves, BF16, stripe)
                steps = code.to(x_ptr.dtype.element_ty, bitcast=True) - zero[None, :]
                sums = tl.dot(x, steps, sums)
                if stripe % (4 // GROUPS) == 4 // GROUPS - 1:
                    total += sums * scale[None, :]
        at = row[:, None] * outputs + column[None, :]
        inside = inside_M & inside_N[None, :]
        last = True
        if PARTS > 1:
            tl.store(sums_ptr + tl.program_id(1) * rows * outputs + at, total, mask=inside)
            tl.debug_barrier()  # every thread's sums are stored before one says so
            last = tl.atomic_add(arrivals_ptr + tl.program_id(0), 1, sem="acq_rel") == PARTS - 1
            if last:
                total = tl.zeros((ROOM, COLUMNS), tl.float32)
                for part in tl.static_range(PARTS):
                    of_part = sums_ptr + part * rows * outputs + at
                    total += tl.load(of_part, mask=inside, other=0.0, cache_modifier=".cg")
                tl.store(arrivals_ptr + tl.program_id(0), 0)
        if last:
            if ADDED > 0:
                total += _load_added(added_ptr, at, column, inside, ADDED)
            tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _dequantize_kernel(
        halves_ptr, grids_ptr, w_ptr, outputs, group_size, STRIPE: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """One program: a block of inputs of COLUMNS outputs."""
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        block, place = tl.program_id(1), tl.arange(0, STRIPE)[:, None]
        inside = column < outputs
        halves = tl.load(halves_ptr + (block * STRIPE + place) * outputs + column, mask=inside, other=0)
        for stripe in tl.static_range(4):
            first = (block * 4 + stripe) * STRIPE
            grid = tl.load(grids_ptr + first // group_size * outputs + column, mask=inside, other=0)
            scale = grid.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            weight = (((halves >> 4 * stripe) & 15).to(tl.int32) - (grid >> 16)).to(tl.float32) * scale
            to = w_ptr + (first + place).to(tl.int64) * outputs + column
            tl.store(to, weight.to(w_ptr.dtype.element_ty), mask=inside)

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
