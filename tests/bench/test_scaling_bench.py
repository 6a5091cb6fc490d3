"""The benchmark of several processes: what its table says. What they train is in tests/training/test_processes.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import scaling


def test_a_line_compares_with_the_first() -> None:
    one = {"started": 1, "processes": 1, "set": {"train.shard": False}, "tokens_per_second": 1000.0}
    one |= {"allocated": 8.0, "expected": 7.5, "plan": "p"}
    two = one | {"started": 2, "processes": 2, "tokens_per_second": 1900.0}
    assert scaling.line(two, one) == "| 2 | on each | 1,900 | 95% | 8.00 | 7.5 | p |"
    assert scaling.line(two | {"processes": 1}, one) == "| 2 | on each | failed: 1 processes trained |"
    assert scaling.line(two | {"error": "no memory"}, one) == "| 2 | on each | failed: no memory |"
