"""The benchmark of several processes: it trains with as many as it says, and its table says what was measured."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import scaling


def test_a_process_trains_a_random_model_and_the_table_says_so(tmp_path, capsys) -> None:
    """Several are launched alike; tests/training/test_processes.py shows what they train."""
    options = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--shape", "tiny", "--length", "32"]
    options += ["--rows", "1", "--steps", "2", "--processes", "1", "--shard", "off,on", "--device", "cpu"]
    scaling.main(options)
    (row,) = json.loads((tmp_path / "out" / "scaling.json").read_text())["rows"]
    assert "error" not in row, row
    assert row["processes"] == 1 and row["tokens_per_second"] > 0 and len(row["step_seconds"]) == 2
    assert "| 1 | on each |" in capsys.readouterr().out


def test_a_line_compares_with_the_first() -> None:
    one = {"started": 1, "processes": 1, "set": {"train.shard": False}, "tokens_per_second": 1000.0}
    one |= {"allocated": 8.0, "expected": 7.5, "plan": "p"}
    two = one | {"started": 2, "processes": 2, "tokens_per_second": 1900.0}
    assert scaling.line(two, one) == "| 2 | on each | 1,900 | 95% | 8.00 | 7.5 | p |"
    assert scaling.line(two | {"processes": 1}, one) == "| 2 | on each | failed: 1 processes trained |"
    assert scaling.line(two | {"error": "no memory"}, one) == "| 2 | on each | failed: no memory |"
