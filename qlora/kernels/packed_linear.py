"""Weights held as packed integer codes, dequantized for one matrix product at a time, their scales trainable.

    W[k, n] = scales[g, n] · exp(δ[g, n]) · (q[k, n] − z[g, n]),   g = k // S
    ∂L/∂δ[g, n] = scales[g, n] · exp(δ[g, n]) · Σ_{k in g} ∂L/∂W[k, n] · (q[k, n] − z[g, n])

exp keeps a scale's sign and makes equal steps of δ equal relative changes of scales of any size.

Shapes: K inputs, N outputs, G groups of S = K / G inputs, W words of 32 bits. Weights stand as in a GPTQ checkpoint,
inputs along dimension 0, so that neither codes nor weights are ever transposed. On a GPU both formulas are one kernel
each, which reads the packed words; sums have a fixed order, so that equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def inputs(self) -> int:
        """K."""
        return self.qweight_WN.shape[0] * WORD_BITS // self.bits

    @property
    def group_size(self) -> int:
        """S."""
        return self.inputs // self.scales_GN.shape[0]


def dequantize(weight: PackedWeight, log_scale_GN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W [K, N] in `dtype`, from products in the dtype of `log_scale_GN` (fp32 on a GPU)."""
    if _has_kernels(weight):
        return _dequantize_with_triton(weight, log_scale_GN, dtype)
    scale_GN = weight.scales_GN.to(log_scale_GN.dtype) * log_scale_GN.exp()
    return _steps(weight, scale_GN.dtype).mul_(scale_GN.unsqueeze(1)).flatten(0, 1).to(dtype)


def log_scale_gradient(weight: PackedWeight, log_scale_GN: torch.Tensor, grad_KN: torch.Tensor) -> torch.Tensor:
    """∂L/∂δ [G, N] in the dtype of `log_scale_GN`, from ∂L/∂W [K, N]; summed in that dtype (fp32 on a GPU)."""
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


def _dequantize_with_triton(weight: PackedWeight, log_scale_GN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    groups, outputs = weight.scales_GN.shape
    w_KN = torch.empty(weight.inputs, outputs, dtype=dtype, device=weight.qweight_WN.device)
    grid = (triton.cdiv(outputs, COLUMNS), groups, triton.cdiv(weight.group_size, ROWS_PER_PROGRAM))
    _dequantize_kernel[grid](
        weight.qweight_WN,
        weight.zeros_GN,
        weight.scales_GN,
        log_scale_GN,
        w_KN,
        outputs,
        weight.group_size,
        BITS=weight.bits,
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
    def _load_scale(scales_ptr, log_scale_ptr, at, inside):
        scale = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
        return scale * tl.exp(tl.load(log_scale_ptr + at, mask=inside, other=0.0))

    @triton.jit
    def _dequantize_kernel(
        qweight_ptr,
        zeros_ptr,
        scales_ptr,
        log_scale_ptr,
        w_ptr,
        outputs,
        group_size,
        BITS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        ROWS_PER_PROGRAM: tl.constexpr,
    ):
        """One program: COLUMNS outputs of ROWS_PER_PROGRAM inputs of one group."""
        column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        group = tl.program_id(1)
        inside = column < outputs
        at = group.to(tl.int64) * outputs + column
        scale = _load_scale(scales_ptr, log_scale_ptr, at, inside)
        zero = tl.load(zeros_ptr + at, mask=inside, other=0).to(tl.float32)
        first = tl.program_id(2) * ROWS_PER_PROGRAM
        for start in range(0, ROWS_PER_PROGRAM, ROWS):
            in_group = (first + start + tl.arange(0, ROWS))[:, None]
            row = group * group_size + in_group
            mask = inside & (in_group < group_size)
            code = _load_codes(qweight_ptr, row, column, mask, outputs, BITS)
            w = scale * (code - zero)
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
        scale = _load_scale(scales_ptr, log_scale_ptr, at, inside)
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
