"""What GPTQ knows of a linear's inputs, gathered over calibration batches in fp32.

For a layer y = W·x the squared output error of a quantized weight Q is tr((W−Q)·H·(W−Q)ᵀ) per token, H = E[x·xᵀ]
(Frantar et al. 2023, arXiv:2210.17323, §3.1). H is doubled there and not here: only ratios matter. Tokens may have
weights. Asymmetric calibration also needs D = E[(x_full − x)·xᵀ], how far the full model's inputs are from these.

Shapes: T tokens, K inputs.
"""

from __future__ import annotations

import torch

# H is symmetric: of this many block rows only the part right of the diagonal is computed, 9/16 of the work for 8.
BLOCK_ROWS = 8
# Narrower block rows would not fill a GPU.
NARROWEST_BLOCK = 1024


class InputStatistics:
    """Sums x·xᵀ over batches on the device of the activations; fp32 whatever the activations' dtype."""

    def __init__(self, inputs: int, device: torch.device | str, *, drift: bool = False) -> None:
        self.tokens = 0
        self._weight = torch.zeros((), dtype=torch.float32, device=device)
        self._symmetric = False
        self._drift_weight = torch.zeros((), dtype=torch.float32, device=device)
        self._sum_KK = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self._drift_KK = torch.zeros_like(self._sum_KK) if drift else None
        step = max(-(-inputs // BLOCK_ROWS), NARROWEST_BLOCK)
        self._blocks = [(start, min(start + step, inputs)) for start in range(0, inputs, step)]

    def add(
        self, x_TK: torch.Tensor, full_TK: torch.Tensor | None = None, weight_T: torch.Tensor | None = None
    ) -> None:
        """Add a batch of real tokens (no padding), their weights, and the full model's inputs for them where known."""
        self.tokens += x_TK.shape[0]
        weight = x_TK.shape[0] if weight_T is None else weight_T.sum()
        self._weight += weight
        if weight_T is not None:
            root_T1 = weight_T.sqrt().to(x_TK.dtype)[:, None]
            x_TK = x_TK * root_T1
            full_TK = full_TK * root_T1 if full_TK is not None else None
        for start, stop in self._blocks:
            _add_product(self._sum_KK[start:stop, start:], x_TK[:, start:stop], x_TK[:, start:])
        if self._drift_KK is not None and full_TK is not None:
            self._drift_weight += weight
            # The difference of two bf16 numbers that are close is exact, or rounded far below what it corrects.
            difference_TK = full_TK - x_TK
            for start, stop in self._blocks:
                _add_product(self._drift_KK[start:stop], difference_TK[:, start:stop], x_TK)

    def hessian(self, *, keep: bool = False) -> torch.Tensor:
        """H [K, K] per unit of weight, symmetric. RuntimeError when nothing was added.

        It may be half a gigabyte: unless `keep`, it is the caller's alone afterwards, and this can be called no more.
        """
        if not self.tokens:
            raise RuntimeError("no calibration token reached this layer")
        if not self._symmetric:
            self._sum_KK.triu_().div_(self._weight.clamp(min=torch.finfo(torch.float32).tiny))
            self._sum_KK.add_(self._sum_KK.triu(1).T)
            self._symmetric = True
        hessian = self._sum_KK
        if not keep:
            self._sum_KK = torch.empty(0)
        return hessian

    def drift(self, *, keep: bool = False) -> torch.Tensor | None:
        """D [K, K] per unit of weight; None if it was not asked for, zero if no token of the full model was added.

        As large as H: unless `keep`, it is the caller's alone afterwards, and None from then on.
        """
        if self._drift_KK is None:
            return None
        self._drift_KK.div_(self._drift_weight.clamp(min=torch.finfo(torch.float32).tiny))
        self._drift_weight.fill_(1.0)
        drift = self._drift_KK
        if not keep:
            self._drift_KK = None
        return drift


def _add_product(target: torch.Tensor, left_TA: torch.Tensor, right_TB: torch.Tensor) -> None:
    """target [A, B] += leftᵀ·right, in fp32.

    Products of two bf16 or fp16 numbers are exact in fp32, so tensor cores lose nothing but the order of the sum. On
    the CPU there is no such kernel: the activations are converted.
    """
    if left_TA.is_cuda and left_TA.dtype != torch.float32:
        target += torch.mm(left_TA.T, right_TB, out_dtype=torch.float32)
    else:
        target.addmm_(left_TA.T.float(), right_TB.float())
