"""The Hessian of a linear layer's output error, H = XᵀX / tokens, gathered over calibration batches in fp32.

For a layer y = W·x the squared output error of a quantized weight Q is tr((W−Q)·H·(W−Q)ᵀ) per token
(Frantar et al. 2023, arXiv:2210.17323, §3.1). H is halved there and doubled here by neither: only ratios matter.

Shapes: T tokens, K inputs.
"""

from __future__ import annotations

import torch

# H is symmetric: of this many block rows only the part right of the diagonal is computed, 5/8 of the work for 4.
BLOCK_ROWS = 4


class HessianAccumulator:
    """Sums xᵀx over batches on the device of the activations; fp32 whatever the activations' dtype."""

    def __init__(self, inputs: int, device: torch.device | str) -> None:
        self.tokens = 0
        self._sum_KK = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        step = -(-inputs // BLOCK_ROWS)
        self._blocks = [(start, min(start + step, inputs)) for start in range(0, inputs, step)]

    def add(self, x_TK: torch.Tensor) -> None:
        """Add a batch of real tokens (no padding)."""
        self.tokens += x_TK.shape[0]
        # Products of two bf16 or fp16 numbers are exact in fp32, so tensor cores lose nothing but the order of the sum.
        # On the CPU there is no such kernel: x itself is converted.
        mixed = x_TK.is_cuda and x_TK.dtype != torch.float32
        x_TK = x_TK if mixed else x_TK.float()
        for start, stop in self._blocks:
            rows, columns = x_TK[:, start:stop].T, x_TK[:, start:]
            target = self._sum_KK[start:stop, start:]
            if mixed:
                target += torch.mm(rows, columns, out_dtype=torch.float32)
            else:
                target.addmm_(rows, columns)

    def mean(self) -> torch.Tensor:
        """H [K, K] per token, symmetric. Raises RuntimeError when no token was ever added."""
        if not self.tokens:
            raise RuntimeError("no calibration token reached this layer")
        upper = self._sum_KK.triu()
        return (upper + upper.triu(1).T) / self.tokens
