"""Golden prompts replayed on servers: real ones, in every form of asking, and what goes wrong."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from qlora.artifacts import read_json
from qlora.evaluation.replay import NEAR_TIE, Reply, match
from qlora.models.packed_checkpoint import write_dequantized

sys.path.insert(0, str(Path(__file__).parent))
from model_server import ModelServer


def test_the_contract_has_answers_of_both_models_token_by_token(run_dir):
    contract = read_json(run_dir / "evaluation" / "contract.json")
    assert contract["mismatches"] == [] and len(contract["golden"]) == 3
    for entry in contract["golden"]:
        for rung in ("trained", "gptq"):
            answer = entry[rung]
            assert len(answer["ids"]) == len(answer["ends"]) == len(answer["margins"]) > 2
            assert answer["finished"] and answer["ids"][-1] == 2
            assert answer["ends"][-1] == len(answer["text"]) and min(answer["margins"]) >= 0
        assert entry["messages"][-1]["content"] in entry["prompt"] and entry["prompt_is_exact"]
    assert {each["engine"] for each in contract["engines"]} >= {"vLLM", "AutoGPTQ"}


@pytest.mark.parametrize(
    ("forms", "said"), [(("ids",), "asked in token ids"), (("text", "chat"), "text"), (("chat",), "messages")]
)
def test_a_server_of_this_checkpoint_agrees_in_every_form(run_dir, qlora, forms, said):
    with ModelServer(run_dir / "gptq", forms) as server:
        result = qlora("verify", server.url, run_dir)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "It serves the GPTQ model" in result.stdout and said in result.stdout
    assert result.stdout.count("exact") >= 3


def test_a_server_of_another_model_ends_with_3(run_dir, tiny_model, qlora):
    with ModelServer(tiny_model) as server:
        result = qlora("verify", server.url + "/v1/", run_dir)
    assert result.returncode == 3
    assert "0 of 3 answers are those of the GPTQ model" in result.stderr and "chat template" in result.stderr


def test_a_server_of_the_merged_model_is_compared_with_the_trained_one(run_dir, qlora):
    with ModelServer(run_dir / "merged") as server:
        result = qlora("verify", server.url, run_dir, "--against", "trained")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "It serves the trained model" in result.stdout


def test_a_key_is_sent_and_never_shown(run_dir, qlora, monkeypatch):
    key = "sk-not-to-be-seen"
    with ModelServer(run_dir / "gptq", key=key) as server:
        refused = qlora("verify", server.url, run_dir)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        accepted = qlora("verify", server.url, run_dir)
    assert refused.returncode == 2 and "OPENAI_API_KEY" in refused.stderr
    assert accepted.returncode == 0, accepted.stderr
    assert key not in refused.stdout + refused.stderr + accepted.stdout + accepted.stderr


def test_what_cannot_be_asked_says_what_to_do(run_dir, qlora, tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        result = qlora("verify", f"http://127.0.0.1:{nobody.getsockname()[1]}", run_dir)
    assert result.returncode == 2 and "cannot be reached" in result.stderr and "start it" in result.stderr
    with ModelServer(run_dir / "gptq", names=("one", "two"), delay=1.0) as server:
        result = qlora("verify", server.url, run_dir)
        assert result.returncode == 2 and "one, two" in result.stderr and "--model" in result.stderr
        result = qlora("verify", server.url, run_dir, "--model", "one", "--timeout", 0.2)
        assert result.returncode == 2 and "--timeout" in result.stderr
    with ModelServer(run_dir / "gptq", forms=()) as server:
        result = qlora("verify", server.url, run_dir)
        assert result.returncode == 2 and "in no form" in result.stderr and "not in this form" in result.stderr
    assert qlora("verify", "http://127.0.0.1:1").returncode == 2
    assert "contract.json" in qlora("verify", "http://127.0.0.1:1", tmp_path).stderr


GOLDEN = {
    "ids": [5, 6, 7, 2],
    "text": "one two six",
    "finished": True,
    "ends": [3, 7, 11, 11],
    "margins": [4.0, NEAR_TIE / 2, 4.0, 3.0],
}


@pytest.mark.parametrize(
    ("reply", "agreed", "judged", "at"),
    [
        (Reply("one two six"), 4, 4, None),
        (Reply("one two six", [5, 6, 7, 2]), 4, 4, None),
        (Reply("one two six", [5, 6, 7]), 4, 4, None),
        (Reply("one ten six"), 1, 1, 1),  # a near tie: what follows is not judged
        (Reply("six"), 0, 4, 0),
        (Reply("one two", [5, 6, 2]), 2, 4, 2),  # it stopped too early
        (Reply("one two six nine"), 3, 4, 3),  # it ran on
        (Reply("one two six nine", [5, 6, 7, 9]), 3, 4, 3),
        (Reply("one two six\n", strips=True), 4, 4, None),
        (Reply(""), 0, 4, 0),
    ],
)
def test_answers_are_compared_up_to_the_first_token_that_differs(reply, agreed, judged, at):
    found = match(GOLDEN, reply)
    assert (found.agreed, found.judged, found.at) == (agreed, judged, at)


def test_an_answer_that_was_cut_may_go_on():
    golden = GOLDEN | {"finished": False, "ids": [5, 6, 7], "ends": [3, 7, 11], "margins": [4.0, 4.0, 4.0]}
    assert match(golden, Reply("one two six")).exact and match(golden, Reply("one two six\ufffd")).exact
    assert not match(golden, Reply("one two")).exact


@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="needs uvicorn, fastapi and openai")
def test_transformers_serve_agrees(run_dir, qlora, warm_python, tmp_path):
    """A real server of this kind, on the checkpoint's numbers as plain weights: no kernel of GPTQ is needed."""
    (tmp_path / "served").mkdir()
    write_dequantized(run_dir / "gptq", tmp_path / "served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [warm_python, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "served")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "log")
        result = qlora("verify", f"http://127.0.0.1:{port}", run_dir, "--model", tmp_path / "served")
    finally:
        process.terminate()
        process.wait()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "asked in text" in result.stdout and "3 of 3 answers are those of the GPTQ model" in result.stdout


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    while True:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.2)
