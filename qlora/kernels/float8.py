"""Products with frozen weights in 8 bits: both factors in e4m3 with a scale for each row, sums in fp32.

A row x is stored as x₈ = round(x · 448 / max|x|), which stands for s · x₈ with s = max|x| / 448. 448 is the largest
number of e4m3 (Micikevicius et al. 2022, arXiv:2209.05433, §3.2), which keeps four significant bits of numbers down to
s / 64. Then

    y[t, n] = s_t · w_n · Σ_k x₈[t, k] · W₈[n, k]

so both factors lie in memory with the summed dimension last, as the GPU's matrix units want them: a weight that
forwards is summed over its inputs and backwards over its outputs comes in both orders, with scales of their own.

Shapes: T tokens, K inputs, N outputs, R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0
# A row of zeros has this scale times LARGEST for its largest number.
SMALLEST = 1e-12
# Both dimensions of a weight are multiples of this, or it is multiplied with in 16 bits.
MULTIPLE = 16
# Matrix units for 8 bits came with compute capability 8.9 (Ada), 9.0 (Hopper).
CAPABILITY = (8, 9)
COLUMNS = 2048


@dataclass(frozen=True)
class Rows:
    """A matrix in 8 bits, with a scale for each row."""

    values_RC: torch.Tensor
    """e4m3, contiguous."""
    scale_R1: torch.Tensor
    """fp32."""


@dataclass(frozen=True)
class Float8Weight:
    """A frozen weight [N, K] in both orders."""

    forwards: Rows
    """[N, K]."""
    backwards: Rows
    """[K, N]."""

    @classmethod
    def of(cls, weight_NK: torch.Tensor) -> Float8Weight:
        return cls(rows_of(weight_NK), rows_of(weight_NK.T))

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.forwards.values_RC.shape


def takes(outputs: int, inputs: int) -> bool:
    """Whether the matrix units multiply with a weight of this shape in 8 bits."""
    return outputs % MULTIPLE == inputs % MULTIPLE == 0


def missing(device: torch.device) -> str | None:
    """Why this device has no products in 8 bits; None if it has."""
    if device.type != "cuda":
        return f"{device.type} has no matrix units for 8 bits"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no matrix units for 8 bits; Ada and Hopper were the first"
    return None


def rows_of(x_RC: torch.Tensor) -> Rows:
    """x in 8 bits."""
    x_RC = x_RC.contiguous()
    if not x_RC.is_cuda or triton is None:
        most_R1 = x_RC.float().abs().amax(1, keepdim=True).clamp(min=SMALLEST)
        # A number over a tensor is the number times a reciprocal, rounded twice; two tensors are divided.
        factor_R1 = torch.full_like(most_R1, LARGEST) / most_R1
        values_RC = (x_RC.float() * factor_R1).clamp(-LARGEST, LARGEST).to(FORMAT)
        return Rows(values_RC, most_R1 / LARGEST)
    rows, columns = x_RC.shape
    values_RC = torch.empty(rows, columns, dtype=FORMAT, device=x_RC.device)
    scale_R1 = torch.empty(rows, 1, dtype=torch.float32, device=x_RC.device)
    _rows_kernel[(rows,)](
        x_RC, values_RC, scale_R1, columns, LARGEST=LARGEST, SMALLEST=SMALLEST, COLUMNS=COLUMNS, num_warps=4
    )
    return Rows(values_RC, scale_R1)


def product(x: Rows, weight: Rows, *, fast: bool) -> torch.Tensor:
    """x·wᵀ [R of x, R of w] in bf16; fast: partial sums keep 14 bits for a while, as is usual in forwards alone."""
    return torch._scaled_mm(
        x.values_RC,
        weight.values_RC.T,
        scale_a=x.scale_R1,
        scale_b=weight.scale_R1.T,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


if triton is not None:

    @triton.jit
    def _rows_kernel(
        x_ptr, values_ptr, scale_ptr, columns,
        LARGEST: tl.constexpr, SMALLEST: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """One program per row, which it reads twice; the second time from the cache."""
        row = tl.program_id(0)
        start = row.to(tl.int64) * columns
        column = tl.arange(0, COLUMNS)
        most = tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, columns, COLUMNS):
            x = tl.load(x_ptr + start + first + column, mask=first + column < columns, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(x))
        most_of_all = tl.maximum(tl.max(most, axis=0), SMALLEST)
        tl.store(scale_ptr + row, tl.div_rn(most_of_all, LARGEST))
        factor = tl.div_rn(LARGEST, most_of_all)
        for first in range(0, columns, COLUMNS):
            inside = first + column < columns
            x = tl.load(x_ptr + start + first + column, mask=inside, other=0.0).to(tl.float32)
            # The product of the largest number may round above what e4m3 holds.
            x = tl.minimum(tl.maximum(x * factor, -LARGEST), LARGEST)
            tl.store(values_ptr + start + first + column, x.to(values_ptr.dtype.element_ty), mask=inside)
