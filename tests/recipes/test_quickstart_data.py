"""The quickstart data set is what its script makes, and its held-out rows ask for more than memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
FIELDS = {"item": str, "quantity": int, "name": str, "day": str}
DAYS = {"mon", "tue", "wed", "thu", "fri", "sat", "sun"}
SPLITS = {"train": 640, "eval": 50}


def read_rows(split: str) -> list[tuple[str, dict]]:
    """The rows of a split as (request, answer), with the shape of the conversation checked on the way."""
    rows = []
    for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        system, user, assistant = (message["content"] for message in row["messages"])
        assert system == "Reply with JSON."
        answer = json.loads(assistant)
        assert json.dumps(answer) == assistant, "one spelling of an answer, or exact match means nothing"
        rows.append((user, answer))
    return rows


def values(rows: list[tuple[str, dict]], field: str) -> set:
    """The different values of one field of the answers."""
    return {answer[field] for _, answer in rows}


def combinations(rows: list[tuple[str, dict]]) -> set[tuple]:
    """The different answers, as tuples of their four fields."""
    return {tuple(answer.values()) for _, answer in rows}


def test_the_script_makes_the_same_bytes_with_the_standard_library_alone(tmp_path):
    shutil.copy(FOLDER / "make_data.py", tmp_path)
    subprocess.run([sys.executable, "-I", "-S", str(tmp_path / "make_data.py")], check=True)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_has_the_schema_and_follows_from_the_request(split):
    rows = read_rows(split)
    assert len(rows) == SPLITS[split]
    for request, answer in rows:
        assert {key: type(value) for key, value in answer.items()} == FIELDS
        assert list(answer) == list(FIELDS)
        assert answer["item"] == answer["item"].lower() and answer["item"] in request.lower()
        assert 2 <= answer["quantity"] <= 99
        assert answer["name"] in request
        assert answer["day"] in DAYS and answer["day"].capitalize() in request


def test_held_out_rows_share_no_combination_with_training():
    train, held_out = combinations(read_rows("train")), combinations(read_rows("eval"))
    assert len(train) == SPLITS["train"] and len(held_out) == SPLITS["eval"], "no row twice"
    assert not train & held_out


def test_held_out_rows_have_items_and_names_that_training_never_shows():
    train, held_out = read_rows("train"), read_rows("eval")
    for field in ("item", "name"):
        unseen = sum(answer[field] not in values(train, field) for _, answer in held_out)
        assert 20 <= unseen <= 30, field


def test_held_out_rows_have_sentences_that_training_never_shows():
    def frame(request: str, answer: dict) -> str:
        """The sentence without its item and name; quantity and day vary it further, so compare a part of it."""
        return request.lower().replace(answer["item"], "{item}").replace(answer["name"].lower(), "{name}")

    train = " ".join(frame(*row) for row in read_rows("train"))
    phrases = ("the manager, {name}", "our partner {name}", "i open a cafe", "last week {name}", "new order")
    held_out = " ".join(frame(*row) for row in read_rows("eval"))
    for phrase in phrases:
        assert phrase in held_out and phrase not in train, phrase


def test_values_are_varied_in_training():
    rows = read_rows("train")
    assert len(values(rows, "item")) == 60
    assert len(values(rows, "name")) == 56
    assert len(values(rows, "quantity")) >= 80
    assert values(rows, "day") == DAYS
    requests = [request for request, _ in rows]
    assert len(set(requests)) == len(requests)
    spelled = sum(not any(character.isdigit() for character in request) for request in requests)
    assert 0.4 <= spelled / len(requests) <= 0.6, "about half of the quantities are words"
