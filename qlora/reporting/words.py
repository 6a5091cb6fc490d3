"""What a run's facts say in plain words: the verdict as a headline, the gates as a list, what was not measured and why.

Every way to show a run (page, terminal, tracker) says it with these words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qlora.errors import Problem
from qlora.facts import RunFacts
from qlora.reporting.figures import figure_of, inside_noise, interval, size, value
from qlora.verdict import Verdict, verdict


@dataclass(frozen=True)
class Check:
    """A gate of the recipe: what it asks, what was found, whether it held. `passed` is None where it did not apply."""

    key: str
    asks: str
    found: str
    passed: bool | None


@dataclass(frozen=True)
class Headline:
    """The verdict. `todo`: what to do next, in order; `reasons`: why not to ship."""

    tone: Literal["ship", "refused", "unmeasured"]
    title: str
    text: str
    checks: tuple[Check, ...]
    reasons: tuple[Problem, ...]
    todo: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """One figure that matters most, with what it was measured to be and a word on what it is."""

    title: str
    shown: str
    note: str


# What a run may hold beyond the ladder: what it is, and what makes it be measured.
MISSING = {
    "curve": ("the loss curve", "this adapter was combined from others; a run that trains has one"),
    "survival": ("what compressing cost in every layer", "evaluate.survival: true"),
    "generations": ("answers side by side", "evaluate.generate: true"),
    "general": ("what fine-tuning made the model forget", "evaluate.general: wikitext2"),
    "tasks": ("public tests by name", "evaluate.tasks: [arc_easy]"),
    "merges": ("whether merging into the original base would be better", "evaluate.compare_merges: true"),
    "contract": ("which serving engines take the checkpoint", "`qlora evaluate RECIPE` with this version"),
    "ladder": ("how good any of the models is", "data.eval: {path: FILE}, or data.eval_share above 0"),
    "intervals": ("how sure these figures are", "`qlora evaluate RECIPE` with this version"),
    "expected": ("what the stages were expected to take", "a stage records its estimate when it runs"),
}


def headline(facts: RunFacts) -> Headline:
    """The verdict of the one place that decides, in words."""
    judged = verdict(facts)
    checks = tuple(_checks(facts, judged))
    command = f"qlora run {facts.dirs.recipe}"
    if not judged.measured:
        held_out = facts.recipe.data.eval is not None or facts.recipe.data.eval_share > 0
        rows = "Name a file of held-out rows in data.eval, or set data.eval_share."
        return Headline(
            "unmeasured",
            "Not measured: nobody knows yet whether this can be shipped",
            "The checkpoint that this run holds was not measured on rows that it did not learn from.",
            checks,
            (),
            (f"Run what is missing: {command}",) if held_out else (rows, f"Then run again: {command}"),
        )
    found = _found(facts)
    if judged.reasons:
        count = len(judged.reasons)
        title = f"Do not ship it: {count} {'check' if count == 1 else 'checks'} failed"
        fixes = dict.fromkeys(problem.fix for problem in judged.reasons if problem.fix)
        todo = [fix[0].upper() + fix[1:] + ("" if fix.endswith(".") else ".") for fix in fixes]
        return Headline("refused", title, found, checks, judged.reasons, (*todo, f"Then run again: {command}"))
    passed = sum(check.passed is True for check in checks)
    if passed:
        title = (
            "Ship it: it passed the check that was set" if passed == 1 else f"Ship it: it passed all {passed} checks"
        )
        return Headline("ship", title, found, checks, (), (f"Serve it: vllm serve {facts.dirs.gptq}",))
    return Headline(
        "ship",
        "Ship it, if these figures are good enough for you",
        f"{found} No limits were set that it could have missed.",
        checks,
        (),
        ("Set limits, so that a worse run is refused: evaluate.gates.kl, gain_retained, exact_match.",),
    )


def _found(facts: RunFacts) -> str:
    """Two sentences on what the ladder found of the checkpoint."""
    assert facts.ladder is not None
    rung = _rung(facts.ladder, "gptq")
    checkpoint = f"The {facts.recipe.quantize.bits}-bit checkpoint"
    sentences = []
    gain, top1, preferred = value(rung, "gain_retained"), value(rung, "top1"), value(rung, "preferred")
    if preferred is not None:
        sentences.append(f"{checkpoint} favours the better answer {_brief('preferred', preferred)} of the time")
    elif gain is not None:
        noise = ", which is all of it as far as these rows can tell" if inside_noise(facts.ladder) else ""
        sentences.append(f"{checkpoint} keeps {_brief('gain_retained', gain)} of what fine-tuning gained{noise}")
    if top1 is not None:
        sentences.append(f"It predicts the same next token as the trained model {_brief('top1', top1)} of the time")
    exact = value(rung, "exact_match")
    if exact is not None:
        sentences.append(f"Of its written answers, {_brief('exact_match', exact)} are right to the letter")
    return " ".join(f"{sentence}." for sentence in sentences)


def _brief(key: str, number: float) -> str:
    return figure_of(key).brief(number)


def tiles(facts: RunFacts) -> list[Tile]:
    """The figures to look at first, of the checkpoint to ship."""
    found = []
    if facts.ladder is not None:
        rung, trained = _rung(facts.ladder, "gptq"), _rung(facts.ladder, "trained")
        rows = f"{facts.ladder['rows']:,} held-out rows"
        for key, note in (
            ("preferred", "the better of two answers is favoured"),
            ("gain_retained", "of what fine-tuning gained is kept"),
            ("top1", "of next tokens are the trained model's"),
            ("exact_match", "of written answers are right to the letter"),
        ):
            number = value(rung, key)
            if number is None or (key == "gain_retained" and value(rung, "preferred") is not None):
                continue
            figure = figure_of(key)
            more = shown_interval(rung, key)
            own = value(trained, key)
            if key in ("preferred", "exact_match") and own is not None:
                more = f"{more}; trained: {figure.brief(own)}" if more else f"trained: {figure.brief(own)}"
            found.append(Tile(figure.title, figure.brief(number), f"{note} ({more or rows})"))
    quantized, merged = weights(facts, "quantize"), weights(facts, "merge")
    if quantized:
        smaller = f"of weights; {size(merged)} in 16 bits" if merged else "of weights"
        found.append(Tile("Size", size(quantized), smaller))
    return found


def shown_interval(rung: dict[str, Any], key: str) -> str:
    """`99.1% to 100%`, or an empty string."""
    found = interval(rung, key)
    return f"{_brief(key, found[0])} to {_brief(key, found[1])}" if found else ""


def weights(facts: RunFacts, stage: str) -> int:
    """Bytes of the weights that a stage wrote."""
    files = facts.stages.get(stage, {}).get("outputs", {})
    return sum(file["bytes"] for name, file in files.items() if name.endswith(".safetensors"))


def expected(facts: RunFacts, stage: str) -> dict[str, Any]:
    """What a stage was estimated to take before it ran: `seconds`, `host_gib`, `gpu_gib`; empty if not recorded."""
    return facts.stages.get(stage, {}).get("expected") or {}


def memory(facts: RunFacts, stage: str) -> tuple[str, float | None, float | None]:
    """(`GPU` or `host`, GiB at the peak, GiB expected): of the memory that the stage computed in."""
    metrics, estimate = facts.metrics(stage), expected(facts, stage)
    gpu: float | None = metrics.get("gpu_peak_gib")
    if gpu:
        return "GPU", gpu, estimate.get("gpu_gib")
    return "host", metrics.get("host_peak_gib"), estimate.get("host_gib")


def _checks(facts: RunFacts, judged: Verdict) -> list[Check]:
    """Every gate that the recipe sets. What failed, and why, is the verdict's; nothing is compared here."""
    failed = {reason.where.removeprefix("evaluate.gates.") for reason in judged.reasons}
    found = []
    for key, limit in _leaves("", facts.recipe.evaluate.gates.model_dump()):
        if limit is None or not judged.measured:
            continue
        name, rung = ("kl", "merged") if key == "merge_kl" else (key, "gptq")
        figure = figure_of(name)
        number = value(_rung(facts.ladder or {"rungs": []}, rung), name)
        if key == "survival":
            number = ((facts.survival or {}).get("overall") or {}).get("energy")
        applies = key != "merge_kl" or facts.recipe.merges_exactly
        shown = figure.brief(limit) if figure.form.endswith("%") else f"{limit:g}"
        relation = "at least" if figure.higher else "at most"
        what = f"{figure.plain or figure.title}{', of the merge' if rung == 'merged' else ''}"
        passed = key not in failed if applies else None
        found.append(Check(f"evaluate.gates.{key}", f"{what}: {relation} {shown}", figure.show(number), passed))
    listed = {check.key for check in found}
    others = [reason for reason in judged.reasons if reason.where not in listed]
    return found + [Check(reason.where, reason.what, "", False) for reason in others]


def _leaves(prefix: str, gates: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, limit in gates.items():
        found += _leaves(f"{prefix}{name}.", limit) if isinstance(limit, dict) else [(f"{prefix}{name}", limit)]
    return found


def _rung(ladder: dict[str, Any], name: str) -> dict[str, Any]:
    return next((rung for rung in ladder["rungs"] if rung["name"] == name), {})
