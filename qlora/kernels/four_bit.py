"""bitsandbytes' 4-bit weights back to 16 bits in one launch, double quantization included, bit for bit as it does it.

A weight is stored flat, two codes a byte, the first in the high half; runs of `block_size` weights share a scale
(absmax). With double quantization scales are 8-bit codes themselves, of which runs of 256 share one:

    W[i] = code16[q[i]] · a[i // block_size],   a[b] = code256[c[b]] · a2[b // 256] + offset

all in fp32, each operation rounded, the result rounded once to the dtype asked for (Dettmers et al. 2023,
arXiv:2305.14314, §3). bitsandbytes takes three launches and three passes over memory for it.

Shapes: N outputs, K inputs, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

if TYPE_CHECKING:
    from bitsandbytes.nn import Params4bit

NESTED_BLOCK = 256
GATHER = "qlora_gather"
"""Attribute of a weight that several processes share: what to call for its codes to be there."""
# Codes that are read at a time, a word of 32 bits; words of a program, a thread each.
WORD = 8
TILE = 256


@dataclass(frozen=True)
class FourBitWeight:
    """A quantized weight [N, K]; all tensors on one device."""

    packed: torch.Tensor
    """uint8 [N·K / 2]."""
    code: torch.Tensor
    """fp32 [16]: what each code stands for."""
    absmax_B: torch.Tensor
    """fp32, or uint8 with double quantization."""
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """(a2 fp32 [B / 256 rounded up], code fp32 [256], offset fp32, a scalar)."""
    shape: tuple[int, int]
    block_size: int

    @classmethod
    def of(cls, parameter: Params4bit) -> FourBitWeight:
        """The weight of a `Linear4bit`, sharing its memory."""
        be_there(parameter)
        state = parameter.quant_state
        nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else None
        return cls(parameter.data.view(-1), state.code, state.absmax, nested, tuple(state.shape), state.blocksize)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def device(self) -> torch.device:
        return self.packed.device


def be_there(parameter: Params4bit) -> None:
    """Have the codes of a weight, of which processes may share one copy: valid until another layer's are asked for."""
    if gather := getattr(parameter, GATHER, None):
        gather()


def dequantize(weight: FourBitWeight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """W [N, K] in `dtype`; into `out`, a contiguous tensor of as many elements, where there is one."""
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    if weight.packed.is_cuda and triton is not None and weight.numel % WORD == 0:
        _with_triton(weight, out)
    else:
        out.view(-1).copy_(_with_torch(weight))
    return out.view(weight.shape)


def _with_torch(weight: FourBitWeight) -> torch.Tensor:
    # Both codes of a byte by one look into a table.
    of_byte = torch.stack((weight.code.repeat_interleave(16), weight.code.repeat(16)), dim=1)
    found = of_byte.index_select(0, weight.packed.int()).flatten()[: weight.numel]
    absmax_B = weight.absmax_B
    if weight.nested is not None:
        absmax2, code, offset = weight.nested
        outer = torch.arange(len(absmax_B), device=absmax_B.device) // NESTED_BLOCK
        absmax_B = code[absmax_B.long()] * absmax2[outer] + offset
    blocks = weight.numel // weight.block_size
    whole, rest = found.split((blocks * weight.block_size, weight.numel % weight.block_size))
    whole.view(blocks, -1).mul_(absmax_B[:blocks, None])
    rest.mul_(absmax_B[-1])
    return found


def _with_triton(weight: FourBitWeight, out: torch.Tensor) -> None:
    absmax2, code, offset = weight.nested if weight.nested is not None else (weight.absmax_B,) * 3
    words = weight.numel // WORD
    _dequantize_kernel[(triton.cdiv(words, TILE),)](
        weight.packed.view(torch.int32),
        weight.code,
        weight.absmax_B,
        absmax2,
        code,
        offset,
        out,
        words,
        BLOCK_WORDS=weight.block_size // WORD,
        NESTED=weight.nested is not None,
        NESTED_BLOCK=NESTED_BLOCK,
        TILE=TILE,
        num_warps=TILE // 32,
        # A product and a sum that become one operation are rounded once: other bits than bitsandbytes'.
        enable_fp_fusion=False,
    )


if triton is not None:

    @triton.jit(do_not_specialize=["words"])
    def _dequantize_kernel(
        packed_ptr,
        code_ptr,
        absmax_ptr,
        absmax2_ptr,
        nested_code_ptr,
        offset_ptr,
        out_ptr,
        words,
        BLOCK_WORDS: tl.constexpr,
        NESTED: tl.constexpr,
        NESTED_BLOCK: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """One program: TILE words of eight codes; a thread has a word and writes 16 bytes in one piece."""
        start = tl.program_id(0).to(tl.int64) * TILE
        first_block = start // BLOCK_WORDS
        left = (words - start).to(tl.int32)
        at = tl.arange(0, TILE)
        word = tl.load(packed_ptr + start + at, mask=at < left, other=0)
        block = first_block + at // BLOCK_WORDS
        absmax = tl.load(absmax_ptr + block, mask=at < left, other=0)
        if NESTED:
            inner = tl.load(nested_code_ptr + absmax)
            outer = tl.load(absmax2_ptr + block // NESTED_BLOCK, mask=at < left, other=0.0)
            absmax = inner * outer + tl.load(offset_ptr)
        # Of each byte, the high half comes first.
        even = tl.interleave(
            tl.interleave(_weights(word, 4, code_ptr, absmax, out_ptr), _weights(word, 20, code_ptr, absmax, out_ptr)),
            tl.interleave(_weights(word, 12, code_ptr, absmax, out_ptr), _weights(word, 28, code_ptr, absmax, out_ptr)),
        )
        odd = tl.interleave(
            tl.interleave(_weights(word, 0, code_ptr, absmax, out_ptr), _weights(word, 16, code_ptr, absmax, out_ptr)),
            tl.interleave(_weights(word, 8, code_ptr, absmax, out_ptr), _weights(word, 24, code_ptr, absmax, out_ptr)),
        )
        to = tl.arange(0, TILE * 8)
        tl.store(out_ptr + start * 8 + to, tl.interleave(even, odd), mask=to < left * 8)

    @triton.jit
    def _weights(word, shift: tl.constexpr, code_ptr, absmax, out_ptr):
        """What the four bits from `shift` on stand for."""
        return (tl.load(code_ptr + ((word >> shift) & 15)) * absmax).to(out_ptr.dtype.element_ty)
