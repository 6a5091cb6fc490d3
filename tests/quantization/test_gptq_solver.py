"""The solver against a naive float64 loop, against rounding to nearest, and on Hessians that are hard to factorise."""

import pytest
import torch

from qlora.models.gptq_format import SUPPORTED_BITS, dequantize, pack
from qlora.quantization.hessian import HessianAccumulator
from qlora.quantization.settings import GPTQSettings
from qlora.quantization.solver import HessianError, factorise_inverse, output_error, solve

INPUTS, OUTPUTS = 96, 32


def random_problem(seed: int = 0, dtype=torch.float64):
    """A weight and the Hessian of correlated inputs whose scales differ."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64)
    x_TK = torch.randn(400, INPUTS, generator=generator, dtype=torch.float64) @ mix
    x_TK *= torch.rand(INPUTS, generator=generator, dtype=torch.float64) + 0.2
    w_NK = 0.05 * torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    return w_NK.to(dtype), (x_TK.T @ x_TK / 400).to(dtype)


def values(solution) -> torch.Tensor:
    """The weight [N, K] of a solution."""
    group = solution.g_idx.long()
    codes = solution.codes_KN.double() - solution.grid.zeros_GN.double()[group]
    return (codes * solution.grid.scales_GN.double()[group]).T


def nearest(w_NK, grid, g_idx) -> torch.Tensor:
    """Codes [K, N] of rounding to nearest on a grid."""
    group = g_idx.long()
    codes = (w_NK.T / grid.scales_GN.to(w_NK)[group]).round() + grid.zeros_GN[group]
    return codes.clamp(0, 2**grid.bits - 1).to(torch.uint8)


def naive_codes(w_NK, hessian, grid, g_idx, *, act_order, damp) -> torch.Tensor:
    """GPTQ as the paper writes it: one column at a time, no blocks, the factor from an explicit inverse."""
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(INPUTS)
    damped = hessian[order][:, order] + damp * hessian.diagonal().mean() * torch.eye(INPUTS)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w = w_NK.clone()[:, order]
    codes = torch.empty(INPUTS, OUTPUTS, dtype=torch.uint8)
    for i, column in enumerate(order.tolist()):
        scale, zero = grid.scales_GN[g_idx[column]].double(), grid.zeros_GN[g_idx[column]].double()
        code = ((w[:, i] / scale).round() + zero).clamp(0, 2**grid.bits - 1)
        codes[column] = code.to(torch.uint8)
        error = (w[:, i] - scale * (code - zero)) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return codes


@pytest.mark.parametrize("block_size", [7, 128])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_equals_the_naive_loop(bits, sym, act_order, block_size):
    w_NK, hessian = random_problem()
    settings = GPTQSettings(bits=bits, group_size=32, sym=sym, act_order=act_order, block_size=block_size)
    solution = solve(w_NK, hessian, settings)
    expected = naive_codes(w_NK, hessian, solution.grid, solution.g_idx, act_order=act_order, damp=settings.damp)
    assert torch.equal(solution.codes_KN, expected)


@pytest.mark.parametrize("act_order", [True, False])
def test_rounds_to_nearest_when_inputs_are_independent(act_order):
    w_NK, hessian = random_problem()
    solution = solve(w_NK, hessian.diagonal().diag(), GPTQSettings(group_size=32, act_order=act_order))
    assert torch.equal(solution.codes_KN, nearest(w_NK, solution.grid, solution.g_idx))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_beats_rounding_to_nearest_when_inputs_are_correlated(bits):
    w_NK, hessian = random_problem()
    solution = solve(w_NK, hessian, GPTQSettings(bits=bits, group_size=32))
    group = solution.g_idx.long()
    codes = nearest(w_NK, solution.grid, solution.g_idx).double() - solution.grid.zeros_GN.double()[group]
    rounded = (codes * solution.grid.scales_GN.double()[group]).T
    loss, loss_rounded = (output_error(q - w_NK, hessian).sum() for q in (values(solution), rounded))
    assert loss < 0.6 * loss_rounded


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_packed_weights_are_what_the_solver_chose(bits, sym):
    w_NK, hessian = random_problem(dtype=torch.float32)
    solution = solve(w_NK, hessian, GPTQSettings(bits=bits, group_size=32, sym=sym))
    packed = pack(solution.codes_KN, solution.grid.zeros_GN, solution.grid.scales_GN, solution.g_idx, bits)
    assert torch.equal(dequantize(packed, bits), values(solution).float())


@pytest.mark.parametrize(("group_size", "groups"), [(32, 3), (-1, 1)])
def test_groups_stay_in_the_original_order(group_size, groups):
    w_NK, hessian = random_problem()
    solution = solve(w_NK, hessian, GPTQSettings(group_size=group_size, act_order=True))
    assert solution.g_idx.tolist() == [k // (INPUTS // groups) for k in range(INPUTS)]
    assert solution.grid.scales_GN.shape == (groups, OUTPUTS)


def test_stacked_weights_are_solved_like_single_ones():
    w_NK, hessian = random_problem()
    settings = GPTQSettings(group_size=32)
    stacked = solve(w_NK, hessian, settings)
    halves = [solve(half, hessian, settings) for half in w_NK.split(OUTPUTS // 2)]
    assert torch.equal(stacked.codes_KN, torch.cat([half.codes_KN for half in halves], dim=1))


def test_dead_columns_are_rounded_to_nearest_and_change_no_other():
    w_NK, hessian = random_problem()
    dead = [3, 40, 41]
    hessian[dead] = 0
    hessian[:, dead] = 0
    solution = solve(w_NK, hessian, GPTQSettings(group_size=32))
    assert solution.dead_columns == 3
    expected = nearest(w_NK, solution.grid, solution.g_idx)
    assert torch.equal(solution.codes_KN[dead], expected[dead])
    alive = hessian.clone()
    alive.diagonal()[dead] = hessian.diagonal().mean()
    naive = naive_codes(w_NK, alive, solution.grid, solution.g_idx, act_order=True, damp=0.01)
    assert torch.equal(solution.codes_KN, naive)


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    w_NK, hessian = random_problem(dtype=torch.float32)
    solution = solve(w_NK, torch.zeros_like(hessian), GPTQSettings(group_size=32))
    assert solution.dead_columns == INPUTS
    assert torch.equal(solution.codes_KN, nearest(w_NK, solution.grid, solution.g_idx))


def test_the_factor_is_that_of_the_inverse():
    _, hessian = random_problem()
    factor = factorise_inverse(hessian, 0.01)
    upper = factor.unit_KK / factor.cost_K.sqrt().unsqueeze(1)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(INPUTS)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(INPUTS, dtype=torch.float64), atol=1e-8, rtol=0)
    assert torch.equal(factor.unit_KK.tril(-1), torch.zeros(INPUTS, INPUTS, dtype=torch.float64))


def test_ill_conditioned_hessians_are_solved_in_double_precision_before_more_damping():
    x_TK = torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(0))
    hessian = x_TK.T @ x_TK
    damp = 1e-8
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(INPUTS)
    assert torch.linalg.cholesky_ex(damped).info != 0
    factor = factorise_inverse(hessian, damp)
    assert factor.damp >= damp and torch.isfinite(factor.unit_KK).all()


def test_damping_is_raised_and_reported_where_precision_does_not_help():
    _, hessian = random_problem()
    # One direction is negative, by less than the last damping tried.
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    eigenvalues[0] = -0.05 * hessian.diagonal().mean()
    hessian = (vectors * eigenvalues) @ vectors.T
    factor = factorise_inverse(hessian, 0.001)
    assert factor.damp == pytest.approx(0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hessians_that_are_not_finite_are_an_error(value):
    w_NK, hessian = random_problem(dtype=torch.float32)
    hessian[5, 5] = value
    with pytest.raises(HessianError, match="not finite"):
        solve(w_NK, hessian, GPTQSettings(group_size=32))


def test_hessians_that_no_damping_helps_are_an_error():
    with pytest.raises(HessianError, match="not positive definite"):
        factorise_inverse(torch.diag(torch.tensor([1.0, -10.0, 20.0])), 0.01)


def test_weights_that_are_not_finite_are_an_error():
    w_NK, hessian = random_problem(dtype=torch.float32)
    w_NK[1, 1] = float("nan")
    with pytest.raises(ArithmeticError, match="weights are not finite"):
        solve(w_NK, hessian, GPTQSettings(group_size=32))


def test_hessian_is_the_mean_of_products_over_batches():
    x_TK = torch.randn(50, 90, generator=torch.Generator().manual_seed(0)).bfloat16()
    accumulator = HessianAccumulator(90, "cpu")
    for batch in x_TK.split([7, 20, 23]):
        accumulator.add(batch)
    expected = (x_TK.double().T @ x_TK.double() / 50).float()
    hessian = accumulator.mean()
    torch.testing.assert_close(hessian, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(hessian, hessian.T)


def test_a_hessian_of_no_tokens_is_an_error():
    with pytest.raises(RuntimeError, match="no calibration token"):
        HessianAccumulator(8, "cpu").mean()
