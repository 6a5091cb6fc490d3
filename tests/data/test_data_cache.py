"""Rendered rows from the cache are those that were rendered, and never those of something else."""

import copy
import logging
import os

import numpy as np
import pytest

from qlora.data import cache, preparation
from qlora.data.formats import Examples
from qlora.data.preparation import prepare
from qlora.data.rendering import IGNORED, RenderedRow, Renderer
from qlora.data.splits import all_rows
from qlora.data.store import Rows

ROWS = [{"question": f"q{n}", "answer": "a" * n} for n in range(1, 6)]


@pytest.fixture
def prepared(tmp_path, monkeypatch, jsonl_source, data_settings, chatml_tokenizer):
    """`prepared(rows, tokenizer, …)`: whether rows had to be rendered; they are those that rendering gives."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    made = []

    class Watched(Renderer):
        def render_batch(self, examples):
            made.append(len(examples))
            return super().render_batch(examples)

    monkeypatch.setattr(preparation, "Renderer", Watched)

    def get(rows=ROWS, tokenizer=chatml_tokenizer, source=None, **fields):
        made.clear()
        source, settings = source or jsonl_source(rows), data_settings(max_length=64, **fields)
        found = prepare(all_rows(source), tokenizer, settings, split_name="train")
        renderer = Renderer(tokenizer, settings.loss_on, 64, found.chat_template)
        assert list(found.rows) == [row for read in Examples(source) for row in renderer.render(read.example)]
        return bool(made)

    return get


def test_the_same_is_rendered_once(prepared):
    assert [prepared(), prepared(), prepared()] == [True, False, False]


def test_what_changes_rows_renders_them_again(prepared, chatml_tokenizer, tmp_path):
    prepared()
    assert prepared(rows=ROWS[:4])
    assert prepared(loss_on="all")
    assert not prepared(overlong="drop"), "the same rows, of which some may be left out"
    other = copy.deepcopy(chatml_tokenizer)
    other.chat_template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    assert prepared(tokenizer=other)
    template = tmp_path / "own.jinja"
    for text, again in (("{{ messages[0].content }}:", True), ("{{ messages[0].content }};", True)):
        template.write_text(text + "{% if messages[1:] %}{{ messages[1].content + eos_token }}{% endif %}")
        assert prepared(chat_template=str(template)) == again
    assert not prepared(chat_template=str(template)) and not prepared()


def test_a_file_that_moved_is_the_same(prepared, jsonl_source, tmp_path):
    prepared()
    (tmp_path / "elsewhere").mkdir()
    assert not prepared(source=jsonl_source(ROWS, name="elsewhere/train.jsonl"))


def test_a_damaged_file_is_made_again(prepared, tmp_path, caplog):
    prepared()
    (file,) = (tmp_path / "cache" / "rows").glob("*/tokens")
    for content in (file.read_bytes()[:100], file.read_bytes() + b"more"):
        file.write_bytes(content)
        with caplog.at_level(logging.INFO):
            assert prepared()
        assert "made again" in caplog.text and not prepared()
        caplog.clear()


def test_the_oldest_files_go_if_nobody_uses_them(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 4)  # two for each set: what tells its rows apart, and the rows
    rows = tmp_path / "cache" / "rows"
    prepared(rows=ROWS[:1])
    left_behind = rows / "interrupted.partial"
    left_behind.mkdir()
    for folder in (*rows.glob("*/"),):
        os.utime(folder, (1, 1))
    for count in (2, 3, 4):
        prepared(rows=ROWS[:count])
    assert len([*rows.glob("*/")]) == 6, "all of today" and not left_behind.exists()
    assert not prepared(rows=ROWS[:2]) and prepared(rows=ROWS[:1])


def test_a_cache_that_cannot_be_written_is_done_without(prepared, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    assert prepared() and prepared()
    assert not [*tmp_path.glob("*.partial")]


def test_rows_are_what_was_stored():
    rows = [
        RenderedRow([1, 2, 2**31 - 1], [IGNORED, 2, 2**31 - 1], 1, False, "é\ud800"),
        RenderedRow([7, 7], [7, 7], 0, True, None),
        RenderedRow([5, 6], [IGNORED, 6], 1, False, "", rejected_ids=[8, 9, 9], good=None),
        RenderedRow([5, 6], [IGNORED, 6], 1, False, " \n", good=False),
    ]
    stored = Rows.of(rows)
    assert list(stored) == rows and list(stored[1:3]) == rows[1:3] and stored[-1] == rows[-1]
    assert list(stored.tokens) == [row.tokens for row in rows] and list(stored.lengths) == [3, 2, 2, 2]
    assert stored.column("supervised").tolist() == [row.supervised_tokens for row in rows]
    assert stored.column("blank").tolist() == [False, False, True, True]
    assert list(stored.good) == rows[:3]
    assert list(stored.select(np.array([3, 0, 3]))) == [rows[3], rows[0], rows[3]]
    assert list(Rows.of([])) == [] and not Rows.of([])
