"""Stochastic rounding: to a neighbour, right on average, and only where something is cut off."""

import pytest
import torch

from qlora.merging.rounding import stochastic

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_the_dtype_has_stay(dtype, device):
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x[0, :5] = torch.tensor([0.0, -0.0, 1.0, -2.0, 0.5], dtype=dtype)
    assert torch.equal(stochastic(x.float(), dtype, "w"), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1.0 + 0.3 * 2**-10, -(1.0 + 0.9 * 2**-10), 0.0371, -3e-3, 1 - 2**-13])
def test_the_mean_is_the_number(number, dtype, device):
    x = torch.full((200, 1000), number, device=device)
    found = stochastic(x, dtype, "w")
    neighbours = found.unique().double()
    assert len(neighbours) <= 2 and neighbours.min() <= x[0, 0].double() <= neighbours.max()
    step = (neighbours.max() - neighbours.min()).item()
    # Four standard errors of a draw between two numbers.
    assert abs(found.double().mean().item() - x[0, 0].item()) <= 4 * 0.5 * step / x.numel() ** 0.5 + 1e-12


@pytest.mark.parametrize("device", DEVICES)
def test_one_key_one_draw(device):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    first, again, other = (stochastic(x, torch.bfloat16, key) for key in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert stochastic(x, torch.float32, "a") is x


def test_what_is_not_a_number_is_not_hidden():
    x = torch.tensor([float("inf"), -float("inf"), float("nan")])
    found = stochastic(x.repeat(1000, 1), torch.bfloat16, "w")
    assert torch.equal(found[:, :2].float(), x[:2].repeat(1000, 1)) and found[:, 2].isnan().all()
