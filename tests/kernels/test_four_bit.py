"""4-bit weights back to 16 bits: the bits of bitsandbytes, for every kind of quantization and odd sizes."""

import copy

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Params4bit

from qlora.kernels.four_bit import FourBitWeight, dequantize

SHAPES = [(64, 64), (96, 160), (33, 128), (5, 7 * 64), (1024, 2048)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


def quantized(shape, device, kind="nf4", double=True, block_size=64) -> Params4bit:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * torch.rand(shape[0], 1)
    parameter = Params4bit(
        w.to(torch.bfloat16), requires_grad=False, quant_type=kind, compress_statistics=double, blocksize=block_size
    )
    return parameter.to(device)


def by_bitsandbytes(parameter: Params4bit, dtype=torch.bfloat16) -> torch.Tensor:
    """Blocks as rows: on CPUs with AVX-512, bitsandbytes 0.50 is wrong where a row ends inside a block."""
    state = copy.copy(parameter.quant_state)
    shape, state.dtype = state.shape, dtype
    state.shape = torch.Size((shape.numel() // state.blocksize, state.blocksize))
    return bnb.dequantize_4bit(parameter.data, state).reshape(shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_bitsandbytes(device, dtype, double, kind, shape):
    parameter = quantized(shape, device, kind, double)
    found = dequantize(FourBitWeight.of(parameter), dtype)
    assert found.shape == shape and torch.equal(found, by_bitsandbytes(parameter, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [32, 128, 256])
def test_other_block_sizes(device, block_size):
    parameter = quantized((64, 512), device, block_size=block_size)
    found = dequantize(FourBitWeight.of(parameter), torch.bfloat16)
    assert torch.equal(found, by_bitsandbytes(parameter))


@pytest.mark.parametrize("device", DEVICES)
def test_a_buffer_is_filled_in_place(device):
    parameter = quantized((96, 160), device)
    buffer = torch.full((96 * 160,), torch.nan, dtype=torch.bfloat16, device=device)
    found = dequantize(FourBitWeight.of(parameter), torch.bfloat16, buffer)
    assert found.data_ptr() == buffer.data_ptr() and found.shape == (96, 160)
    assert torch.equal(found, by_bitsandbytes(parameter))
