"""What is trained on and what is held out: never the same row, and a row stays where it is."""

import random

import pytest

from qlora.data.formats import Examples
from qlora.data.splits import MOST_HELD_OUT, read_splits
from qlora.errors import UserError
from qlora.recipe import Data


def rows_of(count, answers=1):
    return [{"question": f"q{n}", "answer": f"a{n}-{k}"} for n in range(count) for k in range(answers)]


@pytest.fixture
def splits(jsonl_source):
    """`splits(train rows, eval rows, …)`: what becomes of them, as lists of (prompt, answer)."""

    def read(train, evaluation=None, **fields):
        found = read_splits(
            Data(
                train=[jsonl_source(train, name=f"{id(train)}.jsonl")],
                eval=None if evaluation is None else jsonl_source(evaluation, name="eval.jsonl"),
                **fields,
            )
        )
        return found, *(
            [row for source, numbers in split.parts for row in contents(source, numbers)] if split else []
            for split in (found.train, found.evaluation)
        )

    def contents(source, numbers):
        every = [tuple(message["content"] for message in read.example.messages) for read in Examples(source)]
        return [every[number] for number in numbers]

    return read


def test_rows_of_the_evaluation_are_not_trained_on(splits):
    found, train, evaluation = splits(rows_of(10), [*rows_of(3), {"question": "q5", "answer": "another"}])
    assert (found.removed, found.held_out) == (3, 0)
    assert len(train) == 7 and len(evaluation) == 4 and not set(train) & set(evaluation)
    kept, train_with, _ = splits(rows_of(10), rows_of(3), overlap="keep")
    assert kept.removed == 0 and len(train_with) == 10
    assert ("q5", "a5-0") in train, "another answer to a question is another row; `qlora check` tells of it"


def test_a_share_is_held_out_where_no_evaluation_is_named(splits):
    found, train, evaluation = splits(rows_of(400), eval_share=0.1)
    assert len(evaluation) == found.held_out == 40 and len(train) == 360
    assert not set(train) & set(evaluation)
    assert splits(rows_of(400), eval_share=0)[0].evaluation is None
    assert len(splits(rows_of(30))[2]) == 1 and splits(rows_of(1))[0].evaluation is None
    assert len(splits(rows_of(3000), eval_share=0.5)[2]) == MOST_HELD_OUT


def test_a_row_stays_on_its_side(splits):
    rows = rows_of(500)
    before = set(splits(rows, eval_share=0.1)[2])
    shuffled = random.Random(0).sample(rows, len(rows))
    assert set(splits(shuffled, eval_share=0.1)[2]) == before
    grown = set(splits(rows + [{"question": f"new {n}", "answer": "a"} for n in range(50)], eval_share=0.1)[2])
    assert len(before & grown) >= 0.85 * len(before)


def test_answers_to_one_question_stay_together(splits):
    _, train, evaluation = splits(rows_of(100, answers=2), eval_share=0.1)
    assert not {question for question, _ in train} & {question for question, _ in evaluation}
    same = [{"question": "always this", "answer": f"a{n}"} for n in range(100)]
    _, train, evaluation = splits(same, eval_share=0.1)
    assert len(evaluation) == 10 and len(train) == 90, "unless they would all be held out"


def test_what_is_left_out_has_a_digest(splits):
    rows = rows_of(50)
    digests = [splits(rows, rows_of(count))[0].digest for count in (2, 2, 3)]
    assert digests[0] == digests[1] != digests[2]
    other = [{"question": "not trained on", "answer": "a"}]
    assert splits(rows, other)[0].digest == splits(rows, eval_share=0)[0].digest


def test_a_mixture_keeps_the_order_of_its_sources_and_loses_what_is_held_out_in_each(jsonl_source):
    rows = rows_of(40)
    sources = [
        jsonl_source(rows[:8], name="twice.jsonl", weight=2),
        jsonl_source(rows[8:28], name="half.jsonl", weight=0.5),
        jsonl_source(rows[28:], name="first.jsonl", max_rows=3),
    ]
    held_out = jsonl_source([*rows[2:4], *rows[28:30]], name="eval.jsonl")
    found = read_splits(Data(train=sources, eval=held_out))
    (_, twice), (_, half), (_, first) = found.train.parts
    assert twice.tolist() == [n for n in range(8) if n not in (2, 3)] * 2
    assert len(half) == 10 and half.tolist() == sorted(half.tolist()) and first.tolist() == [2]
    assert found.removed == 2 * 2 + 2 and len(found.train) == 12 + 10 + 1
    share = read_splits(Data(train=sources, eval_share=0.1))
    assert share.evaluation is not None and len(share.evaluation) == 2, "of 21 prompts"
    assert share.held_out >= 2 and len(share.train) + share.held_out == 16 + 10 + 3


def test_all_sources_that_cannot_be_read_are_named(jsonl_source, make_source, tmp_path):
    sources = [make_source(tmp_path / "missing.jsonl"), jsonl_source([{"body": ""}]), make_source(tmp_path / "no.csv")]
    with pytest.raises(UserError) as caught:
        read_splits(Data(train=sources))
    assert len(caught.value.problems) == 3
