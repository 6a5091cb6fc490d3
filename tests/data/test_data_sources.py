"""Reading rows: every file kind gives the same rows, and every mistake names its file and line."""

import json
import os
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from qlora.data.index import read_index
from qlora.data.sources import BadRows, is_local, load_texts, located, open_rows, source_digest
from qlora.errors import Problem, UserError

ROWS = [{"prompt": "a", "completion": "b\nc"}, {"prompt": 'ü, "x"', "completion": "d"}]


def rows_of(source):
    return [row.content for row in open_rows(source)]


def places_of(source):
    rows = open_rows(source)
    return [rows.where(row.file, row.place) for row in rows]


def read_all(source):
    """Raises for bad rows, as reading an index does."""
    rows, bad, total = open_rows(source), BadRows(), 0
    for row in rows:
        total += 1
        if isinstance(row.content, Problem):
            bad.add(located(row.content, rows.where(row.file, row.place)))
    bad.raise_any(total)
    return total


@pytest.fixture
def files(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.csv").write_text('\ufeffprompt,completion\na,"b\nc"\n"ü, ""x""",d\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "lines.json", "rows.csv", "rows.parquet"])
def test_every_kind_of_file_gives_the_same_rows(files, make_source, name):
    source = make_source(files / name)
    assert rows_of(source) == ROWS == rows_of(source)
    assert name in places_of(source)[1]
    shares = [row.share for row in open_rows(source)]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] <= 1


def test_blank_lines_do_not_shift_line_numbers(files, make_source):
    assert places_of(make_source(files / "rows.jsonl"))[1].endswith("rows.jsonl:3")


def test_max_rows_keeps_the_first(files, make_source):
    assert rows_of(make_source(files / "rows.csv", max_rows=1)) == ROWS[:1]


def test_malformed_lines_are_all_counted_and_the_first_shown(tmp_path, make_source):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "ok"}\n' + '{"text": \n' * 7 + "[1]\n")
    with pytest.raises(UserError) as caught:
        read_all(make_source(path))
    message = str(caught.value)
    assert f"{path}:2: not valid JSON" in message
    assert f"{path}:6" in message and f"{path}:7" not in message
    assert "3 more: 8 of 9 rows" in message


def test_other_malformed_files(tmp_path, make_source):
    cases = {
        "list.json": (b'[{"text": "a"},]', "list.json:1: not valid JSON"),
        "item.json": (b'[{"text": "a"}, 3]', "item.json, row 1: a row must be a JSON object"),
        "short.csv": (b"prompt,completion\na,b\nc\n", "short.csv:3: not as many fields"),
        "quote.csv": (b'prompt,completion\na,"b\n', "quote.csv:2: not valid CSV"),
        "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), "latin.jsonl:1: not UTF-8"),
        "fake.parquet": (b"hello", "not a Parquet file"),
        "empty.jsonl": (b"\n", "there are no rows"),
        "empty.csv": (b"prompt,completion\n", "there are no rows"),
        "notes.docx": (b"", "cannot read .docx"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_all(make_source(tmp_path / name))


def test_a_missing_file_suggests_its_neighbours(files, make_source):
    with pytest.raises(UserError, match=r"Did you mean .*lines\.json"):
        read_all(make_source(files / "linse.json"))
    with pytest.raises(UserError, match="the folder .*nowhere is missing"):
        read_all(make_source(files / "nowhere" / "deep" / "rows.json"))


def test_a_folder_gives_the_files_of_its_split_only(tmp_path, make_source):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [row["text"] for row in rows_of(make_source(tmp_path))] == ["train-0.jsonl", "train-1.jsonl"]
    assert [row["text"] for row in rows_of(make_source(tmp_path, split="test"))] == ["test.jsonl"]
    with pytest.raises(UserError, match="no file for the split `validation`"):
        read_all(make_source(tmp_path, split="validation"))


def test_a_folder_of_unnamed_shards_is_read_whole(tmp_path, make_source):
    for name in ("part-0.jsonl", "part-1.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert len(rows_of(make_source(tmp_path))) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data file"):
        read_all(make_source(tmp_path / "empty"))


def test_local_paths_and_hub_ids_are_told_apart():
    assert is_local("/data/rows.jsonl") and is_local("rows.jsonl") and is_local("./folder/of/files")
    assert not is_local("HuggingFaceH4/ultrachat_200k") and not is_local("gsm8k")


def test_the_digest_follows_content_and_not_the_file(files, make_source):
    source = make_source(files / "rows.jsonl")
    before = source_digest(source)
    (files / "rows.jsonl").touch()
    assert source_digest(source) == before
    with (files / "rows.jsonl").open("a") as stream:
        stream.write("{}\n")
    assert source_digest(source) != before


def test_a_hub_digest_of_a_pinned_commit_needs_no_network(make_source):
    digests = {source_digest(make_source("owner/name", revision=commit * 40)) for commit in "ab"}
    assert len(digests) == 2


def test_texts_come_in_paragraphs_or_rows(tmp_path, jsonl_source):
    (tmp_path / "general.txt").write_text("one\nline two\n\n \nthree\n")
    assert load_texts(str(tmp_path / "general.txt")) == ["one\nline two", "three\n"]
    assert load_texts(jsonl_source([{"text": "a"}, {"text": "b"}]).path) == ["a", "b"]
    with pytest.raises(UserError, match="jsonl:2: no text in a column `text`"):
        load_texts(jsonl_source([{"text": "a"}, {"body": "b"}]).path)
    with pytest.raises(UserError, match=r"Did you mean general\.txt"):
        load_texts(str(tmp_path / "generel.txt"))


def test_a_hub_data_set_out_of_reach():
    program = (
        "from qlora.data.sources import open_rows\n"
        "from qlora.errors import UserError\n"
        "from qlora.recipe import Source\n"
        "try:\n"
        "    open_rows(Source(path='nobody/no-such-data'))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "hub data set nobody/no-such-data [train]: cannot be read from the hub" in result.stdout, result.stderr


def test_a_data_set_saved_to_disk(tmp_path, make_source):
    rows = [{"text": f"row {number}"} for number in range(4)]
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(rows[:3]), test=datasets.Dataset.from_list(rows[3:]))
    splits.save_to_disk(tmp_path / "both")
    splits["train"].save_to_disk(tmp_path / "one")
    for source in (make_source(tmp_path / "both"), make_source(tmp_path / "one")):
        assert rows_of(source) == rows[:3] and places_of(source)[1].endswith(", row 1")
        assert rows_of(source.model_copy(update={"max_rows": 2})) == rows[:2]
    assert rows_of(make_source(tmp_path / "both", split="test")) == rows[3:]
    with pytest.raises(UserError, match=r"no split `dev` \(found: test, train\)"):
        read_all(make_source(tmp_path / "both", split="dev"))
    same = source_digest(make_source(tmp_path / "both")), source_digest(make_source(tmp_path / "both", split="test"))
    assert same[0] != same[1] and source_digest(make_source(tmp_path / "both")) == same[0]


@pytest.fixture
def hub_layout(tmp_path, monkeypatch):
    """A data set as a repository of the hub has it, with two configurations, where `load_dataset` finds it offline."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for name in ("main-train", "main-test", "other-train"):
        rows = [{"question": f"{name} {number}", "answer": "a"} for number in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = {"main": ("train", "test"), "other": ("train",)}
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}-{split}.jsonl\n" for split in splits)
        for config, splits in parts.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return "owner/name"


@pytest.mark.parametrize("stream", [False, True])
def test_configurations_and_splits_of_the_hub_downloaded_or_streamed(hub_layout, make_source, stream):
    def questions(**fields):
        source = make_source(hub_layout, revision="a" * 40, stream=stream, **fields)
        assert [row.place for row in open_rows(source)] == list(range(len(rows_of(source))))
        assert len(read_index(source)) == len(rows_of(source))
        return [row["question"] for row in rows_of(source)]

    assert questions(config="main") == [f"main-train {number}" for number in range(6)]
    assert questions(config="main", split="test", max_rows=2) == ["main-test 0", "main-test 1"]
    assert questions(config="other")[0] == "other-train 0"
    with pytest.raises(UserError, match=r"hub data set owner/name \(none\) \[train\]: cannot be read from the hub"):
        questions(config="none")


def test_what_cannot_be_streamed(files, make_source):
    with pytest.raises(ValueError, match="set revision to a commit"):
        make_source("owner/name", stream=True)
    with pytest.raises(ValueError, match="set revision to a commit"):
        make_source("owner/name", stream=True, revision="main")
    with pytest.raises(UserError, match="local rows are always read as they are needed"):
        open_rows(make_source(files / "rows.jsonl", stream=True, revision="a" * 40))
