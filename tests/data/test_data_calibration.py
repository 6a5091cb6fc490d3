"""Calibration rows: seeded, of every kind that a recipe can name, in the share and lengths asked for, never padded."""

import json
from functools import partial

import pytest

from qlora.data.calibration import calibration_row, calibration_rows, general_rows, refinement_rows
from qlora.data.corpora import corpus_digest, corpus_texts
from qlora.data.formats import Completion
from qlora.data.rendering import RenderedRow, render
from qlora.data.store import Rows
from qlora.errors import UserError
from qlora.recipe import Calibration, Quantize

GENERAL = [f"{n}: the quick brown fox jumps over the lazy dog.\n{n} again, and more of the same." for n in range(200)]


@pytest.fixture(scope="module")
def train(chatml_tokenizer):
    return Rows.of(
        render(Completion(f"question {n} " * (1 + n % 5), "answer"), chatml_tokenizer, max_length=99) for n in range(40)
    )


@pytest.fixture
def general_file(tmp_path):
    path = tmp_path / "general.txt"
    path.write_text("\n\n".join(GENERAL))
    return str(path)


def section(**keys) -> Calibration:
    return Calibration.model_validate({"max_length": 99} | keys)


def ids(rows) -> list[list[int]]:
    return [list(row.input_ids) for row in rows]


def test_draws_are_seeded_and_from_training_rows(train, chatml_tokenizer):
    rows = calibration_rows(section(samples=16), train, chatml_tokenizer, seed=1)
    assert len({row.input_ids for row in rows}) == 16
    assert all(row in [known.input_ids for known in train] for row in ids(rows))
    assert rows == calibration_rows(section(samples=16), train, chatml_tokenizer, seed=1)
    assert rows != calibration_rows(section(samples=16), train, chatml_tokenizer, seed=2)


def test_evaluation_rows_and_duplicates_are_left_out(train, chatml_tokenizer):
    twice = train.select([*range(40)] * 2)
    rows = calibration_rows(section(samples=99), twice, chatml_tokenizer, seed=0, exclude=train[:10])
    assert sorted(ids(rows)) == sorted(row.input_ids for row in train[10:])
    with pytest.raises(UserError, match="no training row is left"):
        calibration_rows(section(samples=9), train, chatml_tokenizer, seed=0, exclude=train)


def test_rows_are_cut_and_not_padded(train, chatml_tokenizer):
    rows = calibration_rows(section(samples=40, max_length=7), train, chatml_tokenizer, seed=0)
    assert {len(row.input_ids) for row in rows} == {7} == {len(row.loss) for row in rows}
    assert all(row in [known.input_ids[:7] for known in train] for row in ids(rows))


def test_loss_stands_where_the_prediction_is_made():
    row = RenderedRow([5, 6, 7, 8], [-100, -100, 7, 8], prompt_length=2, truncated=False, answer_text="")
    assert calibration_row(row, 4).loss == (False, True, True, False)
    assert calibration_row(row, 3).loss == (False, True, False)


def test_general_text_fills_rows(train, llama3_tokenizer, general_file):
    rows = calibration_rows(section(**{"from": general_file}, samples=12), train, llama3_tokenizer, seed=0)
    assert len({row.input_ids for row in rows}) == 12
    corpus = "\n\n".join(GENERAL)
    for row in rows:
        assert row.loss is None and len(row.input_ids) == 99
        assert row.input_ids[0] == llama3_tokenizer.bos_token_id
        assert llama3_tokenizer.decode(row.input_ids[1:]).rstrip("�") in corpus


def test_the_mix_has_its_share(train, chatml_tokenizer, general_file):
    known = {tuple(row.input_ids) for row in train}
    rows = calibration_rows(
        section(samples=40, mix={"from": general_file, "share": 0.25}), train, chatml_tokenizer, seed=0
    )
    general = [row for row in rows if row.input_ids not in known]
    assert len(rows) - len(general) == 40 and all(row.loss is None for row in general)
    tokens, mixed = (sum(len(row.input_ids) for row in part) for part in (rows, general))
    # The nearest to a quarter that whole rows of 99 tokens allow.
    assert abs(mixed - 0.25 * tokens) <= 99 / 2


def test_the_mix_takes_every_kind(train, llama3_tokenizer, general_file):
    both = section(**{"from": general_file}, samples=4, mix={"from": "train", "share": 0.5})
    rows = calibration_rows(both, train, llama3_tokenizer, seed=0)
    parts = [sum(len(row.input_ids) for row in rows if (row.loss is None) is general) for general in (True, False)]
    assert parts[0] == 4 * 99 and abs(parts[1] - parts[0]) < max(len(row.input_ids) for row in train)


