"""Metrics of generated answers, and what a recipe may ask of them."""

import pytest
from pydantic import ValidationError

from qlora.data.rendering import RenderedRow
from qlora.evaluation.answers import judged, metrics_of, spread
from qlora.recipe_measuring import Evaluate


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"item": "metal trays", "quantity": 40}', True),
        (' [1, 2]\n', True),
        ("40", True),
        ("", False),
        ("{'item': 1}", False),
        ('{"item": NaN}', False),
        ('```json\n{"item": 1}\n```', False),
        ('{"item": 1} is what you asked for', False),
        ('{"item": 1', False),
        ("[" * 100_000, False),
    ],
)  # fmt: skip
def test_json_is_valid_as_a_whole(answer, valid):
    metrics = metrics_of(Evaluate(generate=True, metrics=["json_valid"]))
    assert judged(metrics, [row("")], [answer])["json_valid"].tolist() == [valid]


def row(answer: str) -> RenderedRow:
    return RenderedRow([1, 2], [-100, 2], 1, False, answer)


def test_a_regex_matches_the_whole_answer_white_space_aside():
    section = Evaluate(
        generate=True, metrics=["exact_match", {"regex": "yes|no"}, {"regex": r"Answer: .*\d+", "name": "number"}]
    )
    found = judged(metrics_of(section), [row("yes")] * 4, [" yes\n", "yes, or no", "Answer: first\n40", "no"])
    assert {name: each.tolist() for name, each in found.items()} == {
        "exact_match": [True, False, False, False],
        "regex": [True, False, False, True],
        "number": [False, False, True, False],
    }


def test_nothing_is_measured_of_answers_that_are_not_generated():
    assert metrics_of(Evaluate()) == ()
    assert [metric.name for metric in metrics_of(Evaluate(generate=True))] == ["exact_match"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"metrics": ["json_valid"]}, "need evaluate.generate: true"),
        ({"generate": True, "metrics": [{"regex": "a"}, {"regex": "b"}]}, "there twice; give each regex a name"),
        ({"generate": True, "metrics": [{"regex": "a", "name": "exact_match"}]}, "exact_match is there twice"),
        ({"generate": True, "metrics": [{"regex": "(a"}]}, "is no regular expression: missing \\)"),
        ({"generate": True, "metrics": [{"regex": "a", "name": "no dots.here"}]}, "String should match pattern"),
        ({"gates": {"metrics": {"json_valid": 0.9}}}, "json_valid is not one of evaluate.metrics"),
        ({"general": "train"}, "text that was not trained on"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        Evaluate.model_validate(section)


def test_examples_are_spread_from_the_first_to_the_last():
    assert spread(50, 6) == [0, 10, 20, 29, 39, 49] and spread(3, 6) == [0, 1, 2] and spread(9, 1) == [0]
    assert spread(9, 0) == [] and spread(0, 3) == []
