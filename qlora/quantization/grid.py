"""The quantization grid of a weight: one fp16 scale and one zero point per group of inputs and output.

Values on the grid are s·(q − z), q in [0, 2^b − 1]. The scale is searched: candidates shrink the range that just holds
the group's largest weight, and the one with the least weighted squared rounding error wins, since a few clipped weights
often cost less than a coarser step for all. Symmetric grids have z = 2^(b−1) and one level more below zero than above;
a negative scale puts that level on the other side, so both signs are candidates.

Shapes: K inputs, N outputs, G groups, S inputs per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Ranges tried, as shares of the one that clips nothing.
SHRINK_FACTORS = tuple(1 - 0.04 * step for step in range(18))
# Elements searched at once: the working set stays in a CPU's cache, and bounded on a GPU.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


@dataclass(frozen=True)
class Grid:
    """Scales in fp16, as they are stored, and zero points in [0, 2^bits); both [G, N]."""

    scales_GN: torch.Tensor
    zeros_GN: torch.Tensor
    bits: int


def choose_grid(
    w_KN: torch.Tensor,
    importance_K: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    shrink_factors: Sequence[float] = SHRINK_FACTORS,
) -> Grid:
    """The grid of every group of a weight in its original column order.

    `importance_K` weighs each input's squared error. K is a multiple of `group_size` (−1: one group of all K inputs).
    Raises ArithmeticError when a scale does not fit fp16.
    """
    inputs, outputs = w_KN.shape
    size = inputs if group_size < 0 else group_size
    w_GSN = w_KN.reshape(inputs // size, size, outputs)
    importance_GS1 = importance_K.reshape(-1, size, 1)
    step = max(1, CHUNK_ELEMENTS[w_KN.device.type] // (size * outputs))
    parts = [
        _search(w_GSN[start : start + step], importance_GS1[start : start + step], bits, sym, shrink_factors)
        for start in range(0, w_GSN.shape[0], step)
    ]
    scales_GN = torch.cat([scales for scales, _ in parts])
    if not bool(torch.isfinite(scales_GN).all()):
        raise ArithmeticError("weights are not finite, or too large for fp16 scales")
    return Grid(scales_GN, torch.cat([zeros for _, zeros in parts]), bits)


def _search(
    w_GSN: torch.Tensor, importance_GS1: torch.Tensor, bits: int, sym: bool, shrink_factors: Sequence[float]
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
    best_error_GN = torch.full_like(low_GN, torch.inf)
    best_scales_GN = torch.full_like(low_GN, torch.nan, dtype=torch.float16)
    best_zeros_GN = torch.full_like(low_GN, middle, dtype=torch.uint8)
    for factor in shrink_factors:
        for sign, step_GN in steps:
            scales_GN = _storable(step_GN * factor) * sign
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


def _storable(step_GN: torch.Tensor) -> torch.Tensor:
    """Steps rounded to fp16 as they are stored; all-zero and vanishing groups get the smallest that is not zero."""
    return step_GN.to(torch.float16).clamp_(min=2.0**-24)