def test_strings_are_rows_of_their_own_length(train, llama3_tokenizer):
    texts = ["one", "two three four", "x " * 200]
    rows = calibration_rows(section(**{"from": texts}, samples=9), train, llama3_tokenizer, seed=0)
    assert sorted(ids(rows)) == sorted(llama3_tokenizer(text)["input_ids"][:99] for text in texts)
    with pytest.raises(UserError, match="a text without tokens"):
        calibration_rows(section(**{"from": ["one", ""]}), train, llama3_tokenizer, seed=0)


def test_too_little_general_text(train, chatml_tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("hi")
    with pytest.raises(UserError, match=r"short.txt is too short: 2 characters, and a row needs 99 tokens"):
        calibration_rows(section(**{"from": str(tmp_path / "short.txt")}), train, chatml_tokenizer, seed=0)


def test_a_corpus_of_the_hub_without_a_network_names_the_alternative():
    with pytest.raises(UserError, match=r"Salesforce/wikitext(.|\n)*name a text file instead"):
        corpus_texts("wikitext2")
    with pytest.raises(UserError, match=r"nobody/nothing(.|\n)*quantize.calibration.from: general.txt"):
        corpus_texts("nobody/nothing")
    with pytest.raises(UserError, match=r"Salesforce/wikitext \[test\](.|\n)*evaluate.general: general.txt"):
        corpus_texts("wikitext2", "evaluate.general")


def test_general_text_to_measure_on_has_a_label_at_every_token(chatml_tokenizer, general_file):
    rows = general_rows(general_file, chatml_tokenizer, 1000, 100)
    assert [len(row.input_ids) for row in rows] == [100] * 10
    assert all(row.labels == row.input_ids and row.supervised_tokens == 99 for row in rows)
    assert general_rows(general_file, chatml_tokenizer, 1000, 100) == rows
    strings = general_rows(["one two three", "four five six", "seven eight nine"], chatml_tokenizer, 1, 100)
    assert len(strings) == 1
    with pytest.raises(UserError, match=r"evaluate.general(.|\n)*give more text$"):
        general_rows(general_file, chatml_tokenizer, 10**6, 10**6)


def test_a_file_is_known_by_its_content_and_a_corpus_by_its_name(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a"}) + "\n")
    before = corpus_digest(str(rows))
    assert corpus_texts(str(rows)) == ["a"]
    rows.write_text(json.dumps({"text": "b"}) + "\n")
    assert corpus_digest(str(rows)) != before
    assert corpus_digest("c4") == "c4" and corpus_digest(["a", "b"]) == ["a", "b"] and corpus_digest("train") == "train"
    with pytest.raises(UserError, match="no such file"):
        corpus_texts(str(tmp_path / "generel.txt"))


def test_refinement_is_decided_by_rows_that_nothing_has_seen(train, chatml_tokenizer, general_file):
    def draw(refine: dict, **calibration):
        quantize = Quantize.model_validate({"calibration": calibration, "refine": refine})
        drawn = partial(calibration_rows, quantize.calibration, train, chatml_tokenizer, seed=0, exclude=train[:3])
        rows = drawn()
        options = {"seed": 0, "exclude": train[:3], "calibration": rows}
        return rows, *refinement_rows(quantize, train, chatml_tokenizer, **options)

    everything = ids(calibration_rows(section(samples=400), train, chatml_tokenizer, seed=0, exclude=train[:3]))
    rows, learnt, deciding = draw({"samples": 10, "held_out": 0.3}, samples=20)
    assert (len(learnt), len(deciding)) == (10, 3)
    assert all(row in everything and row not in ids(rows) + ids(learnt) for row in ids(deciding))

    # As many as hold the tokens of the steps.
    mean = sum(map(len, ids(rows))) / len(rows)
    _, learnt, deciding = draw({"steps": 2, "tokens_per_step": round(5 * mean), "held_out": 0.5}, samples=20)
    assert len(learnt) in (10, 11) and len(deciding) in (5, 6)

    # More than there are: all that are left decide, and all others are learnt from.
    rows, learnt, deciding = draw({"steps": 1000, "held_out": 0.1}, samples=len(everything) - 5)
    assert len(deciding) == 5 and sorted(ids(learnt + deciding)) == sorted(everything)

    assert draw({"samples": 10}, samples=400)[2] == []
    assert draw({"samples": 10}, samples=4, max_length=16, **{"from": general_file})[2] == []
