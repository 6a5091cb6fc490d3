"""`qlora report` and `qlora compare`: what is written, what the terminal shows, and what is refused."""

import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from qlora import cli


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def qlora(*arguments: object) -> tuple[int, str]:
    """Exit code, and what was printed."""
    with redirect_stdout(StringIO()) as printed, redirect_stderr(printed):
        code = cli._exit_code(lambda: cli.qlora.main(list(map(str, arguments)), standalone_mode=False))
    assert "Traceback" not in printed.getvalue()
    return code, printed.getvalue()


def test_report_names_the_file_and_takes_a_directory_a_name_or_a_recipe(write_run, tmp_path, monkeypatch):
    run = write_run(tmp_path / "runs", "mine")
    monkeypatch.chdir(tmp_path)
    for name in (run, "mine", run / "recipe.yaml"):
        code, said = qlora("report", name)
        assert (code, said.count("\n")) == (0, 1) and "mine/report/index.html" in said
        (run / "report" / "index.html").unlink()


def test_text_has_the_same_in_80_columns(write_run, tmp_path):
    run = write_run(tmp_path, hostile=True, failed=True)
    code, said = qlora("report", run, "--text")
    assert code == 0 and not (run / "report").exists()
    assert all(len(line) <= 80 for line in said.splitlines())
    assert "Do not ship it: 3 checks failed" in said
    for found in ("0.0093", "99.77%", "loss 3.000", "29 modules", "damaged", "estimate", "metal trays", "vLLM 1.2"):
        assert found in said, found
    assert "\u202e" not in said, "what a terminal would obey"


def test_text_says_what_is_missing(write_run, tmp_path):
    run = write_run(tmp_path, without=("ladder", "survival", "generations", "contract"))
    said = " ".join(qlora("report", run, "--text")[1].split())
    assert "Not measured" in said and "evaluate.survival: true" in said and "evaluate.generate: true" in said


def test_compare_shows_what_differs_and_only_that(write_run, tmp_path):
    one, other = write_run(tmp_path, "one"), write_run(tmp_path, "other", overrides=("lora.r=64",), quantized_loss=0.7)
    code, said = qlora("compare", one, other)
    lines = [line.split() for line in said.splitlines()]
    assert code == 0
    assert ["lora.r", "16", "64"] in lines and not any(line[:1] == ["lora.alpha"] for line in lines)
    assert ["gptq", "Loss", "0.6120", "0.7000"] in lines and ["Gain", "kept", "99.3%", "94.4%"] in lines
    assert "Versions are the same." in said
    train = next(line for line in said.splitlines() if line.startswith("train "))
    assert train.count("20 s · 2.4 GiB host") == 2


def test_compare_of_runs_measured_on_other_rows_or_not_at_all(write_run, tmp_path):
    one, bare = write_run(tmp_path, "one"), write_run(tmp_path, "bare", without=("ladder",))
    code, said = qlora("compare", one, bare)
    assert code == 0 and ["gptq", "Loss", "0.6120", "–"] in [line.split() for line in said.splitlines()]


def test_what_is_no_run_is_refused(write_run, tmp_path):
    run = write_run(tmp_path)
    (tmp_path / "empty").mkdir()
    code, said = qlora("report", tmp_path / "empty")
    assert code == 2 and "no recipe.yaml and no lineage.json" in said
    code, said = qlora("compare", run, os.fspath(tmp_path / "nowhere"))
    assert code == 2 and "there is no such run" in said
    code, said = qlora("compare", run)
    assert code == 2 and "two runs or more" in said
