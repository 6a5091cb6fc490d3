"""A frozen linear that stays what a GPTQ or AWQ checkpoint has: packed codes, dequantized for each product.

To PEFT it is an `nn.Linear`: it takes adapters, DoRA included, without a name of its own.
"""

from __future__ import annotations

import torch
from torch import nn

from qlora.kernels.packed_linear import PackedWeight, frozen_product, frozen_weight


class PackedLinear(nn.Linear):
    """y = x·Wᵀ + b, computed in the dtype of x, or autocast's. Gradients flow to x and to a bias that learns.

    `source_cls` is the class it stands in for: GPT-2's Conv1D holds its weight transposed, which is undone here.
    """

    def __init__(
        self, weight: PackedWeight, bias: torch.Tensor | None, compute_dtype: torch.dtype, source_cls: type[nn.Module]
    ) -> None:
        # nn.Linear's own would allocate a weight in 16 or 32 bits.
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype, self.source_cls, self.bits = compute_dtype, source_cls, weight.bits
        # Parameters, so that they move with the model and DDP sends them once and not with every forward.
        self.qweight = _frozen(weight.qweight_WN)
        self.zeros = _frozen(weight.zeros_GN)
        # As bytes, so that casting the model to another dtype leaves them what they are; NCCL knows no int16.
        self.scales = _frozen(weight.scales_GN.contiguous().view(torch.uint8))
        self._scale_dtype = weight.scales_GN.dtype
        self.rows = None if weight.rows_K is None else _frozen(weight.rows_K)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]

    @property
    def packed(self) -> PackedWeight:
        rows = None if self.rows is None else self.rows.data
        scales = self.scales.data.view(self._scale_dtype)
        return PackedWeight(self.qweight.data, self.zeros.data, scales, self.bits, rows)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """W [N, K] in the compute dtype, dequantized on every access."""
        return frozen_weight(self.packed, self.compute_dtype).T

    def stored_weight(self) -> torch.Tensor:
        """W [N, K] in bf16, as the dequantized checkpoint has it."""
        return frozen_weight(self.packed, torch.bfloat16).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] → [..., N]."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y = frozen_product(x.reshape(-1, self.in_features), self.packed).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        groups = len(self.scales)
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, groups={groups}"


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
