"""Rounding of merged weights to 16 bits that keeps the update.

A dequantized weight is a number of 16 bits already. An update of less than half a step of them is gone when the sum is
rounded to nearest, at every single weight: of a short training at a low rate that is a third or more of the update,
always the same part of it. Stochastic rounding goes up with the probability of the fraction that is cut off,

    round(x) = ⌊x⌋ + ulp with probability (x − ⌊x⌋) / ulp, else ⌊x⌋,

so that the expectation of the rounded weight is the exact one (Croci et al. 2022, doi:10.1098/rsos.211631, §2) and what
thousands of weights add up to in a product keeps the whole update, with noise of the size that 16 bits have anyway. A
weight that the update does not change stays what it is.
"""

from __future__ import annotations

import hashlib

import torch

# Bits of an fp32 that the dtype has no room for, where it is not subnormal.
_CUT_OFF = {torch.bfloat16: 16, torch.float16: 13}


def stochastic(x: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    """fp32 x in `dtype`, rounded stochastically: by the same draw for the same key on the same kind of device.

    Subnormal numbers of float16, below 6.1e-5, are rounded once more, to nearest; float32 is x.
    """
    if dtype not in _CUT_OFF:
        return x.to(dtype)
    step = 1 << _CUT_OFF[dtype]
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    generator = torch.Generator(x.device).manual_seed(seed)
    noise = torch.randint(0, step, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    # Sign and magnitude: adding to the bits of a negative number makes it more negative.
    bits = noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-step)
    return bits.view(torch.float32).to(dtype)
