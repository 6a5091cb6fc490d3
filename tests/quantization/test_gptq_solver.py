"""The solver against a naive float64 loop, against rounding to nearest, and on Hessians that are hard to factorise."""

import pytest
import torch

from qlora.models.gptq_format import SUPPORTED_BITS, dequantize, pack
from qlora.quantization.hessian import InputStatistics
from qlora.quantization.settings import GPTQSettings
from qlora.quantization.solver import (
    SOLVED_ROWS,
    HessianError,
    cholesky_solve,
    factorise,
    feedback,
    quantize_columns,
    solve,
)

INPUTS, OUTPUTS = 96, 32


def random_problem(seed: int = 0, dtype=torch.float64):
    """A weight and the Hessian of correlated inputs whose scales differ."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64)
    x_TK = torch.randn(400, INPUTS, generator=generator, dtype=torch.float64) @ mix
    x_TK *= torch.rand(INPUTS, generator=generator, dtype=torch.float64) + 0.2
    w_NK = 0.05 * torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    return w_NK.to(dtype), (x_TK.T @ x_TK / 400).to(dtype)


def output_error(delta_NK: torch.Tensor, hessian_KK: torch.Tensor) -> torch.Tensor:
    """Squared output error per token of each output [N] when its weights are off by `delta_NK`: diag(Δ·H·Δᵀ)."""
    return torch.einsum("nk,nk->n", delta_NK @ hessian_KK, delta_NK)


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


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_equals_the_naive_loop(bits, sym, act_order):
    w_NK, hessian = random_problem()
    settings = GPTQSettings(bits=bits, group_size=32, sym=sym, act_order=act_order)
    solution = solve(w_NK, hessian, settings)
    expected = naive_codes(w_NK, hessian, solution.grid, solution.g_idx, act_order=act_order, damp=settings.damp)
    assert torch.equal(solution.codes_KN, expected)


@pytest.mark.parametrize("block", [1, 7, 96])
def test_blocks_change_nothing(block):
    w_NK, hessian = random_problem()
    grid = solve(w_NK, hessian, GPTQSettings(group_size=32)).grid
    feedback_KK, cost_K = feedback(factorise(hessian, 0.01)[0].flip(0, 1))
    order_K = torch.arange(INPUTS)
    arguments = (w_NK.T.contiguous(), feedback_KK, cost_K, grid, order_K // 32, order_K)
    codes_KN, loss_N = quantize_columns(*arguments, block=block)
    expected_KN, expected_N = quantize_columns(*arguments)
    assert torch.equal(codes_KN, expected_KN)
    torch.testing.assert_close(loss_N, expected_N)


def test_the_loss_is_that_of_the_damped_hessian():
    w_NK, hessian = random_problem()
    solution = solve(w_NK, hessian, GPTQSettings(group_size=32, damp=0.05))
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(INPUTS)
    torch.testing.assert_close(solution.loss_N, output_error(values(solution) - w_NK, damped))


def test_asymmetric_calibration_aims_at_the_outputs_of_the_full_model():
    generator = torch.Generator().manual_seed(2)
    w_NK, _ = random_problem()
    full_TK = torch.randn(400, INPUTS, generator=generator, dtype=torch.float64)
    x_TK = full_TK + 0.3 * full_TK.roll(1, dims=1) + 0.05 * torch.randn(400, INPUTS, generator=generator).double()
    hessian, drift = x_TK.T @ x_TK / 400, (full_TK - x_TK).T @ x_TK / 400
    errors = []
    for share in (0.0, 0.5, 1.0):
        solution = solve(w_NK, hessian, GPTQSettings(group_size=32, asymmetric_calibration=share, damp=1e-6), drift)
        errors.append((x_TK @ values(solution).T - full_TK @ w_NK.T).square().mean())
    assert errors[0] > 2 * errors[1] and errors[1] > 2 * errors[2]
    # With 8 bits nothing is left but what no weight can make up for.
    solution = solve(w_NK, hessian, GPTQSettings(bits=8, group_size=32, asymmetric_calibration=1.0, damp=1e-9), drift)
    target_TN = full_TK @ w_NK.T
    best = (x_TK @ torch.linalg.lstsq(x_TK, target_TN).solution - target_TN).square().mean()
    assert (x_TK @ values(solution).T - full_TK @ w_NK.T).square().mean() < 1.05 * best


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


def test_the_factor_is_that_of_the_damped_hessian():
    _, hessian = random_problem()
    lower_KK, damp = factorise(hessian, 0.01)
    assert damp == 0.01
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(INPUTS)
    torch.testing.assert_close(lower_KK @ lower_KK.T, damped)
    feedback_KK, cost_K = feedback(lower_KK.flip(0, 1))
    # In the order of visits H = R·Rᵀ, with the rows of feedback those of Rᵀ, divided by the diagonal.
    r_KK = (feedback_KK * cost_K.sqrt()[:, None]).T
    torch.testing.assert_close(r_KK @ r_KK.T, damped.flip(0, 1))
    assert torch.equal(feedback_KK.triu(1), torch.zeros(INPUTS, INPUTS, dtype=torch.float64))


@pytest.mark.parametrize("inputs", [5, SOLVED_ROWS, 2 * SOLVED_ROWS + 100])
def test_systems_are_solved_by_blocks(inputs):
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(2 * inputs, inputs, generator=generator, dtype=torch.float64)
    hessian, right_KX = x_TK.T @ x_TK, torch.randn(inputs, 7, generator=generator, dtype=torch.float64)
    found = cholesky_solve(right_KX.clone(), torch.linalg.cholesky(hessian))
    torch.testing.assert_close(hessian @ found, right_KX)


def test_ill_conditioned_hessians_are_solved_in_double_precision_before_more_damping():
    x_TK = torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(0))
    hessian = x_TK.T @ x_TK
    damp = 1e-8
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(INPUTS)
    assert torch.linalg.cholesky_ex(damped).info != 0
    lower_KK, needed = factorise(hessian, damp)
    assert needed >= damp and torch.isfinite(lower_KK).all()


def test_damping_is_raised_and_reported_where_precision_does_not_help():
    _, hessian = random_problem()
    # One direction is negative, by less than the last damping tried.
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    eigenvalues[0] = -0.05 * hessian.diagonal().mean()
    hessian = (vectors * eigenvalues) @ vectors.T
    _, damp = factorise(hessian, 0.001)
    assert damp == pytest.approx(0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hessians_that_are_not_finite_are_an_error(value):
    w_NK, hessian = random_problem(dtype=torch.float32)
    hessian[5, 5] = value
    with pytest.raises(HessianError, match="not finite"):
        solve(w_NK, hessian, GPTQSettings(group_size=32))


def test_hessians_that_no_damping_helps_are_an_error():
    with pytest.raises(HessianError, match="not positive definite"):
        factorise(torch.diag(torch.tensor([1.0, -10.0, 20.0])), 0.01)


def test_weights_that_are_not_finite_are_an_error():
    w_NK, hessian = random_problem(dtype=torch.float32)
    w_NK[1, 1] = float("nan")
    with pytest.raises(ArithmeticError, match="weights are not finite"):
        solve(w_NK, hessian, GPTQSettings(group_size=32))


def test_hessian_is_the_mean_of_products_over_batches():
    x_TK = torch.randn(50, 90, generator=torch.Generator().manual_seed(0)).bfloat16()
    accumulator = InputStatistics(90, "cpu")
    for batch in x_TK.split([7, 20, 23]):
        accumulator.add(batch)
    expected = (x_TK.double().T @ x_TK.double() / 50).float()
    hessian = accumulator.hessian()
    torch.testing.assert_close(hessian, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(hessian, hessian.T)


def test_a_hessian_of_no_tokens_is_an_error():
    with pytest.raises(RuntimeError, match="no calibration token"):
        InputStatistics(8, "cpu").hessian()
