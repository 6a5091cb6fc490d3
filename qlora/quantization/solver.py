"""GPTQ: round a weight column by column, each rounding error compensated by the columns still to come.

Minimises tr((W−Q)·H·(W−Q)ᵀ) greedily (Frantar et al. 2023, arXiv:2210.17323, §3.3 and algorithm 1). With H⁻¹ = UᵀU,
U upper triangular, column i is rounded and the columns j > i move by −(w_i − q_i)·U[i,j]/U[i,i]. What they cannot make
up for is Σ (w_i − q_i)²/U[i,i]², so 1/U[i,i]² weighs the columns when scales are searched. Columns are visited in
descending order of H's diagonal if asked, on grids chosen beforehand from the original weight ("static groups"), so
that the group of input k is k // group_size whatever the order.

Shapes: K inputs, N outputs, B columns of a block. Weights are held transposed: a column of W is a row in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qlora.quantization.grid import Grid, choose_grid
from qlora.quantization.settings import GPTQSettings

# Damping beyond this share of the mean diagonal is rounding to nearest in all but name.
LARGEST_DAMP = 1.0


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
    damp: float
    dead_columns: int


@dataclass(frozen=True)
class InverseFactor:
    """U of H⁻¹ = UᵀU for the damped, ordered Hessian."""

    unit_KK: torch.Tensor
    """U, each row divided by its diagonal element."""
    cost_K: torch.Tensor
    """1/U[i,i]²: what a unit error in column i costs once later columns have compensated it."""
    damp: float
    """Damping that the factorisation needed."""


def solve(w_NK: torch.Tensor, hessian_KK: torch.Tensor, settings: GPTQSettings) -> Solution:
    """Quantize one weight against one Hessian. Computes in the weight's dtype, fp32 or fp64; the inputs stay unchanged.

    Weights that share their input may be stacked along N: rows of W do not interact.
    Raises HessianError when the Hessian is not finite or cannot be factorised, ArithmeticError for non-finite weights.
    """
    w_KN = w_NK.T.contiguous()
    inputs = w_KN.shape[0]
    size = inputs if settings.group_size < 0 else settings.group_size
    diagonal_K = hessian_KK.diagonal().to(w_KN.dtype)
    order_K = torch.arange(inputs, device=w_KN.device)
    group_K = order_K // size
    if settings.act_order:
        order_K = torch.argsort(diagonal_K, descending=True, stable=True)

    hessian = hessian_KK.to(w_KN.dtype)[order_K][:, order_K]
    # An input that calibration never excited says nothing about its weights: they are rounded to nearest, as important
    # as an average column. Zeroing them, as the reference implementation does, would break inputs that do excite it.
    dead_K = diagonal_K == 0
    mean = diagonal_K.mean()
    hessian.diagonal()[dead_K[order_K]] = torch.where(mean > 0, mean, 1.0)
    factor = factorise_inverse(hessian, settings.damp)

    cost_K = torch.empty_like(factor.cost_K)
    cost_K[order_K] = factor.cost_K
    grid = choose_grid(w_KN, cost_K, bits=settings.bits, group_size=size, sym=settings.sym)
    ordered_codes = quantize_columns(w_KN[order_K], factor.unit_KK, grid, group_K[order_K], settings.block_size)
    codes_KN = torch.empty_like(ordered_codes)
    codes_KN[order_K] = ordered_codes
    return Solution(codes_KN, grid, group_K.to(torch.int32), factor.damp, int(dead_K.sum()))


def factorise_inverse(hessian_KK: torch.Tensor, damp: float) -> InverseFactor:
    """U of (H + λI)⁻¹ = UᵀU, λ a share of H's mean diagonal: `damp`, or more where that does not suffice.

    One Cholesky factorisation and one triangular inverse: reversing rows and columns turns the lower factor of the
    reversed H into R with H = R·Rᵀ, R upper triangular, and U = R⁻¹. Tried in H's own precision, then in fp64, then
    with tenfold damping. Raises HessianError if nothing helps.
    """
    mean = hessian_KK.diagonal().mean()
    attempts = [(hessian_KK.dtype, damp), (torch.float64, damp)]
    while attempts[-1][1] < LARGEST_DAMP:
        attempts.append((torch.float64, min(10 * attempts[-1][1], LARGEST_DAMP)))
    for dtype, share in attempts:
        damped = hessian_KK.to(dtype, copy=True)
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        upper = lower.flip(0, 1)
        # With D the diagonal of R, the rows of U divided by their diagonal are (R·D⁻¹)⁻¹.
        pivots = upper.diagonal()
        identity = torch.eye(upper.shape[0], dtype=dtype, device=upper.device)
        unit = torch.linalg.solve_triangular(upper / pivots, identity, upper=True, unitriangular=True)
        if bool((failed == 0) & torch.isfinite(unit).all() & torch.isfinite(pivots).all()):
            return InverseFactor(unit.to(hessian_KK.dtype), pivots.square().to(hessian_KK.dtype), share)
    if not bool(torch.isfinite(hessian_KK).all()):
        raise HessianError("the Hessian is not finite: calibration activations overflow")
    raise HessianError(f"the Hessian is not positive definite, even damped by {LARGEST_DAMP} of its mean diagonal")


def quantize_columns(
    w_KN: torch.Tensor, unit_KK: torch.Tensor, grid: Grid, group_K: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Codes (uint8 [K, N]) of ordered columns, in blocks whose effect on later columns is applied at once.

    `w_KN` is overwritten. `group_K` says which row of the grid each column lies on.
    """
    inputs = w_KN.shape[0]
    codes_KN = torch.empty(w_KN.shape, dtype=torch.uint8, device=w_KN.device)
    for start in range(0, inputs, block_size):
        stop = min(start + block_size, inputs)
        scales_BN = grid.scales_GN[group_K[start:stop]].to(w_KN.dtype)
        zeros_BN = grid.zeros_GN[group_K[start:stop]].to(w_KN.dtype)
        with _one_thread():
            codes_BN, errors_BN = quantize_block(
                w_KN[start:stop], unit_KK[start:stop, start:stop], scales_BN, -zeros_BN, 2**grid.bits - 1 - zeros_BN
            )
        codes_KN[start:stop] = codes_BN.add_(zeros_BN)
        w_KN[stop:].addmm_(unit_KK[start:stop, stop:].T, errors_BN, alpha=-1)
    return codes_KN


def quantize_block(
    w_BN: torch.Tensor, unit_BB: torch.Tensor, scales_BN: torch.Tensor, low_BN: torch.Tensor, high_BN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes minus zero point, rounding errors), both [B, N], of the columns of one block; `w_BN` is overwritten."""
    codes_BN = torch.empty_like(w_BN)
    errors_BN = torch.empty_like(w_BN)
    for i in range(w_BN.shape[0]):
        code = torch.div(w_BN[i], scales_BN[i], out=codes_BN[i]).round_().clamp_(low_BN[i], high_BN[i])
        error = torch.addcmul(w_BN[i], code, scales_BN[i], value=-1, out=errors_BN[i])
        w_BN[i + 1 :].addr_(unit_BB[i, i + 1 :], error, alpha=-1)
    return codes_BN, errors_BN


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


def output_error(delta_NK: torch.Tensor, hessian_KK: torch.Tensor) -> torch.Tensor:
    """Squared output error per token of each output [N] when its weights are off by `delta_NK`: diag(Δ·H·Δᵀ)."""
    return torch.einsum("nk,nk->n", delta_NK @ hessian_KK, delta_NK)
