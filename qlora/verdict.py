"""Whether a run's checkpoint is to be shipped, from what was measured of it: the one place that decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora.errors import Problem
from qlora.facts import RunFacts
from qlora.recipe import Recipe


@dataclass(frozen=True)
class Verdict:
    """`reasons`: why not to ship. Without any, it is to be shipped, if it was measured at all."""

    measured: bool
    reasons: tuple[Problem, ...] = ()

    @property
    def ship(self) -> bool:
        return self.measured and not self.reasons


def verdict(facts: RunFacts) -> Verdict:
    """Of a run as its directory tells of it; not measured if no rows were held out."""
    if facts.ladder is None:
        return Verdict(measured=False)
    gates = _failed_gates(facts.recipe, facts.ladder)
    return Verdict(measured=True, reasons=(*_damaged(facts), *gates, *_lost(facts), *_mismatches(facts)))


def _mismatches(facts: RunFacts) -> list[Problem]:
    """Where a server would be told other tokens or another template than training used."""
    found = (facts.contract or {}).get("mismatches", [])
    return [Problem(text, "evaluation/contract.json", MISMATCH_ADVICE) for text in found]


def _damaged(facts: RunFacts) -> list[Problem]:
    """Modules whose codes do not stand for the merged weights, whatever the ladder says."""
    fix = f"remove {facts.dirs.gptq} and run again; if they are damaged again, report this with lineage.json"
    damaged = (facts.survival or {}).get("damaged", [])
    return [Problem(f"damaged: {module['why']}", module["name"], fix) for module in damaged]


def _lost(facts: RunFacts) -> list[Problem]:
    """The gate on what is left of the update."""
    limit = facts.recipe.evaluate.gates.survival
    left = (facts.survival or {}).get("overall", {}).get("energy")
    if limit is None or (left is not None and left >= limit):
        return []
    shown = "not known" if left is None else f"{left:.4f}"
    fix = f"is {facts.dirs.gptq} what GPTQ made of this adapter? Remove it and run again, or relax the gate"
    what = f"the share of the update that is left is {shown}, the gate wants at least {limit:g}"
    return [Problem(what, "evaluate.gates.survival", fix)]


def _failed_gates(recipe: Recipe, ladder: dict[str, Any]) -> list[Problem]:
    """The gates of the recipe that the ladder misses."""
    gates = recipe.evaluate.gates
    rungs = {rung["name"]: rung for rung in ladder["rungs"]}
    checks = [
        ("merge_kl", "KL to the trained model", "merged", "kl", gates.merge_kl, "at most"),
        ("kl", "KL to the trained model", "gptq", "kl", gates.kl, "at most"),
        ("top1", "top-1 agreement", "gptq", "top1", gates.top1, "at least"),
        ("gain_retained", "gain retained", "gptq", "gain_retained", gates.gain_retained, "at least"),
        ("exact_match", "exact match", "gptq", "exact_match", gates.exact_match, "at least"),
        *(
            (f"metrics.{name}", name, "gptq", f"metrics.{name}", limit, "at least")
            for name, limit in gates.metrics.items()
        ),
        ("preferred", "preferred answers", "gptq", "preferred", gates.preferred, "at least"),
    ]
    problems = []
    for key, title, rung, figure, limit, relation in checks:
        if limit is None or (key == "merge_kl" and not recipe.merges_exactly):
            continue
        value = _figure(rungs[rung], figure)
        shown = "not defined" if value is None else f"{value:.4f}"
        if value is None or (value > limit if relation == "at most" else value < limit):
            problems.append(
                Problem(
                    f"{title} of the {rung} model is {shown}, the gate wants {relation} {limit:g}",
                    f"evaluate.gates.{key}",
                    ADVICE[rung],
                )
            )
    return problems


def _figure(rung: dict[str, Any], key: str) -> float | None:
    """A figure by its key: `kl`, or `metrics.NAME`. None where it was not measured."""
    for part in key.split("."):
        rung = (rung or {}).get(part)  # type: ignore[assignment]
    return rung  # type: ignore[return-value]


ADVICE = {
    "merged": "the merge is not the trained model: report this with lineage.json",
    "gptq": "try a smaller group_size, more bits or more calibration samples, or relax the gate",
}
MISMATCH_ADVICE = "correct tokenizer, template or generation_config.json of the base, and train again from it"
