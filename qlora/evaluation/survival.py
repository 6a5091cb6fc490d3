"""Adapter survival: what of the fine-tune is left in each linear of the checkpoint (evaluation/survival.json).

Of a linear, W is the weight that training began with (what the merge adds the adapter to), Δ what training did to it
(s·B·A for LoRA), W + Δ the merged weight and Wq what the checkpoint's codes stand for. Inner products and norms are
over all entries.

    cosine         cos(Wq − W, Δ): how much of all that sets the checkpoint apart from the base is the fine-tune. The
                   rest is rounding. 1 without any; small where the update is smaller than a step of the grid, which
                   alone is no loss, since what rounding adds has no direction.
    energy         ⟨Wq − W, Δ⟩ / ⟨Δ, Δ⟩: the share of the update that is there, measured along itself. 1.0: all of it,
                   whatever rounding added around it. 0: none, as if the base had been quantized. More than 1: rounding
                   happens to push the same way.
    codes_changed  share of codes that are others than they would be without the update: the nearest on the
                   checkpoint's grid to W + Δ against the nearest to W. Both are rounded to nearest, so that only the
                   update counts and not how GPTQ makes up for the rounding of other weights.
    weight_error   ‖Wq − (W + Δ)‖ / ‖W + Δ‖.
    output_error   the same of what the module puts out on held-out rows (`output_errors`).
    expected_error what the quantizer found of that on calibration rows, where it says.

`overall` has the means over modules, weighed with their parameters; `worst` the modules whose outputs are furthest off.
Of SmolLM2-135M after 40 steps, at 4 bits, updates are 0.5 % of the weights and change 0.6 % of the codes; the energy of
single modules is between 0.70 and 1.25, smaller ones further from 1, and 0.97 over all (0.91 at 2 bits).

Shapes: N outputs, K inputs, G groups, n a block of rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from qlora.evaluation.damage import Tiles
from qlora.models.packed_checkpoint import PackedLinears, PackedRows

FIGURES = ("cosine", "energy", "codes_changed", "weight_error", "output_error", "expected_error")
WORST = 5


class TrainedRows(Protocol):
    """Rows of a linear's weight [n, K], fp32: as training began with them, and merged."""

    @property
    def rows(self) -> slice: ...
    @property
    def before_nK(self) -> torch.Tensor: ...
    @property
    def after_nK(self) -> torch.Tensor: ...


class TrainedWeights(Protocol):
    """Where the weights that were quantized come from."""

    def module(self, name: str) -> str:
        """The module of the trained model whose weight is the tensor of this name in the merged checkpoint."""
        ...

    def linear(self, name: str) -> Iterator[TrainedRows]:
        """That weight, a block of rows at a time: multiples of 64, but for the last."""
        ...


@dataclass(frozen=True)
class ModuleSurvival:
    """Figures of one linear, as the module docstring has them. None where not defined, or not measured."""

    name: str
    layer: int | None
    kind: str
    parameters: int
    cosine: float | None = None
    energy: float | None = None
    codes_changed: float | None = None
    weight_error: float | None = None
    output_error: float | None = None
    expected_error: float | None = None


@dataclass(frozen=True)
class Damage:
    """A module whose codes do not stand for the merged weight."""

    name: str
    why: str


def survival(
    checkpoint: PackedLinears,
    weights: TrainedWeights,
    output_errors: Mapping[str, float],
    expected: Mapping[str, float],
    device: str,
    progress: Callable[[int, int, str], None],
) -> tuple[list[ModuleSurvival], list[Damage]]:
    """Of every linear that the checkpoint packs, one after the other; and those that are damaged.

    output_errors: by the module's name in the trained model. expected: by its name in the checkpoint. device: where
    `weights` are given.
    """
    found, damaged = [], []
    for done, name in enumerate(checkpoint.names):
        progress(done, len(checkpoint.names), name)
        module = weights.module(f"{name}.weight")
        figures, why = _of_module(checkpoint, weights, name, device)
        figures = replace(figures, output_error=output_errors.get(module), expected_error=expected.get(name))
        found.append(figures)
        if why is not None:
            damaged.append(Damage(name, why + _outputs(figures)))
    return found, damaged


