"""The Triton kernels of GPTQ against their PyTorch twins in float64, on random and on ill-conditioned Hessians."""

import pytest
import torch

from qlora.kernels.gptq_block import BLOCK, Columns, quantize_block
from qlora.kernels.grid_search import search_scales
from qlora.quantization.grid import choose_grid
from qlora.quantization.settings import GPTQSettings
from qlora.quantization.solver import factorise, feedback, solve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def problem(inputs: int, outputs: int, *, tokens: int, seed: int = 0):
    """A float64 weight [N, K] and a Hessian; fewer tokens than inputs make it singular before damping."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x_TK = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    x_TK *= torch.rand(inputs, generator=generator, dtype=torch.float64).pow(4) + 1e-3
    w_NK = 0.05 * torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return w_NK.cuda(), (x_TK.T @ x_TK / tokens).cuda()


def output_error(delta_NK: torch.Tensor, hessian_KK: torch.Tensor) -> torch.Tensor:
    """Squared output error per token of each output [N] when its weights are off by `delta_NK`: diag(Δ·H·Δᵀ)."""
    return torch.einsum("nk,nk->n", delta_NK @ hessian_KK, delta_NK)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_scales_are_those_of_the_twin(bits, sym, size):
    generator = torch.Generator(device="cuda").manual_seed(bits)
    w_GSN = torch.randn(5, size, 200, generator=generator, device="cuda")
    importance_GS = torch.rand(5, size, generator=generator, device="cuda") + 0.01
    scales_GN, zeros_GN = search_scales(w_GSN, importance_GS, bits, sym)
    # The twin takes over in float64; at a near tie either may win.
    expected_GN, expected_zeros_GN = search_scales(w_GSN.double(), importance_GS.double(), bits, sym)
    same = (scales_GN == expected_GN) & (zeros_GN == expected_zeros_GN)
    assert same.double().mean() > 0.997


def test_groups_that_are_not_finite_get_the_scale_nan():
    w_GSN = torch.randn(2, 32, 64, device="cuda")
    w_GSN[0, 3, 5] = torch.nan
    w_GSN[1, 4, 6] = torch.inf
    scales_GN, _ = search_scales(w_GSN, torch.ones(2, 32, device="cuda"), 4, True)
    assert scales_GN[0, 5].isnan() and scales_GN[1, 6].isnan()
    assert scales_GN.isnan().sum() == 2


@pytest.mark.parametrize("tokens", [4096, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (200, 33)])
def test_a_block_is_that_of_the_twin(inputs, outputs, tokens):
    w_NK, hessian = problem(inputs, outputs, tokens=tokens)
    feedback_KK, cost_K = feedback(factorise(hessian, 0.01)[0].flip(0, 1))
    w_KN = w_NK.T.contiguous()
    grid = choose_grid(w_KN, cost_K, bits=4, group_size=inputs // 8 * 8 // 8, sym=True)
    order_K = torch.randperm(inputs, generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for dtype in (torch.float64, torch.float32):
        columns = Columns(
            target_KN=w_KN.to(dtype),
            center_KN=w_KN.to(dtype).clone(),
            feedback_KK=feedback_KK.to(dtype),
            cost_K=cost_K.to(dtype),
            scales_GN=grid.scales_GN,
            zeros_GN=grid.zeros_GN,
            group_K=order_K // (inputs // 8),
            order_K=order_K,
            top=15,
        )
        codes_KN = torch.full((inputs, outputs), 255, dtype=torch.uint8, device="cuda")
        loss_N = torch.zeros(outputs, dtype=dtype, device="cuda")
        stop = min(BLOCK, inputs)
        delta_BN = quantize_block(columns, 0, stop, codes_KN, loss_N)
        results.append((codes_KN[order_K[:stop]], delta_BN.double(), loss_N.double()))
        assert (codes_KN[order_K[stop:]] == 255).all() and (codes_KN[order_K[:stop]] <= 15).all()
    (codes, delta, loss), (found_codes, found_delta, found_loss) = results
    # One code that falls the other way at a near tie changes those after it in its column: count whole columns.
    same_N = (codes == found_codes).all(0)
    assert same_N.double().mean() > 0.97
    torch.testing.assert_close(found_delta[:, same_N], delta[:, same_N], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found_loss[same_N], loss[same_N], atol=0, rtol=1e-3)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
# Where few tokens leave thousands of weights undetermined, one code that rounds the other way moves many after it.
@pytest.mark.parametrize(
    ("inputs", "tokens", "tolerance"), [(384, 4096, 0.01), (384, 60, 0.01), (2304, 4096, 0.01), (2304, 60, 0.03)]
)
def test_solutions_are_as_good_as_in_float64(inputs, tokens, tolerance, bits, act_order):
    w_NK, hessian = problem(inputs, 160, tokens=tokens)
    settings = GPTQSettings(bits=bits, group_size=64, act_order=act_order)
    losses = []
    for dtype in (torch.float64, torch.float32):
        solution = solve(w_NK.to(dtype), hessian.to(dtype), settings)
        group = solution.g_idx.long()
        codes_KN = solution.codes_KN.double() - solution.grid.zeros_GN.double()[group]
        quantized_NK = (codes_KN * solution.grid.scales_GN.double()[group]).T
        losses.append(output_error(quantized_NK - w_NK, hessian).sum())
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=tolerance)
