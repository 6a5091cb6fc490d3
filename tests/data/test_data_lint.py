"""Lint finds what it says it finds, and its report is JSON."""

import json

import pytest

from qlora.data.lint import Segment, coloured, lint
from qlora.data.preparation import render_rows
from qlora.data.splits import all_rows


@pytest.fixture
def rendered(jsonl_source, data_settings):
    def render(rows, tokenizer, split_name="train", **fields):
        source = jsonl_source(rows, name=f"{split_name}.jsonl")
        return render_rows(all_rows(source), tokenizer, data_settings(**fields), split_name=split_name)

    return render


def chats(*pairs):
    return [{"question": question, "answer": answer} for question, answer in pairs]


def test_clean_data_have_no_findings(rendered, chatml_tokenizer):
    train = rendered(chats(("one", "1"), ("two", "2")), chatml_tokenizer)
    evaluation = rendered(chats(("three", "3")), chatml_tokenizer, "eval")
    report = lint(train, evaluation, chatml_tokenizer)
    assert report.problems == [] and report.warnings == []
    split = report.splits[0]
    assert split.supervised_share == split.supervised_tokens / split.tokens > 0
    assert split.lengths["p50"] <= split.lengths["p100"] == train.statistics.longest
    assert json.loads(json.dumps(report.to_json()))["splits"][1]["name"] == "eval"


def test_overlap_duplicates_empty_answers(rendered, chatml_tokenizer):
    train = rendered(chats(("one", "1"), ("one", "1"), ("two", "")), chatml_tokenizer)
    evaluation = rendered(chats(("one", "1"), ("two", "2"), ("three", "3")), chatml_tokenizer, "eval")
    report = lint(train, evaluation, chatml_tokenizer)
    assert (report.overlap_rows, report.overlap_prompts) == (1, 2)
    assert (report.splits[0].duplicates, report.splits[0].empty_answers) == (1, 1)
    assert report.problems == [] and len(report.warnings) == 3


def test_truncated_and_unsupervised_rows(rendered, chatml_tokenizer):
    train = rendered(chats(("q", "a" * 60), ("long question " * 20, "a")), chatml_tokenizer, max_length=30)
    report = lint(train, None, chatml_tokenizer)
    split = report.splits[0]
    assert (split.truncated, split.unsupervised_rows, split.missing_end) == (2, 1, 0)
    assert "train.jsonl:2" in report.problems[0].where
    assert "2 of 2 rows (100.0%) are cut" in report.warnings[0].what


def test_double_bos(rendered, llama3_tokenizer, tmp_path):
    template = tmp_path / "twice.jinja"
    template.write_text("{{ bos_token }}" + llama3_tokenizer.chat_template)
    train = rendered(chats(("q", "a")), llama3_tokenizer, chat_template=str(template))
    report = lint(train, None, llama3_tokenizer)
    assert report.splits[0].double_bos == 1
    assert "two BOS tokens" in report.problems[0].what


def test_an_end_of_turn_that_is_not_eos(rendered, llama3_tokenizer):
    report = lint(rendered(chats(("q", "a")), llama3_tokenizer), None, llama3_tokenizer)
    assert "answers end with <|eot_id|> (1 rows), and the tokenizer's EOS is <|end_of_text|>" in report.warnings[0].what


def test_template_markers_that_the_tokenizer_does_not_know(rendered, llama3_tokenizer):
    report = lint(rendered(chats(("q", "a")), llama3_tokenizer, chat_template="chatml"), None, llama3_tokenizer)
    assert "markers are ordinary text to this tokenizer: <|im_end|>" in report.warnings[0].what


def test_coloured_segments_spell_the_row(rendered, chatml_tokenizer):
    row = rendered(chats(("q", "a")), chatml_tokenizer).rows[0]
    assert coloured(row, chatml_tokenizer) == [
        Segment("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False),
        Segment("a<|im_end|>", True),
    ]
