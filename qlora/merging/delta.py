"""What an adapter does to one weight: products in fp64, the result in fp32.

Plain LoRA (arXiv:2106.09685): W' = W + s·B·A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).
DoRA (arXiv:2402.09353): W' = m · (W + s·B·A) / ‖W + s·B·A‖, the norm taken over each output row.

fp64, because a process may allow TF32 for fp32 products (10 bits of mantissa), which no thread can forbid for itself;
with ranks as small as these it costs next to nothing on any device.

Shape suffixes: N output features, K input features, R rank. All works on a block of rows of W, so that memory stays
bounded for any layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRankUpdate:
    """A trained change of a weight [N, K]; all tensors fp64 on one device."""

    b_NR: torch.Tensor
    a_RK: torch.Tensor
    scaling: float
    magnitude_N: torch.Tensor | None = None
    """Trained row norms: given for DoRA."""

    def apply(self, w_nK: torch.Tensor, rows: slice) -> torch.Tensor:
        """The trained rows W'[rows], fp32; `w_nK` are the same rows of the base in fp32 and are overwritten."""
        delta_nK = self.b_NR[rows] @ self.a_RK
        w_nK.add_(delta_nK.mul_(self.scaling))
        if self.magnitude_N is not None:
            norm_n = torch.linalg.vector_norm(w_nK, dim=1, dtype=torch.float64)
            w_nK.mul_((self.magnitude_N[rows] / norm_n).unsqueeze(1))
        return w_nK


def lora_scaling(alpha: float, rank: int, *, rslora: bool) -> float:
    """The factor s before B·A."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def matching_pattern(patterns: Iterable[str], module: str) -> str | None:
    """The first key of rank_pattern or alpha_pattern for a module, by PEFT's rule: a regular expression that covers the
    whole module name, or its end after a dot."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)
