"""Calibration rows: seeded, from training rows only, general text in the share and lengths asked for, never padded."""

import pytest

from qlora.data.calibration import calibration_rows
from qlora.data.formats import Completion
from qlora.data.rendering import render
from qlora.errors import UserError

GENERAL = [f"{n}: the quick brown fox jumps over the lazy dog.\n{n} again, and more of the same." for n in range(200)]


@pytest.fixture(scope="module")
def train(chatml_tokenizer):
    return [
        render(Completion(f"question {n} " * (1 + n % 5), "answer"), chatml_tokenizer, max_length=99) for n in range(40)
    ]


def test_draws_are_seeded_and_from_training_rows(train, chatml_tokenizer):
    rows = calibration_rows(train, samples=16, max_length=99, seed=1, tokenizer=chatml_tokenizer)
    assert len({tuple(row) for row in rows}) == 16
    assert all(row in [known.input_ids for known in train] for row in rows)
    assert rows == calibration_rows(train, samples=16, max_length=99, seed=1, tokenizer=chatml_tokenizer)
    assert rows != calibration_rows(train, samples=16, max_length=99, seed=2, tokenizer=chatml_tokenizer)


def test_evaluation_rows_and_duplicates_are_left_out(train, chatml_tokenizer):
    rows = calibration_rows(
        train + train, samples=99, max_length=99, seed=0, exclude=train[:10], tokenizer=chatml_tokenizer
    )
    assert sorted(rows) == sorted(row.input_ids for row in train[10:])
    with pytest.raises(UserError, match="no training row is left"):
        calibration_rows(train, samples=9, max_length=99, seed=0, exclude=train, tokenizer=chatml_tokenizer)


def test_rows_are_cut_and_not_padded(train, chatml_tokenizer):
    rows = calibration_rows(train, samples=40, max_length=7, seed=0, tokenizer=chatml_tokenizer)
    assert {len(row) for row in rows} == {7}
    assert all(row in [known.input_ids[:7] for known in train] for row in rows)


def test_the_mix_has_its_share_and_the_lengths_of_training_rows(train, llama3_tokenizer):
    known = {tuple(row.input_ids) for row in train}
    rows = calibration_rows(train, samples=40, max_length=99, seed=0, mix=(GENERAL, 0.25), tokenizer=llama3_tokenizer)
    general = [row for row in rows if tuple(row) not in known]
    assert (len(rows), len(general)) == (40, 10)
    assert {len(row) for row in general} <= {len(row.input_ids) for row in train}
    corpus = "\n\n".join(GENERAL)
    for row in general:
        assert row[0] == llama3_tokenizer.bos_token_id
        assert llama3_tokenizer.decode(row[1:]).rstrip("�") in corpus
    assert len({tuple(row) for row in general}) == 10


def test_the_share_holds_when_training_rows_run_out(train, chatml_tokenizer):
    rows = calibration_rows(train, samples=400, max_length=99, seed=0, mix=(GENERAL, 0.2), tokenizer=chatml_tokenizer)
    assert len(rows) == 50


def test_general_text_alone(train, chatml_tokenizer):
    rows = calibration_rows(train, samples=5, max_length=99, seed=0, mix=(GENERAL, 1.0), tokenizer=chatml_tokenizer)
    assert len(rows) == 5


def test_too_little_general_text(train, chatml_tokenizer):
    with pytest.raises(UserError, match="the general text is too short: 2 characters"):
        calibration_rows(train, samples=8, max_length=99, seed=0, mix=(["hi"], 0.5), tokenizer=chatml_tokenizer)
