"""The base weight as training saw it: quantized to 4 bits again, proven equal, dequantized a block of rows at a time.

Training multiplies with dtype(absmax[block] · code) rounded to the compute dtype (bitsandbytes `dequantize_4bit`); the
same values come out here, in fp32. Quantizing by rows gives the codes of the whole tensor because a block of rows
holds whole quantization blocks.

Shape suffixes: N output features, K input features, n a block of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)

from qlora.models.provenance import (
    ModuleCodes,
    QuantizationSettings,
    codes_fingerprint,
    decompressed_absmax,
    one_block_per_row,
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
