"""The sequential part of GPTQ: round the columns of one block, each after the errors of those before it.

With H = R·Rᵀ, R upper triangular, and Δ = W − Q, the squared output error is ‖Δ·R‖², whose column i,
Σ_{j≤i} Δ_j·R[j,i], vanishes when q_i is the center c_i = w_i + Σ_{j<i} Δ_j·R[j,i]/R[i,i]. Rounding the centers one
after the other is Babai's nearest plane algorithm, and the same as GPTQ's error feedback through the inverse of H
(Chen et al. 2025, arXiv:2507.18553), without the inverse. What stays is Σ R[i,i]²·(c_i − q_i)².

Shapes: K inputs in the order in which they are visited, N outputs, B inputs of a block, G groups. Weights are held
transposed: a column of W is a row in memory. `feedback_KK`[i, j] = R[j,i]/R[i,i], lower triangular, unit diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl

    from qlora.kernels.rounding import round_half_even
except ImportError:  # CPU builds of torch come without Triton
    triton = None

BLOCK = 128
# Outputs per program: enough programs for the GPU, and a block's errors fit in registers.
TILE = 32


@dataclass(frozen=True)
class Columns:
    """The columns of a weight in the order in which they are visited, and the grid that they are rounded to."""

    target_KN: torch.Tensor
    """What is to be approximated."""
    center_KN: torch.Tensor
    """`target_KN` plus what errors of visited columns add; complete for a column when all before it are done."""
    feedback_KK: torch.Tensor
    cost_K: torch.Tensor
    """R[i,i]²."""
    scales_GN: torch.Tensor
    """fp16."""
    zeros_GN: torch.Tensor
    """uint8."""
    group_K: torch.Tensor
    """int64, the group of each visited column."""
    order_K: torch.Tensor
    """int64, the original index of each visited column."""
    top: int
    """Largest code."""


def quantize_block(
    columns: Columns, start: int, stop: int, codes_KN: torch.Tensor, loss_N: torch.Tensor
) -> torch.Tensor:
    """Round columns `start` to `stop` (at most BLOCK) and return their Δ [B, N].

    Writes codes (uint8) into `codes_KN` in the original order of inputs and adds R[i,i]²·(c_i − q_i)² to `loss_N`.
    `center_KN` must hold the feedback of all columns before `start`; its rows of this block may be overwritten.
    """
    on_gpu = columns.target_KN.is_cuda and columns.target_KN.dtype == torch.float32 and triton is not None
    return (_with_triton if on_gpu else _with_torch)(columns, start, stop, codes_KN, loss_N)


def _with_torch(columns: Columns, start: int, stop: int, codes_KN: torch.Tensor, loss_N: torch.Tensor) -> torch.Tensor:
    target_BN, center_BN = columns.target_KN[start:stop], columns.center_KN[start:stop]
    feedback_BB = columns.feedback_KK[start:stop, start:stop]
    group_B = columns.group_K[start:stop]
    scales_BN = columns.scales_GN[group_B].to(target_BN.dtype)
    zeros_BN = columns.zeros_GN[group_B].to(target_BN.dtype)
    low_BN, high_BN = -zeros_BN, columns.top - zeros_BN
    codes_BN, delta_BN = torch.empty_like(target_BN), torch.empty_like(target_BN)
    with _one_thread():
        for i in range(stop - start):
            code = torch.div(center_BN[i], scales_BN[i], out=codes_BN[i]).round_().clamp_(low_BN[i], high_BN[i])
            delta = torch.addcmul(target_BN[i], code, scales_BN[i], value=-1, out=delta_BN[i])
            center_BN[i + 1 :].addr_(feedback_BB[i + 1 :, i], delta)
    residual_BN = center_BN.addcmul(codes_BN, scales_BN, value=-1)
    loss_N += (residual_BN.square_() * columns.cost_K[start:stop, None]).sum(0)
    codes_KN[columns.order_K[start:stop]] = codes_BN.add_(zeros_BN).to(torch.uint8)
    return delta_BN


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run a CPU's many small operations on one core.

    A column is too little work to share; where another program has one of the cores, each of the thousands of barriers
    waits for its time slice.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _with_triton(columns: Columns, start: int, stop: int, codes_KN: torch.Tensor, loss_N: torch.Tensor) -> torch.Tensor:
    inputs, outputs = columns.target_KN.shape
    delta_BN = torch.empty(stop - start, outputs, dtype=torch.float32, device=columns.target_KN.device)
    _block_kernel[(triton.cdiv(outputs, TILE),)](
        columns.target_KN,
        columns.center_KN,
        columns.feedback_KK,
        columns.cost_K,
        columns.scales_GN,
        columns.zeros_GN,
        columns.group_K,
        columns.order_K,
        codes_KN,
        delta_BN,
        loss_N,
        start,
        stop - start,
        inputs,
        outputs,
        columns.top,
        BLOCK=BLOCK,
        TILE=TILE,
    )
    return delta_BN


if triton is not None:

    @triton.jit
    def _read_column(
        i,
        start,
        columns,
        inputs,
        outputs,
        target_ptr,
        center_ptr,
        feedback_ptr,
        cost_ptr,
        scales_ptr,
        zeros_ptr,
        group_ptr,
        order_ptr,
        output,
        inside,
        column,
    ):
        """All that column `i` of the block needs from memory; beyond the last column, values that harm nothing."""
        present = i < columns
        mask = inside & present
        visited = (start + i).to(tl.int64)
        group = tl.load(group_ptr + visited, mask=present, other=0) * outputs
        original = tl.load(order_ptr + visited, mask=present, other=0) * outputs
        cost = tl.load(cost_ptr + visited, mask=present, other=0.0)
        scale = tl.load(scales_ptr + group + output, mask=mask, other=1.0).to(tl.float32)
        zero = tl.load(zeros_ptr + group + output, mask=mask, other=0).to(tl.float32)
        target = tl.load(target_ptr + visited * outputs + output, mask=mask, other=0.0)
        center = tl.load(center_ptr + visited * outputs + output, mask=mask, other=0.0)
        feedback = tl.load(feedback_ptr + visited * inputs + start + column, mask=(column < i) & present, other=0.0)
        return original, cost, scale, zero, target, center, feedback

    @triton.jit(do_not_specialize=["start", "columns", "inputs", "outputs", "top"])
    def _block_kernel(
        target_ptr,
        center_ptr,
        feedback_ptr,
        cost_ptr,
        scales_ptr,
        zeros_ptr,
        group_ptr,
        order_ptr,
        codes_ptr,
        delta_ptr,
        loss_ptr,
        start,
        columns,
        inputs,
        outputs,
        top,
        BLOCK: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """One program takes TILE outputs through all columns of the block, the errors so far held in registers.

        A column is read while the one before it is computed: waiting for memory would be most of the time.
        """
        output = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = output < outputs
        column = tl.arange(0, BLOCK)
        delta_BN = tl.zeros((BLOCK, TILE), tl.float32)
        loss = tl.zeros((TILE,), tl.float32)
        original, cost, scale, zero, target, center, feedback = _read_column(
            0, start, columns, inputs, outputs, target_ptr, center_ptr, feedback_ptr,
            cost_ptr, scales_ptr, zeros_ptr, group_ptr, order_ptr, output, inside, column,
        )  # fmt: skip
        for i in range(BLOCK):
            next_original, next_cost, next_scale, next_zero, next_target, next_center, next_feedback = _read_column(
                i + 1, start, columns, inputs, outputs, target_ptr, center_ptr, feedback_ptr,
                cost_ptr, scales_ptr, zeros_ptr, group_ptr, order_ptr, output, inside, column,
            )  # fmt: skip
            center += tl.sum(delta_BN * feedback[:, None], axis=0)
            code = round_half_even(tl.div_rn(center, scale))
            code = tl.minimum(tl.maximum(code, -zero), top - zero)
            quantized = code * scale
            residual = center - quantized
            loss += cost * residual * residual
            delta = target - quantized
            delta_BN = tl.where(column[:, None] == i, delta[None, :], delta_BN)
            tl.store(codes_ptr + original + output, (code + zero).to(tl.uint8), mask=inside & (i < columns))
            original, cost, scale, zero = next_original, next_cost, next_scale, next_zero
            target, center, feedback = next_target, next_center, next_feedback
        rows = column[:, None].to(tl.int64) * outputs + output[None, :]
        tl.store(delta_ptr + rows, delta_BN, mask=(column[:, None] < columns) & inside[None, :])
        tl.store(loss_ptr + output, tl.load(loss_ptr + output, mask=inside, other=0.0) + loss, mask=inside)