def report(modules: Sequence[ModuleSurvival], damaged: Sequence[Damage], reason: str | None = None) -> dict[str, Any]:
    """The content of survival.json. reason: why there are no figures."""
    overall = {figure: _mean(modules, figure) for figure in FIGURES}
    worst = sorted(modules, key=_badness, reverse=True)[:WORST]
    content: dict[str, Any] = {"modules": [asdict(module) for module in modules], "overall": overall}
    content |= {"worst": [module.name for module in worst], "damaged": [asdict(each) for each in damaged]}
    return content if reason is None else content | {"reason": reason}


def _badness(module: ModuleSurvival) -> tuple[float, float]:
    """By the error of outputs; modules without that figure by the error of their weights, after all others.

    Not by energy: in a module with a small update that is mostly chance.
    """
    return module.output_error or -1.0, module.weight_error or 0.0


def _of_module(
    checkpoint: PackedLinears, weights: TrainedWeights, name: str, device: str
) -> tuple[ModuleSurvival, str | None]:
    packed, sums = checkpoint.read(name, device), _Sums()
    tiles = Tiles()
    for block in weights.linear(f"{name}.weight"):
        rows = packed.rows(block.rows)
        quantized_nK = rows.weight()
        sums.add(block, rows, quantized_nK)
        tiles.add(block.after_nK, rows, quantized_nK)
    layer = re.search(r"(?:^|\.)(\d+)\.", name)
    base = ModuleSurvival(name, int(layer[1]) if layer else None, name.rpartition(".")[2], sums.parameters)
    return sums.figures(base), tiles.damage()


class _Sums:
    """What the figures of one linear are made of, block after block."""

    def __init__(self) -> None:
        self.parameters = 0
        self._sums: torch.Tensor | float = 0.0

    def add(self, block: TrainedRows, packed: PackedRows, quantized_nK: torch.Tensor) -> None:
        merged_nK = block.after_nK
        update_nK, moved_nK, error_nK = (
            merged_nK - block.before_nK,
            quantized_nK - block.before_nK,
            quantized_nK - merged_nK,
        )
        products = [
            torch.dot(left.flatten(), right.flatten()).double()
            for left, right in (
                (update_nK, update_nK),
                (moved_nK, update_nK),
                (moved_nK, moved_nK),
                (merged_nK, merged_nK),
                (error_nK, error_nK),
            )
        ]
        with_update_nK, without_nK = packed.nearest(merged_nK, block.before_nK)
        changed = (with_update_nK != without_nK).sum(dtype=torch.float64)
        self._sums = self._sums + torch.stack([*products, changed])
        self.parameters += quantized_nK.numel()

    def figures(self, module: ModuleSurvival) -> ModuleSurvival:
        assert isinstance(self._sums, torch.Tensor)
        update, along, moved, merged, error, changed = self._sums.tolist()
        found = replace(module, weight_error=_finite(math.sqrt(error / merged)) if merged else None)
        if not update:
            return found
        return replace(
            found,
            cosine=_finite(along / math.sqrt(update * moved)) if moved else 0.0,
            energy=_finite(along / update),
            codes_changed=changed / self.parameters,
        )


def _mean(modules: Sequence[ModuleSurvival], figure: str) -> float | None:
    """Over the modules that have the figure, weighed with their parameters."""
    pairs = [(getattr(module, figure), module.parameters) for module in modules]
    known = [(value, weight) for value, weight in pairs if value is not None]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None


def _outputs(figures: ModuleSurvival) -> str:
    if figures.output_error is None:
        return ""
    expected = f", {figures.expected_error:.1%} were expected" if figures.expected_error is not None else ""
    return f"; its outputs are {figures.output_error:.1%} off{expected}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
