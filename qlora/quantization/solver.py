"""GPTQ: round a weight column by column, each rounding error compensated by the columns still to come.

Minimises tr((W−Q)·H·(W−Q)ᵀ) greedily (Frantar et al. 2023, arXiv:2210.17323, §3.3 and algorithm 1), in the form of
Babai's nearest plane algorithm (Chen et al. 2025, arXiv:2507.18553): one Cholesky factorisation H = R·Rᵀ, R upper
triangular, and no inverse. Column i is rounded at w_i + Σ_{j<i} (w_j − q_j)·R[j,i]/R[i,i]; R[i,i]² is what a unit
error there costs in the end, so that it weighs the columns when scales are searched. Columns are visited in descending
order of H's diagonal if asked, on grids chosen beforehand from the original weight ("static groups"), so that the group
of input k is k // group_size whatever the order.

Asymmetric calibration: where the layer sees inputs x̂ that quantized layers before it have moved away from x, the best
unquantized weight for reproducing W·x is W* = W + W·D·H⁻¹ with D = E[(x − x̂)x̂ᵀ], the minimiser of E‖W*·x̂ − W·x‖².
The columns then approximate W + α·(W* − W) instead of W (the aim of Li et al. 2025, arXiv:2504.02692, GPTAQ, reached by
one solve instead of a correction per column).

Shapes: K inputs, N outputs, B columns of a block. Weights are held transposed: a column of W is a row in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora.kernels.gptq_block import BLOCK, Columns, quantize_block
from qlora.quantization.grid import Grid, choose_grid
from qlora.quantization.settings import GPTQSettings

# Damping beyond this share of the mean diagonal is rounding to nearest in all but name.
LARGEST_DAMP = 1.0

# Blocks of columns whose errors reach the columns far behind them in one product.
BLOCKS_TOGETHER = 8
# Rows of a triangular system that are solved before their part in all others is taken off.
SOLVED_ROWS = 1024
# Rows of a product of halves: the halves take that much memory and no more.
PRODUCT_ROWS = 2048


class HessianError(ArithmeticError):
    """The Hessian cannot be factorised at any damping, or is not finite."""


@dataclass(frozen=True)
class Solution:
    """A quantized weight: integer codes on a grid."""

    codes_KN: torch.Tensor
    """uint8, in [0, 2^bits), in the original order of inputs."""
    grid: Grid
    g_idx: torch.Tensor
    """int32 [K], group of each input: k // group_size."""
    loss_N: torch.Tensor
    """Squared error of each output per token, damping included: what the greedy columns could not compensate."""
    power_N: torch.Tensor
    """Squared output itself per token, w·H·wᵀ, to three digits: it puts the loss into proportion."""
    damp: float
    dead_columns: int


