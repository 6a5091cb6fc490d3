"""The norm after an addition against plain autograd in float64, and modules that are RMS norms or are not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qlora.kernels.norms import SOURCE, RmsNorm, fuse_rms_norms, recognized

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CASES = [
    pytest.param("cpu", torch.float64, 1e-12),
    pytest.param("cpu", torch.float32, 1e-5),
    pytest.param("cuda", torch.float32, 1e-5, marks=ON_GPU),
    pytest.param("cuda", torch.bfloat16, 1e-2, marks=ON_GPU),
]
EPSILON = 1e-5


class TinyRMSNorm(nn.Module):
    def __init__(self, width, shift=0):
        super().__init__()
        self.weight, self.variance_epsilon, self.shift = nn.Parameter(torch.rand(width) + 0.5), EPSILON, shift

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON) * (self.shift + self.weight)).to(x)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 96), (7, 4096), (3, 11, 333)])
@pytest.mark.parametrize("used", ["both", "sum", "norm"])
def test_values_and_gradients_are_those_of_float64(device, dtype, tolerance, adds, shape, used):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, delta, upstream = (
        normal(*shape).requires_grad_(),
        normal(*shape).requires_grad_(),
        [normal(*shape) for _ in "xy"],
    )
    gain = normal(shape[-1])
    exact = [each.detach().double().requires_grad_() for each in (x, delta)]
    total = exact[0] + exact[1] if adds else exact[0]
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPSILON) * gain.double()
    found = RmsNorm(EPSILON, 0).after_adding(SimpleNamespace(weight=gain), x, delta if adds else None)
    wanted = {"both": (0, 1), "sum": (0,), "norm": (1,)}[used]
    torch.autograd.backward([(total, normed)[i] for i in wanted], [upstream[i].double() for i in wanted])
    torch.autograd.backward([found[i] for i in wanted], [upstream[i] for i in wanted])
    for got, expected in zip(found, (total, normed), strict=True):
        assert got.dtype == dtype and (got.double() - expected).norm() <= tolerance * expected.norm()
    for leaf, expected in zip((x, delta) if adds else (x,), exact, strict=False):
        assert (leaf.grad.double() - expected.grad).norm() <= tolerance * expected.grad.norm() + 1e-6


@pytest.mark.parametrize("shift", [0, 1])
def test_a_norm_is_recognized_by_what_it_computes(shift):
    norm = TinyRMSNorm(24, shift)
    assert recognized(norm, "cpu") == RmsNorm(EPSILON, shift)
    x = torch.randn(3, 24)
    expected = norm(x)
    assert fuse_rms_norms(norm, device="cpu", note_source=True) == 1
    source = getattr(norm(x), SOURCE)
    torch.testing.assert_close(norm(x), expected)
    assert source.tensor is x
    torch.testing.assert_close(x * source.share[..., None] * source.gain_K, expected)
    with torch.no_grad():
        assert not hasattr(norm(x), SOURCE)


def test_what_computes_something_else_is_none():
    assert recognized(TinyRMSNorm(24, shift=2), "cpu") is None
    assert recognized(TinyRMSNorm(24), "cuda") is None
    assert recognized(nn.LayerNorm(24), "cpu") is None
