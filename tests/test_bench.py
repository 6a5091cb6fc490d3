"""`qlora bench`: what it measures, what it keeps, and what one model's failure does to the others."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from qlora.cli import main
from qlora.errors import UserError
from qlora.evaluation import bench as benches
from qlora.evaluation.bench_models import Subject, load, subjects
from qlora.evaluation.bench_process import measure
from qlora.reporting.bench_tables import bench_table, markdown, notes, titles, with_speedups


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["qlora", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command_measures_each_model_and_keeps_what_it_has(tiny_model, warm_python, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(tiny_model / "config.json", broken)
    out = tmp_path / "out"
    options = [
        "--batch",
        "1,3",
        "--prompt",
        "8",
        "--new",
        "5",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--as",
        "16bit",
    ]
    assert run(monkeypatch, tiny_model, broken, *options, "--out", out) == 0
    rows = json.loads((out / "bench.json").read_text())["rows"]
    good, bad = rows[:2], rows[2:]
    assert [row["batch"] for row in rows] == [1, 3, 1, 3]
    for row in good:
        assert "error" not in row, row
        assert row["load_seconds"] > 0 and row["prefill_seconds"] > 0 and row["weights_bytes"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["step_seconds"])
        assert row["peak_bytes"] > 2**20 and row["graph"] is False
    assert all(row["error"].startswith("loading: OSError: ") for row in bad)
    said = capsys.readouterr().out
    assert "8 tokens of prompt, 5 new" in said and "broken: 16 bits, failed: loading: OSError" in said
    assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert "| broken: 16 bits |" in (out / "bench.md").read_text()

    plan = benches.Plan((1, 3), (8,), 5, "float32", "cpu")
    again = benches.bench([Subject(str(tiny_model), "16bit")], plan, out / "bench.json")
    assert again == good  # no process was started: times would be others
    assert json.loads((out / "bench.json").read_text())["rows"] == rows


def test_an_empty_config_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").touch()
    assert run(monkeypatch, tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith("This cannot be measured") and f"{tmp_path}/config.json:1: not valid JSON" in said
    assert "copy the checkpoint again" in said


def test_what_was_measured_before_ctrl_c_is_kept(tiny_model, warm_python, tmp_path):
    def measured() -> bool:
        with suppress(FileNotFoundError):  # a folder that goes while it is looked at
            for rows in Path(tempfile.gettempdir()).glob("*/rows.jsonl"):
                if str(tiny_model) in rows.with_name("job.json").read_text() and '"row"' in rows.read_text():
                    return True
        return False

    out = tmp_path / "out"
    options = ["--as", "16bit", "--batch", "1,64,128", "--prompt", "8,64", "--new", "150", "--device", "cpu"]
    command = [warm_python, "-m", "qlora", "bench", str(tiny_model), *options, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not measured():
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert "the same command continues" in process.communicate()[1] and process.returncode == 130
    kept = json.loads((out / "bench.json").read_text())["rows"]
    assert 1 <= len(kept) < 6 and all(row["tokens_per_second"] > 0 for row in kept)
    assert not measured(), "nothing is left behind"


def test_a_folder_that_cannot_be_made_is_named(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert run(monkeypatch, tiny_model, "--device", "cpu", "--out", tmp_path / "file" / "out") == 2
    assert f"{tmp_path}/file/out: cannot be a folder: Not a directory" in capsys.readouterr().err


def test_a_process_that_takes_too_long_is_stopped(tiny_model, tmp_path):
    plan = benches.Plan((1, 2), (8,), 2, "float32", "cpu", timeout=0.1)
    rows = benches.bench([Subject(str(tiny_model), "16bit")], plan, tmp_path / "bench.json")
    assert [row["error"] for row in rows] == ["loading: stopped after 0 s: "] * 2


def test_what_a_process_said_last_is_said_once(tmp_path):
    (tmp_path / "log").write_text("loading\n" + "inputs will be cast\n" * 50 + "\n  out of   memory\n")
    assert benches._last_words(tmp_path / "log") == "loading inputs will be cast out of memory"


def test_a_table_names_the_versions_that_it_was_measured_with():
    old = {"machine": "NVIDIA H200", "versions": {"torch": "2.11.0", "bitsandbytes": "0.50.2"}}
    new = old | {"versions": {"torch": "2.13.0"}}
    assert benches.machine_of([{"error": "loading"}, old, old]) == "NVIDIA H200, torch 2.11.0, bitsandbytes 0.50.2"
    assert benches.machine_of([old, new]) == "NVIDIA H200, torch 2.11.0 and 2.13.0, bitsandbytes 0.50.2"
    assert benches.machine_of([{"error": "loading"}]) == "nothing was loaded"


def test_what_a_process_died_at_is_one_rows_error():
    pairs = [(1, 8), (2, 8), (3, 8)]
    loaded, first = {"loaded": {"load_seconds": 1.0}}, {"row": {"batch": 1, "prompt": 8, "tokens_per_second": 5.0}}
    begun = [{"begun": {"batch": batch, "prompt": prompt}} for batch, prompt in pairs]

    def rows(lines, words="exit code -9: killed"):
        return [(row["batch"], row.get("error")) for row in benches.rows_of({"form": "nf4"}, pairs, lines, words)]

    assert rows([loaded, begun[0], first, begun[1]]) == [(1, None), (2, "exit code -9: killed")]
    assert rows([loaded]) == [(1, "exit code -9: killed")]  # between loading and the first
    failed = {"row": {"batch": 2, "prompt": 8, "error": "CUDA error"}}
    assert rows([loaded, begun[0], first, begun[1], failed]) == [(1, None), (2, "CUDA error")]  # it said so, and ended
    assert rows([{"load_error": "no file"}]) == [(batch, "loading: no file") for batch in (1, 2, 3)]
    assert rows([]) == [(batch, "loading: exit code -9: killed") for batch in (1, 2, 3)]
    assert rows([loaded, begun[0], first], None) == [(1, None)]


@pytest.mark.parametrize(("form", "kernel"), [("nf4", None), ("int8", None), ("gptq", "qlora"), ("awq", "qlora")])
def test_every_form_is_measured(form, kernel, tiny_model, save_packed):
    directory = tiny_model if kernel is None else save_packed(form)
    loaded = load(Subject(str(directory), form, kernel), "bfloat16", "cpu")
    row = measure(loaded.model, 2, 6, 4, loaded.eager_because)
    assert row["tokens_per_second"] > 0 and row["eager_because"] is None


def test_forms_and_kernels_of_directories(tiny_model, save_packed):
    gptq, awq = save_packed("gptq"), save_packed("awq")
    every = ("16bit", "nf4", "gptq", "awq")
    found = [
        (each.form, each.kernel) for each in subjects([tiny_model, gptq, awq], every, ["qlora", "marlin"], "cuda:0")
    ]
    assert found[:2] == [("16bit", None), ("nf4", None)]
    assert found[2:] == [("gptq", "qlora"), ("gptq", "marlin"), ("awq", "qlora"), ("awq", "marlin")]
    with_gptqmodel = importlib.util.find_spec("gptqmodel") is not None
    chosen = [each.kernel for each in subjects([gptq, awq], every, ["auto"], "cpu")]
    assert chosen == (["qlora", "torch"] if with_gptqmodel else ["qlora"]) * 2
    chosen = [each.kernel for each in subjects([awq], every, ["auto"], "cuda:0")]
    assert chosen == (["qlora", "marlin", "exllamav2"] if with_gptqmodel else ["qlora"])


def test_all_that_is_wrong_is_said_at_once(tiny_model, save_packed, tmp_path, monkeypatch, capsys):
    adapter, awkward = tmp_path / "adapter", tmp_path / "fp8"
    for folder, name, text in (
        (adapter, "adapter_config.json", "{}"),
        (awkward, "config.json", '{"quantization_config": {"quant_method": "fp8"}}'),
    ):
        folder.mkdir()
        (folder / name).write_text(text)
    with pytest.raises(UserError) as error:
        subjects([adapter, awkward, save_packed("gptq")], ["nf4"], ["auto"], "cpu")
    assert [problem.what for problem in error.value.problems] == [
        "an adapter is no model of its own",
        "quantized with fp8",
        "a GPTQ checkpoint has none of the forms nf4",
    ]
    with pytest.raises(UserError, match="AWQ has none of the kernels triton"):
        subjects([save_packed("gptq"), save_packed("awq")], ["gptq", "awq"], ["triton"], "cuda:0")
    assert run(monkeypatch, tiny_model, "--as", "fp3", "--kernel", "warp", "--device", "cpu") == 2
    said = capsys.readouterr().err
    assert "no form fp3" in said and "no kernel warp" in said
    assert run(monkeypatch, tiny_model, "--batch", "1,x", "--device", "cpu") == 2
    assert run(monkeypatch, tmp_path / "none", "--device", "cpu") == 2


def rows() -> list[dict]:
    found = []
    for form, kernel, label, step in (("nf4", None, "bitsandbytes NF4", 0.01), ("gptq", "qlora", "GPTQ, qlora", 0.004)):
        for batch in (1, 8):
            head = {"directory": f"/models/{form}", "model": form, "form": form, "kernel": kernel, "label": label}
            head |= {"dtype": "bfloat16", "device": "cuda:0", "new": 16, "batch": batch, "prompt": 128}
            head |= {"load_seconds": 3.0, "weights_bytes": 4 * 2**30, "peak_bytes": 5 * 2**30, "graph": True}
            head |= {"prefill_seconds": 0.02, "step_seconds": step, "tokens_per_second": batch / step}
            found.append(head | {"eager_because": None})
    found[1] = found[1] | {"graph": False, "eager_because": "a reason"}
    found[3] = {key: found[3][key] for key in ("directory", "model", "form", "kernel", "label", "dtype", "new")}
    found[3] |= {"batch": 8, "prompt": 128, "error": "OutOfMemoryError: a | b"}
    return found


def test_tables_say_how_much_faster_and_what_failed():
    assert with_speedups(rows())[2]["speedup"] == pytest.approx(2.5)
    assert bench_table(rows(), 128).row_count == 4
    narrow = Console(width=80, record=True, file=StringIO())
    narrow.print(bench_table(rows(), 128))
    drawn = narrow.export_text()
    assert "…" not in drawn and "tokens/s" in drawn and re.search(r"^ +8 .* eager *$", drawn, re.MULTILINE)
    assert "eager" not in markdown([row | {"device": "cpu"} for row in rows()[:1]], "a machine")
    text = markdown(rows(), "a machine")
    assert "| GPTQ, qlora | 3.0 | 4.00 | 1 | 20.0 | 4.00 | 250 | 5.00 | 2.50 |  |" in text
    assert "| failed |" in text and "- GPTQ, qlora, failed: OutOfMemoryError: a / b" in text
    assert notes(rows()) == [
        "bitsandbytes NF4, eager: a reason",
        "GPTQ, qlora, failed: OutOfMemoryError: a | b",
    ]
    assert list(titles(rows()).values()) == ["bitsandbytes NF4", "GPTQ, qlora"]
