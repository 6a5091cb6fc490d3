"""The benchmark of training: its rows, its table, and what it says fits a card."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import cards
import train


@pytest.fixture
def arguments(tmp_path, tiny_model):
    found = train.parse(["--out", str(tmp_path), "--shape", "tiny", "--length", "32", "--micro-batch", "2"])
    found.tokenizer = tiny_model
    return found


def test_rows_are_as_many_as_the_steps_take(arguments, tmp_path) -> None:
    rows = train.rows_of(arguments)
    assert len(rows) == 2 * arguments.steps and all(row["input_ids"] == row["labels"] for row in rows)
    assert {len(row["input_ids"]) for row in rows} == {32}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}?", "answer": "word " * i}) + "\n" for i in range(1, 30)))
    real = train.rows_of(argparse.Namespace(**vars(arguments) | {"train": file}))
    assert len(real) == 2 * arguments.steps and max(len(row["input_ids"]) for row in real) == 32
    assert len({len(row["input_ids"]) for row in real}) > 1


def test_a_line_says_what_was_measured_or_what_failed() -> None:
    job = {"engine": "trl", "checkpointing": "off"}
    measured = {"tokens_per_second": 12345.6, "share": 0.5, "allocated": 1.234, "expected": None, "reserved": 2.0}
    assert train.line(job | measured | {"losses": [2.5], "plan": None}) == (
        "| trl | off | 12,346 | 50% | 1.23 |  | 2.0 | 2.500 |  |"
    )
    assert train.line(job | {"error": "no memory"}) == "| trl | off | failed: no memory |"


def test_longer_rows_fit_larger_cards() -> None:
    shapes, adapter = cards.sizes("llama-3.1-8b")

    def longest(card: int) -> int:
        plans = (
            (length, cards.planned(shapes, adapter, length, cards.USABLE * card)) for length in cards.lengths(2**17)
        )
        return next((length for length, plan in plans if cards.fits(plan)), 0)

    lengths = [longest(card) for card in (4, 8, 16, 48)]
    assert lengths == sorted(lengths) and lengths[0] == 0 < lengths[1] < lengths[2] < lengths[3]
