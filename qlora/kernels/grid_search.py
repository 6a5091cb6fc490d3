"""The search for the scale of every group of a weight: the candidate with the least weighted rounding error wins.

Candidates shrink the step that just holds the group's largest weight, s = s_max·(1 − shrink·i). For each the error is
s²·Σ_k importance_k·(w_k/s − round(w_k/s))², codes clamped to their range; scales are rounded to fp16 first, as they are
stored. Symmetric grids have their zero point in the middle and one level more below zero than above; a negative scale
puts that level on the other side, so both signs are candidates. Ties go to the earlier candidate.

Shapes: K inputs, N outputs, G groups of S inputs.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl

    from qlora.kernels.rounding import round_half_even
except ImportError:  # CPU builds of torch come without Triton
    triton = None

CANDIDATES = 18
SHRINK = 0.04
# The smallest scale that fp16 can hold: all-zero and vanishing groups get it.
SMALLEST_SCALE = 2.0**-24
# Elements searched at once by the twin: the working set stays in a CPU's cache, and bounded on a GPU.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
LARGEST_TILED_GROUP = 256


def search_scales(
    w_GSN: torch.Tensor, importance_GS: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales fp16, zero points uint8), both [G, N]. A group with weights that are not finite gets the scale NaN."""
    size = w_GSN.shape[1]
    tiled = size <= LARGEST_TILED_GROUP and size == 1 << (size.bit_length() - 1)
    if w_GSN.is_cuda and w_GSN.dtype == torch.float32 and tiled and triton is not None:
        return _with_triton(w_GSN, importance_GS, bits, sym)
    step = max(1, CHUNK_ELEMENTS[w_GSN.device.type] // (size * w_GSN.shape[2]))
    parts = [
        _with_torch(w_GSN[start : start + step], importance_GS[start : start + step], bits, sym)
        for start in range(0, w_GSN.shape[0], step)
    ]
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _with_torch(
    w_GSN: torch.Tensor, importance_GS: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low_GN, high_GN = w_GSN.amin(1).clamp(max=0), w_GSN.amax(1).clamp(min=0)
    if sym:
        steps = [
            (1, torch.maximum(-low_GN / middle, high_GN / (middle - 1))),
            (-1, torch.maximum(high_GN / middle, -low_GN / (middle - 1))),
        ]
    else:
        steps = [(1, (high_GN - low_GN) / top)]
    importance_GS1 = importance_GS.unsqueeze(2)
    best_error_GN = torch.full_like(low_GN, torch.inf)
    best_scales_GN = torch.full_like(low_GN, torch.nan, dtype=torch.float16)
    best_zeros_GN = torch.full_like(low_GN, middle, dtype=torch.uint8)
    for candidate in range(CANDIDATES):
        factor = 1 - SHRINK * candidate
        for sign, step_GN in steps:
            scales_GN = (step_GN * factor).to(torch.float16).clamp_(min=SMALLEST_SCALE) * sign
            scale_GN = scales_GN.to(w_GSN.dtype)
            # Zero point 0 is left out: v1 stores it as −1 and readers disagree on what that wraps to.
            zeros_GN = torch.full_like(low_GN, middle) if sym else (-low_GN * factor / scale_GN).round().clamp(1, top)
            error_GSN = w_GSN / scale_GN.unsqueeze(1)
            codes_GSN = error_GSN.round().clamp_(-zeros_GN.unsqueeze(1), (top - zeros_GN).unsqueeze(1))
            error_GSN.sub_(codes_GSN).square_().mul_(importance_GS1)
            error_GN = error_GSN.sum(1) * scale_GN.square()
            better_GN = error_GN < best_error_GN
            best_error_GN = torch.where(better_GN, error_GN, best_error_GN)
            best_scales_GN = torch.where(better_GN, scales_GN, best_scales_GN)
            best_zeros_GN = torch.where(better_GN, zeros_GN.to(torch.uint8), best_zeros_GN)
    # Where weights are not finite no candidate wins, and the scale stays NaN.
    return best_scales_GN, best_zeros_GN


def _with_triton(
    w_GSN: torch.Tensor, importance_GS: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, size, outputs = w_GSN.shape
    scales_GN = torch.empty(groups, outputs, dtype=torch.float16, device=w_GSN.device)
    zeros_GN = torch.empty(groups, outputs, dtype=torch.uint8, device=w_GSN.device)
    tile = 4096 // size
    _search_kernel[(triton.cdiv(outputs, tile), groups)](
        w_GSN.contiguous(),
        importance_GS.contiguous(),
        scales_GN,
        zeros_GN,
        outputs,
        BITS=bits,
        SYM=sym,
        SIZE=size,
        TILE=tile,
        CANDIDATES=CANDIDATES,
        SHRINK=SHRINK,
        SMALLEST=SMALLEST_SCALE,
    )
    return scales_GN, zeros_GN


if triton is not None:

    @triton.jit(do_not_specialize=["outputs"])
    def _search_kernel(
        w_ptr,
        importance_ptr,
        scales_ptr,
        zeros_ptr,
        outputs,
        BITS: tl.constexpr,
        SYM: tl.constexpr,
        SIZE: tl.constexpr,
        TILE: tl.constexpr,
        CANDIDATES: tl.constexpr,
        SHRINK: tl.constexpr,
        SMALLEST: tl.constexpr,
    ):
        """One program searches one group of TILE outputs, its weights held in registers."""
        TOP: tl.constexpr = 2**BITS - 1
        MIDDLE: tl.constexpr = 2 ** (BITS - 1)
        group = tl.program_id(1).to(tl.int64)
        member = tl.arange(0, SIZE)
        output = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = output < outputs
        place = (group * SIZE + member[:, None]) * outputs + output[None, :]
        w = tl.load(w_ptr + place, mask=inside[None, :], other=0.0)
        importance = tl.load(importance_ptr + group * SIZE + member)[:, None]
        low = tl.minimum(tl.min(w, axis=0), 0.0)
        high = tl.maximum(tl.max(w, axis=0), 0.0)
        best_error = tl.full((TILE,), float("inf"), tl.float32)
        best_scale = tl.full((TILE,), float("nan"), tl.float32)
        best_zero = tl.full((TILE,), MIDDLE, tl.float32)
        for candidate in range(CANDIDATES * (2 if SYM else 1)):
            if SYM:
                factor = 1.0 - SHRINK * (candidate // 2)
                negative = candidate % 2 == 1
                below = tl.where(negative, high, -low)
                above = tl.where(negative, -low, high)
                step = tl.maximum(below / MIDDLE, above / (MIDDLE - 1))
            else:
                factor = 1.0 - SHRINK * candidate
                negative = False
                step = (high - low) / TOP
            scale = tl.maximum((step * factor).to(tl.float16).to(tl.float32), SMALLEST)
            scale = tl.where(negative, -scale, scale)
            zero = tl.full((TILE,), MIDDLE, tl.float32)
            if not SYM:
                zero = tl.minimum(tl.maximum(round_half_even(tl.div_rn(-low * factor, scale)), 1.0), TOP)
            steps = tl.div_rn(w, tl.broadcast_to(scale[None, :], (SIZE, TILE)))
            code = tl.minimum(tl.maximum(round_half_even(steps), -zero[None, :]), TOP - zero[None, :])
            error = tl.sum((steps - code) * (steps - code) * importance, axis=0) * scale * scale
            better = error < best_error
            best_error = tl.where(better, error, best_error)
            best_scale = tl.where(better, scale, best_scale)
            best_zero = tl.where(better, zero, best_zero)
        tl.store(scales_ptr + group * outputs + output, best_scale.to(tl.float16), mask=inside)
        tl.store(zeros_ptr + group * outputs + output, best_zero.to(tl.uint8), mask=inside)