def solve(
    w_NK: torch.Tensor, hessian_KK: torch.Tensor, settings: GPTQSettings, drift_KK: torch.Tensor | None = None
) -> Solution:
    """Quantize one weight against one Hessian. Computes in the weight's dtype, fp32 or fp64; the inputs stay unchanged.

    Weights that share their input may be stacked along N: rows of W do not interact. `drift_KK` is D of the module's
    docstring, weighed with `settings.asymmetric_calibration`.
    Raises HessianError when the Hessian is not finite or cannot be factorised, ArithmeticError for non-finite weights.
    """
    power_N = _output_power(w_NK, hessian_KK)
    w_KN = w_NK.T.contiguous()
    del w_NK
    inputs = w_KN.shape[0]
    size = inputs if settings.group_size < 0 else settings.group_size
    diagonal_K = hessian_KK.diagonal().to(w_KN.dtype)
    order_K = torch.arange(inputs, device=w_KN.device)
    group_K = order_K // size
    if settings.act_order:
        order_K = torch.argsort(diagonal_K, descending=True, stable=True)
    backwards_K = order_K.flip(0)

    # Square matrices of a wide layer are gigabytes. Where the caller holds none, each `del` frees one: there are never
    # more than two, and for weights of as many outputs as inputs, which want a solution for D, three.
    pull_KX = None
    if drift_KK is not None and settings.asymmetric_calibration:
        # W* − W = W·D·H⁻¹ needs a solution for W·D or for D: for the narrower.
        narrow = w_KN.shape[1] < inputs
        drift_KK = drift_KK.to(w_KN.dtype)
        pull_KX = product(drift_KK.T, w_KN) if narrow else drift_KK.T.contiguous()
    del drift_KK
    sorted_KK = hessian_KK.to(w_KN.dtype).index_select(0, backwards_K)
    del hessian_KK
    hessian = sorted_KK.index_select(1, backwards_K)
    del sorted_KK
    # An input that calibration never excited says nothing about its weights: they are rounded to nearest, as important
    # as an average column. Zeroing them, as the reference implementation does, would break inputs that do excite it.
    dead_K = diagonal_K == 0
    mean = diagonal_K.mean()
    mean = torch.where(mean > 0, mean, 1.0)
    hessian.diagonal().add_(dead_K[backwards_K] * mean)
    lower_KK, damp = factorise(hessian, settings.damp)
    del hessian

    if pull_KX is not None:
        pull_KX[backwards_K] = cholesky_solve(pull_KX[backwards_K], lower_KK)
        w_KN += settings.asymmetric_calibration * (pull_KX if narrow else product(pull_KX, w_KN))
        del pull_KX
    # Its inputs stood in the reverse order of visits: turned round, it is R.
    upper_KK = lower_KK.flip(0, 1)
    del lower_KK
    feedback_KK, cost_K = feedback(upper_KK)
    del upper_KK
    importance_K = torch.empty_like(cost_K)
    importance_K[order_K] = cost_K
    grid = choose_grid(w_KN, importance_K, bits=settings.bits, group_size=size, sym=settings.sym)
    w_KN = w_KN[order_K]
    codes_KN, loss_N = quantize_columns(w_KN, feedback_KK, cost_K, grid, group_K[order_K], order_K)
    return Solution(codes_KN, grid, group_K.to(torch.int32), loss_N, power_N, damp, int(dead_K.sum()))


def round_to_nearest(w_NK: torch.Tensor, settings: GPTQSettings) -> Solution:
    """The codes of a weight of which nothing is known but itself: inputs that calibration never reached."""
    inputs = w_NK.shape[1]
    identity = torch.eye(inputs, dtype=w_NK.dtype, device=w_NK.device)
    return solve(w_NK, identity, settings)


