"""Which of two merges to ship, from what the ladder found of both: evaluation/merges.json.

The dequantized base is what the adapter was trained on, so that its merge is the trained model; the original base is
without the error of 4 bits, which the adapter may have made up for. Both are scored behind GPTQ, as they would be
served. What the task asks for decides; where that is equal, general text, which tells what else the model has kept;
then which is closer to the model that was trained. A difference inside the noise decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora.errors import UserError
from qlora.recipe import Recipe

Scored = Mapping[str, Any]
"""A rung of ladder.json."""
MergeBase = Literal["dequantized", "original"]
FLOOR = 1e-3
"""Nats, or share of comparisons: a smaller difference is none, whatever its interval."""


@dataclass(frozen=True)
class Criterion:
    """A figure that decides, as it stands in a rung and in its intervals."""

    key: str
    what: str
    higher_is_better: bool = False

    def of(self, rung: Scored) -> float | None:
        value: Any = rung
        for part in self.key.split("."):
            value = value.get(part) if value is not None else None
        return value


CRITERIA = (
    Criterion("preferred", "share of comparisons that the better answer wins", higher_is_better=True),
    Criterion("loss", "loss on the held-out answers"),
    Criterion("general.loss", "loss on general text"),
    Criterion("kl", "KL to the trained model"),
)


def other_base(recipe: Recipe) -> MergeBase:
    """The one that `merge.base` is not."""
    return "original" if recipe.merge.base == "dequantized" else "dequantized"


def check_compared(recipe: Recipe) -> None:
    """Raise UserError where there are no two merges to compare."""
    if recipe.evaluate.compare_merges and not recipe.model.requantizes:
        raise UserError(
            f"with model.quantization: {recipe.model.quantization} the base is trained as it is: both merges are one",
            "evaluate.compare_merges",
            "leave it out",
        )


def compare(merged: Mapping[MergeBase, Scored | None], quantized: Mapping[MergeBase, Scored]) -> dict[str, Any]:
    """The content of merges.json: figures of the quantized model by base, with those of the merged one where it was
    measured, and which to ship."""
    ship, why = which_to_ship(quantized["dequantized"], quantized["original"])
    bases: tuple[MergeBase, MergeBase] = ("dequantized", "original")
    figures = {base: {**quantized[base], "merged": merged.get(base)} for base in bases}
    return figures | {"ship": ship, "why": why}


def which_to_ship(dequantized: Scored, original: Scored) -> tuple[MergeBase | Literal["either"], str]:
    """(which, why) of two rungs on the same rows."""
    equal = []
    for criterion in CRITERIA:
        values = criterion.of(dequantized), criterion.of(original)
        if values[0] is None or values[1] is None:
            continue
        if not differ(dequantized, original, criterion):
            equal.append(criterion.what)
            continue
        better: MergeBase = "original" if (values[1] > values[0]) == criterion.higher_is_better else "dequantized"
        best, rest = values if better == "dequantized" else values[::-1]
        other = "original" if better == "dequantized" else "dequantized"
        tied = f"; equal within the noise: {', '.join(equal)}" if equal else ""
        return better, f"{criterion.what} {best:.4f}, with the {other} base {rest:.4f}{tied}"
    return "either", f"equal within the noise: {', '.join(equal)}"


def differ(one: Scored, other: Scored, criterion: Criterion) -> bool:
    """Whether a figure of two rungs on the same rows differs by more than noise: by more than `FLOOR`, and, where their
    intervals are known, so that neither value lies in the interval of the other."""
    first, second = criterion.of(one), criterion.of(other)
    assert first is not None and second is not None
    if abs(first - second) < FLOOR:
        return False
    pairs = ((second, one), (first, other))
    intervals = [(value, (rung.get("intervals") or {}).get(criterion.key)) for value, rung in pairs]
    return not any(interval and interval[0] <= value <= interval[1] for value, interval in intervals)
