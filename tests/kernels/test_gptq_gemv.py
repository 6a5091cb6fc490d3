"""Products of few rows with 4-bit weights against plain PyTorch: on a GPU, or on a CPU in Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/kernels/test_gptq_gemv.py

runs the kernels where there is no GPU but a Triton package.
"""

import importlib.util
import os
from dataclasses import replace

import pytest
import torch

from qlora.kernels import gptq_gemv
from qlora.kernels.gptq_gemv import (
    MOST_ROWS,
    Arrivals,
    Tiles,
    dequantized,
    few_rows_product,
    gated_halves,
    reference,
    striped,
    takes,
)
from qlora.kernels.packed_linear import PackedWeight, dequantize
from qlora.models.gptq_format import pack_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
SHAPES = {
    "whole tiles": (256, 256, 128),
    "groups of two blocks": (512, 136, 256),
    "groups of 64": (576, 24, 64),
    "groups of 32": (320, 72, 32),
    "groups of 16": (128, 40, 16),
    "one group": (384, 200, 384),
}
"""Inputs, outputs and group size."""
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Relative, of a product that is rounded once."""


def packed(inputs, outputs, group_size, device="cpu", bits=4, shuffled=False) -> PackedWeight:
    generator = torch.Generator().manual_seed(inputs + outputs)
    codes_KN = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    # A checkpoint of the first format stores zero points less one, so that they go up to 16.
    zeros_GN = torch.randint(0, 2**bits + 1, (inputs // group_size, outputs), generator=generator).to(torch.uint8)
    scales_GN = (torch.rand(inputs // group_size, outputs, generator=generator) * 0.1).to(torch.float16)
    rows_K = torch.randperm(inputs, generator=generator).to(torch.int32).to(device) if shuffled else None
    return PackedWeight(pack_rows(codes_KN, bits).to(device), zeros_GN.to(device), scales_GN.to(device), bits, rows_K)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 17, MOST_ROWS])
def test_products_are_those_of_float64(device, dtype, shape, rows):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    inputs, outputs, group_size = SHAPES[shape]
    weight = packed(inputs, outputs, group_size, device, shuffled=shape == "groups of 32")
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
    # Nothing, a bias, or a residual stream.
    added = {1: (outputs,), 17: (rows, outputs)}.get(rows)
    bias = None if added is None else torch.randn(*added, generator=generator).to(device, dtype)
    arrivals = Arrivals(outputs, x.device)
    found = few_rows_product(x, striped(weight), bias, arrivals)
    expected = x.double() @ dequantize(weight, None, torch.float32).double() + (0 if bias is None else bias.double())
    assert found.dtype == dtype and found.shape == (rows, outputs)
    assert (found.double() - expected).norm() <= TOLERANCES[dtype] * expected.norm()
    assert not arrivals.counters.any()  # ready for the next
    assert torch.equal(found, few_rows_product(x, striped(weight), bias, arrivals))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_processor", [1, 100])
@pytest.mark.parametrize("columns", [32, 128])
def test_however_inputs_are_split(device, per_processor, columns):
    weight = striped(packed(1024, 160, 128, device))
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    for rows in (1, 2):
        tiles = Tiles(columns, warps=4, stages=3, per_processor=per_processor)
        found = few_rows_product(x[:rows], weight, None, Arrivals(160, x.device), tiles)
        expected = reference(x[:rows], weight, None)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.std().item())


@pytest.mark.parametrize("device", ["cpu", DEVICES[1]])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_other_order_is_the_same_weight_to_the_bit(device, shape):
    weight = packed(*SHAPES[shape], device, shuffled=shape == "groups of 32")
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantized(striped(weight), dtype), dequantize(weight, None, dtype))


@pytest.mark.parametrize("device", ["cpu", DEVICES[1]])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(1, 2 * 700), (3, 2 * 8)])
def test_gates_are_those_of_float64(device, silu, shape):
    both = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    gate, up = both.double().chunk(2, dim=1)
    act = torch.nn.functional.silu(gate) if silu else torch.nn.functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(gated_halves(both, silu).double(), act * up, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_are_not_taken(bits):
    assert not takes(packed(96, 32, 32, bits=bits))


def test_groups_that_no_stripe_fits_are_not_taken():
    assert not takes(packed(192, 32, 48))
    assert not takes(packed(96, 32, 32))
    assert takes(packed(128, 32, 32)) == (gptq_gemv.triton is not None)


def test_scales_that_fp16_does_not_hold_are_not_taken():
    weight = packed(128, 32, 32)
    held = weight.scales_GN.to(torch.bfloat16)
    assert takes(replace(weight, scales_GN=held)) == (gptq_gemv.triton is not None)
    assert torch.equal(
        dequantized(striped(replace(weight, scales_GN=held)), torch.float32),
        dequantize(replace(weight, scales_GN=held), None, torch.float32),
    )
    assert not takes(replace(weight, scales_GN=held * 2**-20))


def test_the_plain_product_is_that_of_the_weight():
    weight = packed(128, 16, 32)
    x, bias = torch.randn(2, 128), torch.randn(16)
    expected = x @ dequantize(weight, None, torch.float32) + bias
    torch.testing.assert_close(reference(x, striped(weight), bias), expected)
