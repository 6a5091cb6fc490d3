"""Products in 8 bits, against float64."""

import pytest
import torch

from qlora.kernels.float8 import LARGEST, Float8Weight, Rows, product, rows_of, takes
from qlora.kernels.lora_linears import FrozenLinear, lora_linears

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


def normal(*shape: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def exact(rows: Rows) -> torch.Tensor:
    return rows.values_RC.double() * rows.scale_R1.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (33, 2047), (5, 2048), (3, 14336)])
def test_rows_keep_four_significant_bits(shape, device):
    x = normal(*shape, device=device) * torch.logspace(-6, 6, shape[0], device=device, dtype=torch.bfloat16)[:, None]
    found, exactly = exact(rows_of(x)), x.double()
    largest = exactly.abs().amax(1, keepdim=True)
    torch.testing.assert_close(found.abs().amax(1, keepdim=True), largest, rtol=1e-6, atol=0)
    # Half a step, of numbers of four bits and of those below the smallest normal one.
    assert ((found - exactly).abs() <= torch.maximum(exactly.abs() / 16, largest / LARGEST * 2.0**-10) * 1.001).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_zeros_and_turned_around(device):
    x = normal(32, 48, device=device)
    x[3] = 0
    assert (exact(rows_of(x))[3] == 0).all()
    assert torch.equal(exact(rows_of(x.T)), exact(rows_of(x.T.contiguous())))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernel_gives_the_bits_of_its_twin():
    x = normal(300, 2064) * 3
    on_gpu, on_cpu = rows_of(x.cuda()), rows_of(x)
    assert torch.equal(on_gpu.scale_R1.cpu(), on_cpu.scale_R1)
    assert torch.equal(on_gpu.values_RC.cpu().view(torch.uint8), on_cpu.values_RC.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fast", [False, True])
def test_products_are_those_of_the_rounded_factors(fast, device):
    x, weight = rows_of(normal(48, 256, device=device)), rows_of(normal(80, 256, device=device, seed=1))
    expected = exact(x) @ exact(weight).T
    found = product(x, weight, fast=fast)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < (0.003 if device == "cpu" or not fast else 0.01) * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_in_8_bits(bias, device):
    """y and dx within the rounding of both factors, gradients of adapters to the bit, kept weights to the bit."""
    tokens, inputs, outputs, rank = 64, 128, (96, 48), 8
    x = normal(tokens, inputs, device=device).requires_grad_()
    weights = [normal(n, inputs, device=device, seed=n) / inputs**0.5 for n in outputs]
    biases = [normal(n, device=device, seed=3) if bias else None for n in outputs]
    adapters = [(normal(rank, inputs, device=device, seed=4), normal(n, rank, device=device, seed=5)) for n in outputs]
    matrices = [matrix.requires_grad_() for pair in adapters for matrix in pair]
    kept = [Float8Weight.of(weight) for weight in weights]
    assert kept[0].shape == weights[0].shape

    def run(frozen, float8):
        linears = [FrozenLinear(*each, 0.5, float8) for each in zip(frozen, biases, strict=True)]
        found = lora_linears(x, linears, adapters)
        return found, torch.autograd.grad(found, [x, *matrices], [normal(*y.shape, device=device) for y in found])

    (plain, (grad_x, *of_adapters)), (eight, (grad_x_8, *same)) = run(weights, False), run(weights, True)
    for found, expected in zip((*eight, grad_x_8), (*plain, grad_x), strict=True):
        error = (found - expected).float().norm() / expected.float().norm()
        assert 1e-4 < error < 0.05
    assert all(map(torch.equal, same, of_adapters))
    again, others = run(kept, True)
    assert all(map(torch.equal, again, eight)) and all(map(torch.equal, others, (grad_x_8, *same)))


def test_what_the_matrix_units_do_not_take():
    assert takes(48, 64) and not takes(50, 64) and not takes(48, 72)
