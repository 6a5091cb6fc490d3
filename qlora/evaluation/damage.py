"""Whether codes stand for the weight that was quantized: scales doubled, blocks zeroed, tensors of another module.

A weight is looked at in tiles of 32 outputs and one group of inputs, a thousand weights and more. Of each,

    gain = ⟨Wq, W⟩ / ⟨W, W⟩

says how much of the weight W is left along itself. Rounding adds errors of either sign, which leave the gain near 1
however coarse it is, and however far GPTQ moves single codes to make up for others. Clipping takes from it: of
SmolLM2-135M, tiles have gains from 0.94 to 1.03 at 4 bits, and from 0.61 to 0.99 at 2. Refinement moves scales by a few
hundredths. Scales that are doubled double the gain, zeros and foreign codes take it to 0. A tile is damaged if

    gain > 1.4,   or   gain ≤ 0.5 and ‖Wq − W‖² > 2·Σ (step / 2)²,

the latter because a grid may be too coarse for small weights beside a large one, which round to zero: no error is then
larger than half a step.

Shapes: n outputs of a block, K inputs, G groups, R tiles along the outputs.
"""

from __future__ import annotations

import torch

from qlora.models.packed_checkpoint import PackedRows

OUTPUTS = 32
HIGHEST_GAIN = 1.4
LOWEST_GAIN = 0.5
ROUNDING = 2.0
NOTHING = 1e-6  # of the mean square of a weight: less in a tile is no damage


class Tiles:
    """Sums over the tiles of one linear, block of rows after block of rows."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []

    def add(self, weight_nK: torch.Tensor, packed: PackedRows, quantized_nK: torch.Tensor) -> None:
        """Rows of the weight, the same rows of the checkpoint, and what these stand for."""
        error_nK = quantized_nK - weight_nK
        products = (weight_nK * weight_nK, quantized_nK * weight_nK, error_nK.square_())
        per_group = [_over_groups(product_nK, packed) for product_nK in products]
        size = packed.inputs / packed.groups
        steps_nG = packed.tensors.scales.T.float()
        sums_4nG = torch.stack([*per_group, steps_nG.square() * (size / 4)]).double()
        sums_4nG = torch.nn.functional.pad(sums_4nG, (0, 0, 0, -sums_4nG.shape[1] % OUTPUTS))
        self._sums.append(sums_4nG.unflatten(1, (-1, OUTPUTS)).sum(2))

    def damage(self) -> str | None:
        """What is wrong with the linear; None if nothing is."""
        weight_RG, along_RG, error_RG, rounding_RG = torch.cat(self._sums, dim=1)
        matters_RG = error_RG > NOTHING * weight_RG.mean()
        much_RG = along_RG > HIGHEST_GAIN * weight_RG
        little_RG = (along_RG <= LOWEST_GAIN * weight_RG) & (error_RG > ROUNDING * rounding_RG)
        damaged_RG = ((much_RG | little_RG) & matters_RG) | ~torch.isfinite(error_RG)
        count, tiles = int(damaged_RG.sum()), damaged_RG.numel()
        if not count:
            return None
        gain = (along_RG[damaged_RG].sum() / weight_RG[damaged_RG].sum()).item()
        what = f"its codes and scales stand for {gain:.2f} times the merged weight"
        if count == tiles:
            return what
        row, group = divmod(int(damaged_RG.flatten().int().argmax()), damaged_RG.shape[1])
        first = f"outputs {row * OUTPUTS} to {row * OUTPUTS + OUTPUTS - 1} of group {group} first"
        return f"{what} in {count} of {tiles} tiles ({first})"


def _over_groups(product_nK: torch.Tensor, packed: PackedRows) -> torch.Tensor:
    """Sums [n, G] over the inputs of each group."""
    if packed.grouped_in_order:
        return product_nK.unflatten(1, (packed.groups, -1)).sum(2)
    sums_nG = product_nK.new_zeros(len(product_nK), packed.groups)
    return sums_nG.index_add_(1, packed.tensors.g_idx.long(), product_nK)
