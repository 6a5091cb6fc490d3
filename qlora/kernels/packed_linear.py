"""Weights held as packed integer codes, dequantized for one matrix product at a time, their scales trainable or not.

    W[k, n] = scales[g, n] · exp(δ[g, n]) · (q[k, n] − z[g, n]),   g = k // S
    ∂L/∂δ[g, n] = scales[g, n] · exp(δ[g, n]) · Σ_{k in g} ∂L/∂W[k, n] · (q[k, n] − z[g, n])

exp keeps a scale's sign and makes equal steps of δ equal relative changes of scales of any size. Where scales are
frozen there is no δ, and W is exact in fp32: a product of 11 by at most 8 bits.

Shapes: K inputs, N outputs, G groups of S = K / G inputs, W words of 32 bits. Weights stand as in a GPTQ checkpoint,
inputs along dimension 0, so that neither codes nor weights are ever transposed. On a GPU both formulas are one kernel
each, which reads the packed words; sums have a fixed order, so that equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora.models.gptq_format import WORD_BITS, unpack_rows

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

# Inputs by outputs that a program handles at a time, and inputs per program of the dequantization.
ROWS = 32
COLUMNS = 64
ROWS_PER_PROGRAM = 128


@dataclass(frozen=True)
class PackedWeight:
    """The constant part of a quantized weight; all tensors contiguous and on one device."""

    qweight_WN: torch.Tensor
    """int32, as in the checkpoint."""
    zeros_GN: torch.Tensor
    """uint8, the zero points themselves."""
    scales_GN: torch.Tensor
    """fp16, as in the checkpoint."""
    bits: int
    rows_K: torch.Tensor | None = None
    """int32: which input each packed row belongs to, where groups are not runs of neighbouring inputs (desc_act)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.scales_GN.shape[1], self.inputs

    @property
    def device(self) -> torch.device:
        return self.qweight_WN.device

    @property
    def inputs(self) -> int:
        """K."""
        return self.qweight_WN.shape[0] * WORD_BITS // self.bits

    @property
    def group_size(self) -> int:
        """S."""
        return self.inputs // self.scales_GN.shape[0]


