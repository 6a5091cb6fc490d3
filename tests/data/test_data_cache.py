"""Rendered rows from the cache are those that were rendered, and never those of something else."""

import copy
import logging

import pytest

from qlora.data import cache
from qlora.data.cache import with_cache
from qlora.data.formats import read_examples
from qlora.data.preparation import prepare

ROWS = [{"question": f"q{n}", "answer": "a" * n} for n in range(1, 6)]


@pytest.fixture
def prepared(tmp_path, monkeypatch, jsonl_source, data_settings, chatml_tokenizer):
    """`prepared(rows, tokenizer, …)`: rows through the cache, and whether they had to be rendered."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))

    def get(rows=ROWS, tokenizer=chatml_tokenizer, **fields):
        examples, settings, made = read_examples(jsonl_source(rows)), data_settings(max_length=64, **fields), []

        def make():
            made.append(True)
            return prepare(examples, tokenizer, settings, split_name="train")

        found = with_cache(examples, tokenizer, settings, "train", make)
        assert found == prepare(examples, tokenizer, settings, split_name="train")
        return bool(made)

    return get


def test_the_same_is_rendered_once(prepared):
    assert [prepared(), prepared(), prepared()] == [True, False, False]


def test_what_changes_rows_renders_them_again(prepared, chatml_tokenizer, tmp_path):
    prepared()
    assert prepared(rows=ROWS[:4])
    assert prepared(loss_on="all") and prepared(overlong="drop")
    other = copy.deepcopy(chatml_tokenizer)
    other.chat_template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    assert prepared(tokenizer=other)
    template = tmp_path / "own.jinja"
    for text, again in (("{{ messages[0].content }}:", True), ("{{ messages[0].content }};", True)):
        template.write_text(text + "{% if messages[1:] %}{{ messages[1].content + eos_token }}{% endif %}")
        assert prepared(chat_template=str(template)) == again
    assert not prepared(chat_template=str(template)) and not prepared()


def test_a_damaged_file_is_made_again(prepared, tmp_path, caplog):
    prepared()
    (file,) = (tmp_path / "cache" / "rows").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.INFO):
        assert prepared()
    assert "rendered again" in caplog.text and not prepared()


def test_the_oldest_files_go(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 2)
    for count in (1, 2, 3):
        prepared(rows=ROWS[:count])
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 2
    assert not prepared(rows=ROWS[:3]) and prepared(rows=ROWS[:1])
