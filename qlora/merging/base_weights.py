"""The base weight as training saw it: quantized again, proven equal, dequantized a block of rows at a time.

4 bits: training multiplies with dtype(absmax[block] · code) rounded to the compute dtype (bitsandbytes
`dequantize_4bit`); the same values come out here, in fp32. Quantizing by rows gives the codes of the whole tensor
because a block of rows holds whole quantization blocks.

8 bits (LLM.int8): codes are round(127 · fp16(W) / max|row|), and W becomes dtype(code · max|row| / 127). On a CPU that
is what bitsandbytes trains with. On a GPU it is the W of the backward; the forward multiplies codes with inputs that it
quantizes to 8 bits too, which no weight can carry: the merged model is without that error.

A checkpoint's own codes (GPTQ, AWQ): the base here is that checkpoint dequantized to bf16, the very weight of training.

Shape suffixes: N output features, K input features, n a block of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    get_4bit_type,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
)

from qlora.models.frozen import eight_bit_weight
from qlora.models.provenance import (
    ModuleCodes,
    QuantizationSettings,
    codes_fingerprint,
    decompressed_absmax,
    one_block_per_row,
    weight_fingerprint,
)

ROW_BLOCK_ELEMENTS = 4 * 2**20
"""Weights held in fp32 at a time; a handful of temporaries of this size are alive at the peak."""
NESTED_BLOCKSIZE = 256
"""Block scales per second-level scale in bitsandbytes' double quantization."""


def row_blocks(shape: tuple[int, ...], blocksize: int = 64) -> Iterator[slice]:
    """Slices over the rows of a weight [N, K], each a whole number of quantization blocks but the last."""
    rows, columns = shape
    # A multiple of `blocksize` rows is a whole number of blocks for any K.
    step = max(blocksize, ROW_BLOCK_ELEMENTS // columns // blocksize * blocksize)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class TrainedOn(Protocol):
    """A weight [N, K] that training multiplied with."""

    fingerprint: ModuleCodes

    def dequantize(self, rows: slice) -> torch.Tensor:
        """Rows of the weight [n, K] in fp32, rounded to the compute dtype as in training; `rows` from `row_blocks`."""
        ...


def trained_on(weight: torch.Tensor, settings: QuantizationSettings, load_dtype: torch.dtype, device: str) -> TrainedOn:
    """What training made of a weight of the base, which it loaded in `load_dtype`."""
    if settings.quant_type == "int8":
        return EightBitWeight(weight, settings, load_dtype, device)
    if settings.quant_type == "checkpoint":
        return PackedCodes(weight, device)
    return QuantizedWeight(weight, settings, load_dtype, device)


class PackedCodes:
    """A weight that training dequantized from a checkpoint's own codes, as the dequantized checkpoint has it."""

    def __init__(self, weight: torch.Tensor, device: str) -> None:
        self._weight, self._device = weight, device
        self.fingerprint = weight_fingerprint(weight)

    def dequantize(self, rows: slice) -> torch.Tensor:
        """Rows [n, K] in fp32."""
        return self._weight[rows].to(self._device).float()


class EightBitWeight:
    """A weight [N, K] as bitsandbytes quantizes it to int8 on loading, from fp16: codes, and a scale for each row."""

    def __init__(
        self, weight: torch.Tensor, settings: QuantizationSettings, load_dtype: torch.dtype, device: str
    ) -> None:
        self._dtype = settings.compute_dtype
        sha256 = hashlib.sha256()
        codes, scales = [], []
        for rows in row_blocks(tuple(weight.shape)):
            block = weight[rows].to(device).to(load_dtype).to(torch.float16).contiguous()
            found_nK, found_n, _ = int8_vectorwise_quant(block)
            sha256.update(found_nK.cpu().numpy().data)
            codes.append(found_nK)
            scales.append(found_n)
        self._codes_NK, self._scales_N = torch.cat(codes), torch.cat(scales)
        self.fingerprint = codes_fingerprint(tuple(weight.shape), sha256.hexdigest(), self._scales_N)

    def dequantize(self, rows: slice) -> torch.Tensor:
        """Rows of the weight [n, K] in fp32, rounded to the compute dtype."""
        return eight_bit_weight(self._codes_NK[rows], self._scales_N[rows], self._dtype).float()


class QuantizedWeight:
    """A weight [N, K] as bitsandbytes quantizes it on loading: 4-bit codes and one scale per block.

    `weight` is quantized from `load_dtype`, on `device`.
    """

    def __init__(
        self, weight: torch.Tensor, settings: QuantizationSettings, load_dtype: torch.dtype, device: str
    ) -> None:
        self.shape = tuple(weight.shape)
        self._settings = settings
        sha256 = hashlib.sha256()
        codes, absmax = [], []
        for rows in row_blocks(self.shape, settings.blocksize):
            block = weight[rows].to(device).to(load_dtype)
            packed, state = quantize_4bit(block, blocksize=settings.blocksize, quant_type=settings.quant_type)
            sha256.update(packed.cpu().numpy().data)
            codes.append(packed)
            absmax.append(state.absmax)
        self._codes = torch.cat(codes)
        self._absmax = torch.cat(absmax)
        if settings.double_quant:
            self._absmax = _double_quantized(self._absmax)
        self.fingerprint: ModuleCodes = codes_fingerprint(self.shape, sha256.hexdigest(), self._absmax)

    def dequantize(self, rows: slice) -> torch.Tensor:
        """Rows of the weight [n, K] in fp32, rounded to the compute dtype as in training; `rows` from `row_blocks`."""
        settings = self._settings
        start, stop = rows.start * self.shape[1], rows.stop * self.shape[1]
        state = QuantState(
            absmax=self._absmax[start // settings.blocksize : -(-stop // settings.blocksize)],
            shape=one_block_per_row(stop - start, settings.blocksize),
            dtype=settings.compute_dtype,
            blocksize=settings.blocksize,
            code=get_4bit_type(settings.quant_type, device=self._codes.device),
            quant_type=settings.quant_type,
        )
        flat = dequantize_4bit(self._codes[start // 2 : -(-stop // 2)], state)
        return flat.float().reshape(rows.stop - rows.start, self.shape[1])


def _double_quantized(absmax: torch.Tensor) -> torch.Tensor:
    """Block scales after the round trip through 8 bits that `quantize_4bit(compress_statistics=True)` sends them."""
    offset = absmax.mean()
    codes, state2 = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return decompressed_absmax(QuantState(absmax=codes, offset=offset, state2=state2))
