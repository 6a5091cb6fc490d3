"""PiSSA: the adapter begins as the principal singular parts of a weight, and the frozen base is what is left of it.

With W = Σ_i σ_i·u_i·v_iᵀ and a rank r (Meng et al. 2024, arXiv:2404.02948, §3; quantized as in §4, QPiSSA):

    s·B0·A0 = Σ_{i ≤ r} σ_i·u_i·v_iᵀ,    base = Q(W − s·B0·A0)

What is left has no large singular values, so quantization takes less from it, and training moves what matters most.
Whoever needs the base, training, ladder or merge, computes it again from W and the A0 and B0 that are kept beside the
adapter, and must come to the same bits, on whatever device. So the entries of A0 and of B0 are whole multiples of one
step each, of few enough bits that all products and sums of B0·A0 are exact in fp64, in any order; the multiplication
with s, the difference and the rounding to the dtype are one rounded operation each, which IEEE 754 defines.

Shapes: N outputs, K inputs, R rank, n a block of rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from qlora.artifacts import file_digest
from qlora.errors import UserError
from qlora.models.checkpoint import CheckpointReader

FILE = "beginning.safetensors"
"""In the adapter's directory, and beside the checkpoints that training resumes from."""
# Columns and rounds of the randomized decomposition (Halko et al. 2011, arXiv:0909.4061, §4.3), beyond the rank.
MORE_COLUMNS = 16
ROUNDS = 4
FP64_BITS, FP32_BITS = 53, 24
BLOCK_ELEMENTS = 4 * 2**20  # of a weight in fp64 at a time


@dataclass(frozen=True)
class PrincipalPart:
    """What an adapter of one layer began as: A0 [R, K] and B0 [N, R], on a grid (`on_grid`), and the scale s."""

    down_RK: torch.Tensor
    up_NR: torch.Tensor
    scaling: float

    def rest(self, weight_NK: torch.Tensor, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """W − s·B0·A0 [N, K] in `dtype`, on the device, bit for bit the same on any device and for any block of rows.

        weight_NK: the 16-bit weight as it is stored.
        """
        rest_NK = torch.empty(weight_NK.shape, dtype=dtype, device=device)
        step = max(1, BLOCK_ELEMENTS // weight_NK.shape[1])
        for start in range(0, len(weight_NK), step):
            rows = slice(start, start + step)
            # fp64 becomes 16 bits by way of fp32 in PyTorch, on every device.
            rest_NK[rows] = self.of_rows(rows).rest_of_block(weight_NK[rows], device).float().to(dtype)
        return rest_NK

    def of_rows(self, rows: slice) -> PrincipalPart:
        """That of some rows of the weight."""
        return PrincipalPart(self.down_RK, self.up_NR[rows], self.scaling)

    def rest_of_block(self, weight_nK: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """The same in fp64, of a block that is small enough."""
        return weight_nK.to(device, torch.float64) - self.part(device)

    def part(self, device: torch.device | str) -> torch.Tensor:
        """s·B0·A0 [N, K] in fp64."""
        up_NR, down_RK = self.up_NR.to(device, torch.float64), self.down_RK.to(device, torch.float64)
        return (up_NR @ down_RK).mul_(self.scaling)


def principal(matrix_NK: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """u [N, Q], σ [Q], v [K, Q] of the Q largest singular values, by a fixed draw; Q is the rank, or all there are."""
    with torch.random.fork_rng([matrix_NK.device] if matrix_NK.is_cuda else []):
        torch.manual_seed(0)  # the same for every process, and again
        u_NQ, sizes_Q, v_KQ = torch.svd_lowrank(matrix_NK, min(rank + MORE_COLUMNS, *matrix_NK.shape), ROUNDS)
    return u_NQ[:, :rank], sizes_Q[:rank], v_KQ[:, :rank]


def principal_part(
    weight_NK: torch.Tensor, down_RK: torch.Tensor, up_NR: torch.Tensor, scaling: float
) -> PrincipalPart:
    """That of a weight (fp32, on the device that computes) for an adapter of these shapes and this dtype.

    Where the rank is larger than the weight's, the rest of A stays what it is, and B there zero.
    """
    rank = len(down_RK)
    u_NQ, sizes_Q, v_KQ = principal(weight_NK, rank)
    root_Q = (sizes_Q / scaling).sqrt()
    a_RK, b_NR = down_RK.detach().to(weight_NK, copy=True), torch.zeros_like(up_NR, dtype=weight_NK.dtype)
    a_RK[: len(root_Q)] = (v_KQ * root_Q).T
    b_NR[:, : len(root_Q)] = u_NQ * root_Q
    return PrincipalPart(on_grid(a_RK, rank).to(down_RK.dtype), on_grid(b_NR, rank).to(up_NR.dtype), scaling)


def on_grid(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The matrix rounded to multiples of one power of two, fp64, of which `rank` products of two such sum up exactly.

    Rounding it further, to fewer bits of mantissa, leaves it on the grid.
    """
    bits = min(FP32_BITS, (FP64_BITS - (rank - 1).bit_length()) // 2)
    _, exponent = math.frexp(float(matrix.abs().max()))
    step = math.ldexp(1.0, exponent - bits)
    return (matrix.double() / step).round() * step


def write_parts(parts: Mapping[str, PrincipalPart], path: Path) -> None:
    """All of a model, by the name of the layer; the file appears whole."""
    tensors = {}
    for name, part in parts.items():
        tensors[f"{name}.A"], tensors[f"{name}.B"] = part.down_RK.cpu().contiguous(), part.up_NR.cpu().contiguous()
        tensors[f"{name}.scaling"] = torch.tensor(part.scaling, dtype=torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, path)


class KeptParts:
    """The parts of a model as `write_parts` left them, read when asked for; none of a directory without the file.

    Raises UserError where `digest`, the sha256 of base.json, is not that of the file.
    """

    def __init__(self, directory: Path, digest: str | None) -> None:
        self._path = directory / FILE
        found = file_digest(self._path) if self._path.is_file() else None
        if found != digest:
            raise UserError(
                "missing" if found is None else "not the beginning that base.json tells of",
                str(self._path),
                "without it nobody knows which base the adapter was trained on: restore the file, or train again",
            )
        self._reader = CheckpointReader(directory, FILE) if found else None
        names = self._reader.names() if self._reader else []
        self.names = {name.removesuffix(".scaling") for name in names if name.endswith(".scaling")}
        """Of the layers."""

    def __getitem__(self, name: str) -> PrincipalPart:
        """That of a layer, on the CPU; from any thread."""
        assert self._reader is not None
        down_RK, up_NR, scaling = (self._reader.read(f"{name}.{part}") for part in ("A", "B", "scaling"))
        return PrincipalPart(down_RK, up_NR, scaling.item())
