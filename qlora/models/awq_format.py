"""Reading AWQ checkpoints (GEMM layout): dequantizing what gptqmodel and AutoAWQ write, for the ladder.

A linear layer with K inputs and N outputs is stored in G groups of inputs as `qweight` int32 [K, N/8], `qzeros` int32
[G, N/8] and `scales` [G, N], and stands for W[n, k] = scales[k // g, n] · (q[k, n] − z[k // g, n]), g = K / G.

A word holds the 4-bit codes of 8 neighbouring outputs, lowest bits first in the order 0, 2, 4, 6, 1, 3, 5, 7: kernels
split words into even and odd halves (github.com/casper-hansen/AutoAWQ, `WQLinear_GEMM`).

Shapes: K inputs, N outputs, G groups, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qlora.errors import Problem, UserError
from qlora.models.gptq_format import find_config

BITS = 4
CODE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 neighbouring outputs each 4 bits of a word belong to, lowest bits first."""
TENSOR_NAMES = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class AWQTensors:
    """One packed linear layer, shapes and dtypes as in the module's docstring."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor


def unpack(words: torch.Tensor) -> torch.Tensor:
    """uint8 codes [R, N] of int32 words [R, N/8]."""
    codes = torch.empty(*words.shape, len(CODE_ORDER), dtype=torch.uint8, device=words.device)
    for position, output in enumerate(CODE_ORDER):
        codes[..., output] = (words >> (BITS * position)) & 0xF
    return codes.flatten(-2)


def dequantize(tensors: AWQTensors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [N, K] that packed tensors stand for: one fp32 product per element, then rounded to `dtype`."""
    codes_KN = unpack(tensors.qweight).to(torch.float32)
    group_size = codes_KN.shape[0] // tensors.scales.shape[0]
    codes_KN -= unpack(tensors.qzeros).to(torch.float32).repeat_interleave(group_size, 0)
    codes_KN *= tensors.scales.to(torch.float32).repeat_interleave(group_size, 0)
    return codes_KN.T.to(dtype).contiguous()


def check_readable(directory: Path) -> None:
    """Raise UserError when a directory's quantization_config announces another AWQ layout than the one read here."""
    path, config = find_config(directory)
    problems = []
    layout = str(config.get("version", config.get("checkpoint_format", "gemm"))).lower()
    if layout != "gemm":
        problems.append(Problem(f"AWQ layout {layout}; only gemm is read here", str(path)))
    if config.get("bits") != BITS:
        problems.append(Problem(f"AWQ with bits {config.get('bits')}; only {BITS} are read here", str(path)))
    if problems:
        raise UserError(problems)
