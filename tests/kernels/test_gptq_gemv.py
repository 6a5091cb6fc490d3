"""Products of few rows with 4-bit weights against plain PyTorch: on a GPU, or on a CPU in Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/kernels/test_gptq_gemv.py

runs the kernels where there is no GPU but a Triton package.
"""

import importlib.util
import os

import pytest
import torch

from qlora.kernels import gptq_gemv
from qlora.kernels.gptq_gemv import FEW_ROWS, ONE_ROW, Arrivals, Tiles, few_rows_product, reference, takes
from qlora.kernels.packed_linear import PackedWeight, dequantize
from qlora.models.gptq_format import pack_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
SHAPES = {
    "whole tiles": (256, 256, 128),
    "groups of 32": (320, 72, 32),
    "one group": (384, 200, 384),
    "ragged": (576, 24, 64),
}
"""Inputs, outputs and group size."""
# Against weights and sums in fp32: the product rounded once, or weights rounded too.
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def packed(inputs, outputs, group_size, device="cpu", bits=4, shuffled=False) -> PackedWeight:
    generator = torch.Generator().manual_seed(inputs + outputs)
    codes_KN = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros_GN = torch.randint(0, 2**bits, (inputs // group_size, outputs), generator=generator).to(torch.uint8)
    scales_GN = (torch.rand(inputs // group_size, outputs, generator=generator) * 0.1).to(torch.float16)
    rows_K = torch.randperm(inputs, generator=generator).to(torch.int32).to(device) if shuffled else None
    return PackedWeight(pack_rows(codes_KN, bits).to(device), zeros_GN.to(device), scales_GN.to(device), bits, rows_K)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_products_are_those_of_fp32(device, dtype, shape, rows):
    if device == "cpu" and dtype == torch.bfloat16 and rows > 1:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    inputs, outputs, group_size = SHAPES[shape]
    weight = packed(inputs, outputs, group_size, device, shuffled=shape == "groups of 32")
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
    bias = torch.randn(outputs, generator=generator).to(device, dtype) if rows != 3 else None
    arrivals = Arrivals(outputs, x.device)
    found = few_rows_product(x, weight, bias, arrivals)
    expected = x.double() @ dequantize(weight, None, torch.float32).double() + (0 if bias is None else bias.double())
    assert found.dtype == dtype and found.shape == (rows, outputs)
    assert (found.double() - expected).norm() <= TOLERANCES[dtype] * expected.norm()
    assert not arrivals.counters.any()  # ready for the next
    assert torch.equal(found, few_rows_product(x, weight, bias, arrivals))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_processor", [1, 100])
def test_however_inputs_are_split(device, per_processor):
    weight = packed(1024, 128, 128, device)
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    for rows, tiles in ((1, ONE_ROW), (2, FEW_ROWS)):
        cut = Tiles(tiles.words, tiles.columns, tiles.warps, per_processor)
        found = few_rows_product(x[:rows], weight, None, Arrivals(128, x.device), cut)
        expected = reference(x[:rows], weight, None)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * expected.std().item())


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_are_not_taken(bits):
    assert not takes(packed(96, 32, 32, bits=bits))


def test_the_plain_product_is_that_of_the_weight():
    weight = packed(64, 16, 32)
    x, bias = torch.randn(2, 64), torch.randn(16)
    torch.testing.assert_close(reference(x, weight, bias), x @ dequantize(weight, None, torch.float32) + bias)
    assert takes(weight) == (gptq_gemv.triton is not None)
