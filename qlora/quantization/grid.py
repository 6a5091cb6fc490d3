"""The quantization grid of a weight: one fp16 scale and one zero point per group of inputs and output.

Values on the grid are s·(q − z), q in [0, 2^b − 1]. The scale is searched, since a few clipped weights often cost less
than a coarser step for all; `qlora/kernels/grid_search.py` says how.

Shapes: K inputs, N outputs, G groups, S inputs per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora.kernels.grid_search import search_scales


@dataclass(frozen=True)
class Grid:
    """Scales in fp16, as they are stored, and zero points in [0, 2^bits); both [G, N]."""

    scales_GN: torch.Tensor
    zeros_GN: torch.Tensor
    bits: int


def choose_grid(w_KN: torch.Tensor, importance_K: torch.Tensor, *, bits: int, group_size: int, sym: bool) -> Grid:
    """The grid of every group of a weight in its original column order.

    `importance_K` weighs each input's squared error. K is a multiple of `group_size` (−1: one group of all K inputs).
    Raises ArithmeticError when a scale does not fit fp16.
    """
    inputs, outputs = w_KN.shape
    size = inputs if group_size < 0 else group_size
    scales_GN, zeros_GN = search_scales(
        w_KN.reshape(inputs // size, size, outputs), importance_K.to(w_KN.dtype).reshape(-1, size), bits, sym
    )
    if not bool(torch.isfinite(scales_GN).all()):
        raise ArithmeticError("weights are not finite, or too large for fp16 scales")
    return Grid(scales_GN, zeros_GN, bits)
