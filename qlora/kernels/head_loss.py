"""Cross-entropy of a frozen output head, without logits of more than a few tokens in memory.

    loss = c · Σ_n (log Σ_v exp(z_nv) − z_n,target),  z = h·Wᵀ

The head does not learn, so that the loss needs one thing of it in the backward, dh = c · (softmax(z) − onehot)·W, and
that is computed with the loss, tile by tile: two products with the head instead of three, and logits once. A few of its
rows may learn: then their logits take the place of the frozen ones, and their gradient is computed there too.

Shapes: N tokens that are predicted, D width, V vocabulary, L rows that learn.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

# Bytes of the logits that exist at a time, and elements of a row that a program of the kernel holds.
TILE_BYTES = 2**29
BLOCK = 4096


def head_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    scale: torch.Tensor | float,
    learned: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """fp32 scalar: `scale` times the summed cross-entropy of h·Wᵀ against `targets_N` (int64); none where negative.

    learned: tokens (int64 [L], each once) and the rows [L, D] of the head that are theirs, in place of those in
    `weight_VD`. Differentiable in `hidden_ND` and these rows; `weight_VD` must not require a gradient. One dtype for
    all.
    """
    assert not weight_VD.requires_grad, "a head that learns has a gradient of its own"
    scale = torch.as_tensor(scale, dtype=torch.float32, device=hidden_ND.device)
    return _HeadLoss.apply(hidden_ND, weight_VD, targets_N, scale, *(learned or (None, None)))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        scale: torch.Tensor,
        ids_L: torch.Tensor | None,
        rows_LD: torch.Tensor | None,
    ) -> torch.Tensor:
        tokens, vocabulary = len(hidden_ND), len(weight_VD)
        tile = max(1, TILE_BYTES // (vocabulary * hidden_ND.element_size()))
        loss_N = torch.empty(tokens, dtype=torch.float32, device=hidden_ND.device)
        learns = ctx.needs_input_grad[0] or ctx.needs_input_grad[5]
        grad_ND = torch.empty_like(hidden_ND) if learns else None
        rows_grad_LD = torch.zeros_like(rows_LD, dtype=torch.float32) if learns and rows_LD is not None else None
        for start in range(0, tokens, tile):
            some = slice(start, start + tile)
            logits_nV = hidden_ND[some] @ weight_VD.T
            if rows_LD is not None:
                logits_nV[:, ids_L] = hidden_ND[some] @ rows_LD.T
            loss_and_gradient_(logits_nV, targets_N[some], loss_N[some])
            if rows_grad_LD is not None and ids_L is not None:
                of_rows_nL = logits_nV[:, ids_L]
                rows_grad_LD += of_rows_nL.T @ hidden_ND[some]
                logits_nV.index_fill_(1, ids_L, 0)
            if grad_ND is not None:
                torch.mm(logits_nV, weight_VD, out=grad_ND[some])
            if grad_ND is not None and rows_LD is not None:
                grad_ND[some].addmm_(of_rows_nL, rows_LD)
            del logits_nV  # before the next ones are made
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND, scale, rows_grad_LD)
        return loss_N.sum() * scale

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_ND, scale, rows_grad_LD = ctx.saved_tensors
        of_rows = None if rows_grad_LD is None else (rows_grad_LD * (grad * scale)).to(grad_ND.dtype)
        return grad_ND * (grad * scale).to(grad_ND.dtype), None, None, None, None, of_rows


def loss_and_gradient_(logits_NV: torch.Tensor, targets_N: torch.Tensor, loss_N: torch.Tensor) -> None:
    """Write each token's cross-entropy to `loss_N` (fp32) and softmax − onehot over the logits; zeros if no target."""
    if logits_NV.is_cuda and triton is not None:
        _kernel[(len(logits_NV),)](
            logits_NV, targets_N, loss_N, logits_NV.stride(0), VOCABULARY=logits_NV.shape[1], BLOCK=BLOCK, num_warps=16
        )
        return
    wide_NV = logits_NV.float()
    total_N = torch.logsumexp(wide_NV, dim=-1)
    counts_N = targets_N >= 0
    chosen_N1 = targets_N.clamp(min=0)[:, None]
    loss_N.copy_((total_N - wide_NV.gather(1, chosen_N1)[:, 0]) * counts_N)
    wide_NV.sub_(total_N[:, None]).exp_()
    wide_NV.scatter_add_(1, chosen_N1, torch.full_like(chosen_N1, -1, dtype=torch.float32))
    logits_NV.copy_(wide_NV * counts_N[:, None])


if triton is not None:

    @triton.jit
    def _kernel(logits_ptr, targets_ptr, loss_ptr, stride, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
        """One program per token: the maximum and the sum in one pass over its logits, their gradient in a second."""
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * stride
        target = tl.load(targets_ptr + row)
        if target < 0:
            tl.store(loss_ptr + row, 0.0)
            for start in range(0, VOCABULARY, BLOCK):
                column = start + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + column, zeros, mask=column < VOCABULARY)
            return
        largest = float("-inf")
        total = 0.0
        for start in range(0, VOCABULARY, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + column, mask=column < VOCABULARY, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(largest, tl.max(z, axis=0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), axis=0)
            largest = larger
        log_total = largest + tl.log(total)
        tl.store(loss_ptr + row, log_total - tl.load(logits_ptr + target).to(tl.float32))
        tl.debug_barrier()
        for start in range(0, VOCABULARY, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + column, mask=column < VOCABULARY, other=0.0).to(tl.float32)
            gradient = tl.exp(z - log_total) - tl.where(column == target, 1.0, 0.0)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < VOCABULARY)