def factorise(hessian_KK: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """L, lower triangular, of H + λI = L·Lᵀ, and λ as a share of H's mean diagonal: `damp`, or more if that is needed.

    Tried in H's own precision, then in fp64, then with tenfold damping; H is changed meanwhile, and given back as it
    was. Raises HessianError if nothing helps.
    """
    diagonal_K = hessian_KK.diagonal().clone()
    mean = diagonal_K.mean()
    attempts = [(hessian_KK.dtype, damp), (torch.float64, damp)]
    while attempts[-1][1] < LARGEST_DAMP:
        attempts.append((torch.float64, min(10 * attempts[-1][1], LARGEST_DAMP)))
    for dtype, share in attempts:
        hessian_KK.diagonal().copy_(diagonal_K + share * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian_KK.to(dtype))
        hessian_KK.diagonal().copy_(diagonal_K)
        # The one point at which the CPU waits for the GPU: what follows depends on the answer.
        if bool((failed == 0) & torch.isfinite(lower.diagonal()).all()):
            return lower.to(hessian_KK.dtype), share
    if not bool(torch.isfinite(hessian_KK).all()):
        raise HessianError("the Hessian is not finite: calibration activations overflow")
    raise HessianError(f"the Hessian is not positive definite, even damped by {LARGEST_DAMP} of its mean diagonal")


def feedback(upper_KK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R[j,i]/R[i,i] at [i, j], R[i,i]²) of R, whose memory the first may take over."""
    pivots_K = upper_KK.diagonal().clone()
    return upper_KK.T.contiguous().div_(pivots_K[:, None]), pivots_K.square()


def cholesky_solve(right_KX: torch.Tensor, lower_KK: torch.Tensor) -> torch.Tensor:
    """X with L·Lᵀ·X = `right_KX`, which may be overwritten; fp32 on a GPU: good to 16 bits of each product.

    By blocks of rows: nearly all the work is matrix products.
    """
    inputs = right_KX.shape[0]
    blocks = [slice(start, min(start + SOLVED_ROWS, inputs)) for start in range(0, inputs, SOLVED_ROWS)]
    for rows in blocks:
        solved = torch.linalg.solve_triangular(lower_KK[rows, rows], right_KX[rows], upper=False)
        right_KX[rows] = solved
        add_product(right_KX[rows.stop :], lower_KK[rows.stop :, rows], -solved)
    for rows in reversed(blocks):
        solved = torch.linalg.solve_triangular(lower_KK[rows, rows].T, right_KX[rows], upper=True)
        right_KX[rows] = solved
        add_product(right_KX[: rows.start], lower_KK[rows, : rows.start].T, -solved)
    return right_KX


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right; fp32 on a GPU: good to 16 bits."""
    result = torch.zeros(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    add_product(result, left, right)
    return result


def add_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """target += left @ right; fp32 on a GPU: good to 16 bits, several times as fast.

    With bf16 halves a ≈ a₁ + a₂ and b ≈ b₁ + b₂, a·b is a₁·b₁ + a₁·b₂ + a₂·b₁ to 16 bits: one product of three times
    the length, summed in fp32.
    """
    if not left.is_cuda or left.dtype != torch.float32:
        target.addmm_(left, right)
        return
    right_high, right_low = _halves(right)
    long_right = torch.cat([right_high, right_low, right_high])
    for start in range(0, left.shape[0], PRODUCT_ROWS):
        rows = slice(start, start + PRODUCT_ROWS)
        left_high, left_low = _halves(left[rows])
        long_left = torch.cat([left_high, left_high, left_low], dim=1)
        target[rows] += torch.mm(long_left, long_right, out_dtype=torch.float32)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bf16 tensors whose sum is x to 16 bits."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def quantize_columns(
    w_KN: torch.Tensor,
    feedback_KK: torch.Tensor,
    cost_K: torch.Tensor,
    grid: Grid,
    group_K: torch.Tensor,
    order_K: torch.Tensor,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [K, N] in the original order, loss [N]) of a weight whose columns stand in the order of visits.

    Inside a block of at most BLOCK columns errors are fed back one by one; from block to block as a matrix product, to
    the columns of the next few blocks at once, to all later ones from several blocks together. `group_K` says which row
    of the grid each column lies on, `order_K` where it stood.
    """
    inputs, outputs = w_KN.shape
    codes_KN = torch.empty(w_KN.shape, dtype=torch.uint8, device=w_KN.device)
    loss_N = torch.zeros(outputs, dtype=w_KN.dtype, device=w_KN.device)
    columns = Columns(
        target_KN=w_KN,
        center_KN=w_KN.clone(),
        feedback_KK=feedback_KK,
        cost_K=cost_K,
        scales_GN=grid.scales_GN,
        zeros_GN=grid.zeros_GN,
        group_K=group_K,
        order_K=order_K,
        top=2**grid.bits - 1,
    )
    center_KN = columns.center_KN
    together = block * BLOCKS_TOGETHER
    for first in range(0, inputs, together):
        last = min(first + together, inputs)
        deltas = []
        for start in range(first, last, block):
            stop = min(start + block, last)
            deltas.append(quantize_block(columns, start, stop, codes_KN, loss_N))
            center_KN[stop:last].addmm_(feedback_KK[stop:last, start:stop], deltas[-1])
        if last < inputs:
            add_product(center_KN[last:], feedback_KK[last:, first:last], torch.cat(deltas))
    return codes_KN, loss_N


def _output_power(w_NK: torch.Tensor, hessian_KK: torch.Tensor) -> torch.Tensor:
    """w·H·wᵀ of each output [N]; on a GPU from products in bf16, which are as good as free."""
    if not w_NK.is_cuda:
        return torch.einsum("nk,nk->n", w_NK @ hessian_KK, w_NK)
    half_NK = w_NK.bfloat16()
    power_N = torch.zeros(len(w_NK), dtype=w_NK.dtype, device=w_NK.device)
    for start in range(0, w_NK.shape[1], PRODUCT_ROWS):
        some = slice(start, start + PRODUCT_ROWS)
        power_N += torch.einsum("nk,nk->n", half_NK @ hessian_KK[:, some].bfloat16(), half_NK[:, some])
    return power_N
