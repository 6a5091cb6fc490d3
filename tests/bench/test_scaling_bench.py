"""The benchmark of several processes: it trains with as many as it says, and its table says what was measured."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import scaling


def test_two_processes_share_the_base_of_a_random_model(tmp_path, warm_python, capsys) -> None:
    options = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--shape", "tiny", "--length", "32"]
    options += ["--rows", "1", "--steps", "2", "--processes", "1,2", "--shard", "on", "--device", "cpu"]
    scaling.main(options)
    (row,) = json.loads((tmp_path / "out" / "scaling.json").read_text())["rows"]
    assert "error" not in row, row
    assert row["processes"] == 2 and row["tokens_per_second"] > 0 and len(row["step_seconds"]) == 2
    assert "the base shared by 2 processes" in row["plan"]
    assert "| 2 | one for all |" in capsys.readouterr().out


def test_a_line_compares_with_the_first() -> None:
    one = {"started": 1, "processes": 1, "set": {"train.shard": False}, "tokens_per_second": 1000.0}
    one |= {"allocated": 8.0, "expected": 7.5, "plan": "p"}
    two = one | {"started": 2, "processes": 2, "tokens_per_second": 1900.0}
    assert scaling.line(two, one) == "| 2 | on each | 1,900 | 95% | 8.00 | 7.5 | p |"
    assert scaling.line(two | {"processes": 1}, one) == "| 2 | on each | failed: 1 processes trained |"
    assert scaling.line(two | {"error": "no memory"}, one) == "| 2 | on each | failed: no memory |"