def dequantize(
    weight: PackedWeight, log_scale_GN: torch.Tensor | None, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """W [K, N] in `dtype`, from products in the dtype of `log_scale_GN` (fp32 on a GPU, and where there is none).

    out: a contiguous tensor of as many elements, in `dtype`, to write to.
    """
    outputs, inputs = weight.shape
    if out is None:
        out = torch.empty(inputs, outputs, dtype=dtype, device=weight.device)
    w_KN = out.view(inputs, outputs)
    if _has_kernels(weight):
        return _dequantize_with_triton(weight, log_scale_GN, w_KN)
    scale_GN = weight.scales_GN.float()
    if log_scale_GN is not None:
        scale_GN = weight.scales_GN.to(log_scale_GN.dtype) * log_scale_GN.exp()
    found_KN = _steps(weight, scale_GN.dtype).mul_(scale_GN.unsqueeze(1)).flatten(0, 1)
    if weight.rows_K is None:
        return w_KN.copy_(found_KN)
    return w_KN.index_copy_(0, weight.rows_K.long(), found_KN.to(dtype))


def frozen_weight(weight: PackedWeight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """W [K, N] as a checkpoint in bf16 has it, in `dtype`: what training multiplies with, and the merge adds to."""
    if dtype == torch.bfloat16:
        return dequantize(weight, None, dtype, out)
    rounded_KN = dequantize(weight, None, torch.bfloat16)
    return rounded_KN.to(dtype) if out is None else out.view(rounded_KN.shape).copy_(rounded_KN)


def frozen_product(x_TK: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x·W [T, N] in the dtype of x. The weight is dequantized here and again in the backward, and kept in neither."""
    product: torch.Tensor = _FrozenProduct.apply(x_TK, weight)
    return product


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        ctx.weight = weight
        return x_TK @ frozen_weight(weight, x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_TN,) = grads
        return grad_TN @ frozen_weight(ctx.weight, grad_TN.dtype).T, None


def log_scale_gradient(weight: PackedWeight, log_scale_GN: torch.Tensor, grad_KN: torch.Tensor) -> torch.Tensor:
    """∂L/∂δ [G, N] in the dtype of `log_scale_GN`, from ∂L/∂W [K, N]; summed in that dtype (fp32 on a GPU)."""
    if weight.rows_K is not None:
        grad_KN = grad_KN[weight.rows_K]
    if _has_kernels(weight):
        return _gradient_with_triton(weight, log_scale_GN, grad_KN)
    scale_GN = weight.scales_GN.to(log_scale_GN.dtype) * log_scale_GN.exp()
    steps_GSN = _steps(weight, scale_GN.dtype)
    return steps_GSN.mul_(grad_KN.reshape(steps_GSN.shape)).sum(1).mul_(scale_GN)


def _steps(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """q − z as [G, S, N]: each weight in steps of its group's scale."""
    groups, outputs = weight.scales_GN.shape
    codes_GSN = unpack_rows(weight.qweight_WN, weight.bits).reshape(groups, -1, outputs)
    return codes_GSN.to(dtype).sub_(weight.zeros_GN.unsqueeze(1))


def _has_kernels(weight: PackedWeight) -> bool:
    return weight.qweight_WN.is_cuda and triton is not None


def _dequantize_with_triton(
    weight: PackedWeight, log_scale_GN: torch.Tensor | None, w_KN: torch.Tensor
) -> torch.Tensor:
    groups, outputs = weight.scales_GN.shape
    grid = (triton.cdiv(outputs, COLUMNS), groups, triton.cdiv(weight.group_size, ROWS_PER_PROGRAM))
    _dequantize_kernel[grid](
        weight.qweight_WN,
        weight.zeros_GN,
        weight.scales_GN,
        weight.scales_GN if log_scale_GN is None else log_scale_GN,
        weight.qweight_WN if weight.rows_K is None else weight.rows_K,
        w_KN,
        outputs,
        weight.group_size,
        BITS=weight.bits,
        TRAINED=log_scale_GN is not None,
        ORDERED=weight.rows_K is None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        ROWS_PER_PROGRAM=ROWS_PER_PROGRAM,
    )
    return w_KN


def _gradient_with_triton(weight: PackedWeight, log_scale_GN: torch.Tensor, grad_KN: torch.Tensor) -> torch.Tensor:
    groups, outputs = weight.scales_GN.shape
    result_GN = torch.empty_like(log_scale_GN)
    _gradient_kernel[(triton.cdiv(outputs, COLUMNS), groups)](
        weight.qweight_WN,
        weight.zeros_GN,
        weight.scales_GN,
        log_scale_GN,
        grad_KN.contiguous(),
        result_GN,
        outputs,
        weight.group_size,
        BITS=weight.bits,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return result_GN


if triton is not None:

    @triton.jit
    def _load_codes(qweight_ptr, row, column, mask, outputs, BITS: tl.constexpr):
        """Codes (fp32) of inputs `row` [rows, 1] and outputs `column` [1, columns], from the words that hold them."""
        word = row * BITS // 32
        shift = row * BITS % 32
        pointer = qweight_ptr + word.to(tl.int64) * outputs + column
        code = tl.load(pointer, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        if 32 % BITS != 0:
            # A code may go on in the next word; the shift stays below 32 where it does not.
            straddles = shift > 32 - BITS
            rest = tl.load(pointer + outputs, mask=mask & straddles, other=0).to(tl.uint32, bitcast=True)
            code |= tl.where(straddles, rest << ((32 - shift) % 32).to(tl.uint32), 0)
        return (code & ((1 << BITS) - 1)).to(tl.float32)

    @triton.jit
    def _load_scale(scales_ptr, log_scale_ptr, at, inside, TRAINED: tl.constexpr):
        scale = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if TRAINED:
            scale *= tl.exp(tl.load(log_scale_ptr + at, mask=inside, other=0.0))
        return scale

    @triton.jit
    def _dequantize_kernel(
        qweight_ptr,
        zeros_ptr,
        scales_ptr,
        log_scale_ptr,
        rows_ptr,
        w_ptr,
        outputs,
        group_size,
        BITS: tl.constexpr,
        TRAINED: tl.constexpr,
        ORDERED: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        ROWS_PER_PROGRAM: tl.constexpr,
    ):
        """One program: COLUMNS outputs of ROWS_PER_PROGRAM inputs of one group."""
        column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        group = tl.program_id(1)
        inside = column < outputs
        at = group.to(tl.int64) * outputs + column
        scale = _load_scale(scales_ptr, log_scale_ptr, at, inside, TRAINED)
        zero = tl.load(zeros_ptr + at, mask=inside, other=0).to(tl.float32)
        first = tl.program_id(2) * ROWS_PER_PROGRAM
        for start in range(0, ROWS_PER_PROGRAM, ROWS):
            in_group = (first + start + tl.arange(0, ROWS))[:, None]
            row = group * group_size + in_group
            mask = inside & (in_group < group_size)
            code = _load_codes(qweight_ptr, row, column, mask, outputs, BITS)
            w = scale * (code - zero)
            if not ORDERED:
                row = tl.load(rows_ptr + row, mask=in_group < group_size, other=0)
            tl.store(w_ptr + row.to(tl.int64) * outputs + column, w.to(w_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _gradient_kernel(
        qweight_ptr,
        zeros_ptr,
        scales_ptr,
        log_scale_ptr,
        grad_ptr,
        result_ptr,
        outputs,
        group_size,
        BITS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """One program: COLUMNS outputs of one group, its inputs summed one block of ROWS after the other."""
        column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        group = tl.program_id(1)
        inside = column < outputs
        at = group.to(tl.int64) * outputs + column
        scale = _load_scale(scales_ptr, log_scale_ptr, at, inside, True)
        zero = tl.load(zeros_ptr + at, mask=inside, other=0).to(tl.float32)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, group_size, ROWS):
            in_group = (start + tl.arange(0, ROWS))[:, None]
            row = group * group_size + in_group
            mask = inside & (in_group < group_size)
            code = _load_codes(qweight_ptr, row, column, mask, outputs, BITS)
            grad = tl.load(grad_ptr + row.to(tl.int64) * outputs + column, mask=mask, other=0.0).to(tl.float32)
            total += grad * (code - zero)
        tl.store(result_ptr + at, scale * tl.sum(total, axis=0)[None, :], mask=inside)
