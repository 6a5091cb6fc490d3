"""Gated feed-forward blocks with adapters against plain autograd in float64: values, gradients, and what is kept."""

import pytest
import torch
from torch.nn.functional import gelu, silu

from qlora.kernels.gated_mlp import gated, gated_gradients, gated_mlp
from qlora.kernels.lora_linears import FrozenLinear

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CASES = [
    pytest.param("cpu", torch.float64, 1e-12),
    pytest.param("cpu", torch.float32, 1e-5),
    pytest.param("cuda", torch.float32, 1e-5, marks=ON_GPU),
    pytest.param("cuda", torch.bfloat16, 2e-2, marks=ON_GPU),
]
ACTIVATIONS = {"silu": silu, "gelu_tanh": lambda x: gelu(x, approximate="tanh")}
TOKENS, INPUTS, WIDTH, RANK = 29, 48, 80, 4
SIZES = {
    "few tokens": (TOKENS, (RANK,) * 3),
    "many": (150, (8, 16, 3)),
    "the largest rank in registers": (150, (32, 5, 32)),
    "a rank too large": (TOKENS, (RANK, 100, RANK)),
}
"""Tokens, and ranks of gate, up and down."""


def problem(device, dtype, tokens=TOKENS, ranks=(RANK,) * 3):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device)

    shapes = ((WIDTH, INPUTS), (WIDTH, INPUTS), (INPUTS, WIDTH))
    linears = tuple(FrozenLinear(normal(*shape, std=0.2).to(dtype), None, 0.5 + n) for n, shape in enumerate(shapes))
    matrices = [
        normal(*shape, std=0.2)
        for (outputs, inputs), rank in zip(shapes, ranks, strict=True)
        for shape in ((rank, inputs), (outputs, rank))
    ]
    return normal(tokens, INPUTS).to(dtype), linears, matrices, normal(tokens, INPUTS).to(dtype)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("adds", [False, True])
def test_values_and_gradients_are_those_of_float64(device, dtype, tolerance, activation, size, adds):
    x, linears, matrices, upstream = problem(device, dtype, *SIZES[size])
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *matrices)]
    residual = upstream.flip(0).requires_grad_() if adds else None

    def linear(number, y):
        a, b = exact[1 + 2 * number], exact[2 + 2 * number]
        return y @ linears[number].weight.double().T + linears[number].scaling * (y @ a.T) @ b.T

    expected = linear(2, ACTIVATIONS[activation](linear(0, exact[0])) * linear(1, exact[0]))
    if residual is not None:
        expected = expected + residual.detach().double()
    expected.backward(upstream.double())

    own = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.requires_grad_(), *(matrix.to(own).requires_grad_() for matrix in matrices)]
    pairs = list(zip(leaves[1::2], leaves[2::2], strict=True))
    found = gated_mlp(leaves[0], linears, pairs, activation, residual_TK=residual)
    found.backward(upstream)
    assert residual is None or torch.equal(residual.grad, upstream)
    assert (found.double() - expected).norm() <= tolerance * expected.norm()
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad.double() - wanted.grad).norm() <= tolerance * wanted.grad.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 333), (64, 2048)])
def test_the_gate_of_any_size_is_that_of_float64(device, activation, shape):
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (4 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    leaves = gate.requires_grad_(), up.requires_grad_()
    expected = ACTIVATIONS[activation](gate) * up
    expected.backward(grad)
    g, u, d = (tensor.detach().float().to(device) for tensor in (gate, up, grad))
    found = gated(g, u, activation)
    torch.testing.assert_close(found.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for got, leaf in zip(gated_gradients(g, u, d, activation), leaves, strict=True):
        torch.testing.assert_close(got.cpu().double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_the_product_of_gate_and_up_is_not_kept():
    x, linears, matrices, _ = problem("cpu", torch.float32)
    leaves = [x.requires_grad_(), *(matrix.float().requires_grad_() for matrix in matrices)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)), lambda t: t):
        gated_mlp(leaves[0], linears, list(zip(leaves[1::2], leaves[2::2], strict=True)), "silu")
    assert kept.count((TOKENS, WIDTH)) == 2
    assert sorted(set(kept)) == [(TOKENS, RANK), (TOKENS, 2 * RANK), (TOKENS, INPUTS), (TOKENS, WIDTH)]


def test_a_second_backward_is_refused():
    x, linears, matrices, upstream = problem("cpu", torch.float32)
    leaves = [matrix.float().requires_grad_() for matrix in matrices]
    output = gated_mlp(x, linears, list(zip(leaves[::2], leaves[1::2], strict=True)), "silu")
    output.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backwards once"):
        output.backward(upstream)
