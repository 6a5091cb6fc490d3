"""Grouped LoRA linears against plain autograd in float64: values and all gradients."""

import pytest
import torch
from bitsandbytes.nn import Params4bit

from qlora.kernels.four_bit import FourBitWeight, dequantize
from qlora.kernels.lora_linears import FrozenLinear, Source, lora_linears

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CASES = [
    pytest.param("cpu", torch.float64, 1e-12),
    pytest.param("cpu", torch.float32, 1e-5),
    pytest.param("cuda", torch.float32, 1e-5, marks=ON_GPU),
    pytest.param("cuda", torch.bfloat16, 2e-2, marks=ON_GPU),
]
GROUPS = {"one": ((48, 8, 2.0),), "three": ((64, 8, 2.0), (32, 4, 0.5), (32, 16, 1.0))}
"""Outputs, rank and scaling of each linear."""
INPUTS, TOKENS = 64, 37


def problem(group, device, dtype, quantized, bias):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

    linears, adapters = [], []
    for outputs, rank, scaling in GROUPS[group]:
        weight = normal(outputs, INPUTS, std=0.1)
        if quantized:
            parameter = Params4bit(weight.to(torch.bfloat16), requires_grad=False, quant_type="nf4").to(device)
            weight = FourBitWeight.of(parameter)
        else:
            weight = weight.to(device, dtype)
        linears.append(FrozenLinear(weight, normal(outputs).to(device, dtype) if bias else None, scaling))
        adapters.append(tuple(normal(*shape, std=0.1).to(device) for shape in ((rank, INPUTS), (outputs, rank))))
    x = normal(TOKENS, INPUTS).to(device, dtype)
    upstream = [normal(TOKENS, outputs).to(device, dtype) for outputs, _, _ in GROUPS[group]]
    return x, linears, adapters, upstream


def reference(x, linears, adapters, upstream):
    """(outputs, gradients of x and of every adapter), by autograd in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, *(m for pair in adapters for m in pair))]
    x, matrices = leaves[0], leaves[1:]
    outputs = []
    for linear, a, b in zip(linears, matrices[::2], matrices[1::2], strict=True):
        dense = linear.weight if isinstance(linear.weight, torch.Tensor) else dequantize(linear.weight, x.dtype)
        y = x @ dense.double().T + linear.scaling * (x @ a.T) @ b.T
        outputs.append(y if linear.bias_N is None else y + linear.bias_N.double())
    torch.autograd.backward(outputs, [grad.double() for grad in upstream])
    return outputs, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_values_and_gradients_are_those_of_float64(device, dtype, tolerance, bias, quantized, group):
    x, linears, adapters, upstream = problem(group, device, dtype, quantized, bias)
    expected, expected_grads = reference(x, linears, adapters, upstream)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.requires_grad_(), *(m.to(precise).requires_grad_() for pair in adapters for m in pair)]
    outputs = lora_linears(leaves[0], linears, list(zip(leaves[1::2], leaves[2::2], strict=True)))
    torch.autograd.backward(outputs, upstream)
    for found, wanted in zip((*outputs, *(leaf.grad for leaf in leaves)), (*expected, *expected_grads), strict=True):
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)


def test_an_input_without_gradient_costs_none():
    x, linears, adapters, upstream = problem("three", "cpu", torch.float32, False, False)
    adapters = [tuple(matrix.float().requires_grad_() for matrix in pair) for pair in adapters]
    torch.autograd.backward(lora_linears(x, linears, adapters), upstream)
    assert x.grad is None and all(matrix.grad is not None for pair in adapters for matrix in pair)


def test_beside_the_input_only_ranks_are_kept():
    x, linears, adapters, _ = problem("three", "cpu", torch.float32, True, True)
    leaves = [x.requires_grad_(), *(matrix.float().requires_grad_() for pair in adapters for matrix in pair)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        lora_linears(leaves[0], linears, list(zip(leaves[1::2], leaves[2::2], strict=True)))
    assert [t.data_ptr() for t in kept[1:]] == [leaves[0].data_ptr()]
    assert [tuple(t.shape) for t in kept[:1]] == [(TOKENS, sum(rank for _, rank, _ in GROUPS["three"]))]


@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_in_place_of_an_input_what_it_is_a_norm_of(device, dtype, tolerance, adapter_dtype):
    """The gradients of adapters are those of float64, and no tensor of the input's size is kept beside its source."""
    origin, linears, adapters, upstream = problem("three", device, dtype, False, False)
    gain = torch.linspace(0.5, 2, origin.shape[1], device=device, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    share = 1 / origin.to(wide).square().mean(-1).sqrt()
    x = (origin.to(wide) * share[:, None] * gain.to(wide)).to(dtype)
    _, expected_grads = reference(x, linears, adapters, upstream)
    precise = torch.float64 if dtype == torch.float64 else adapter_dtype
    if precise == torch.bfloat16:
        tolerance = max(tolerance, 1e-2)
    leaves = [matrix.to(precise).requires_grad_() for pair in adapters for matrix in pair]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
        outputs = lora_linears(x.requires_grad_(), linears, pairs, Source(origin, share, gain))
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [origin.data_ptr()]
    torch.autograd.backward(outputs, upstream)
    for leaf, wanted in zip(leaves, expected_grads[1:], strict=True):
        assert leaf.grad.dtype == precise and (leaf.grad.double() - wanted).norm() <= tolerance * wanted.norm()
