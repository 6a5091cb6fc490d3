"""What can be said of a generated answer without a judge: that it is the reference, is JSON, or has a form.

All of them come from one greedy generation per row. White space at both ends of an answer never counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora.data.rendering import RenderedRow
from qlora.recipe_measuring import EXACT_MATCH, JSON_VALID, Evaluate, Pattern


@dataclass(frozen=True)
class Metric:
    """`holds(answer, expected)` says whether a generated answer is right; both are stripped."""

    name: str
    holds: Callable[[str, str], bool]


def metrics_of(section: Evaluate) -> tuple[Metric, ...]:
    """Those a recipe measures; none where nothing is generated. Exact match is always the first."""
    if not section.generate:
        return ()
    found = {EXACT_MATCH: Metric(EXACT_MATCH, exact_match)}
    for wanted in section.metrics:
        metric = _matching(wanted) if isinstance(wanted, Pattern) else BUILT_IN[wanted]
        found[metric.name] = metric
    return tuple(found.values())


def exact_match(answer: str, expected: str) -> bool:
    return answer == expected


def json_valid(answer: str, expected: str) -> bool:
    """Whether the whole answer is one JSON value. NaN and Infinity, which Python would read, are none."""
    try:
        json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _matching(wanted: Pattern) -> Metric:
    compiled = re.compile(wanted.regex, re.DOTALL)
    return Metric(wanted.name, lambda answer, expected: compiled.fullmatch(answer) is not None)


BUILT_IN = {EXACT_MATCH: Metric(EXACT_MATCH, exact_match), JSON_VALID: Metric(JSON_VALID, json_valid)}


def judged(metrics: Sequence[Metric], rows: Sequence[RenderedRow], answers: Sequence[str]) -> dict[str, np.ndarray]:
    """By metric, [R] whether it holds for the answer of each row."""
    pairs = [(answer.strip(), str(row.answer_text).strip()) for answer, row in zip(answers, rows, strict=True)]
    return {metric.name: np.array([metric.holds(*pair) for pair in pairs], dtype=bool) for metric in metrics}


def spread(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` of `count` things, or of all, evenly from the first to the last."""
    if wanted >= count:
        return list(range(count))
    return [round(index * (count - 1) / max(1, wanted - 1)) for index in range(wanted)]
