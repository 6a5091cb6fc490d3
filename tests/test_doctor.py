"""Known-bad pairs by version, the requirements of the package itself, and a diagnosis of this very machine."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from packaging.specifiers import SpecifierSet
from rich.console import Console

from qlora.doctor import (
    BAD_PAIRS,
    PACKAGES,
    bad_pairs,
    diagnose,
    installed_versions,
    print_diagnosis,
    unmet_requirements,
)
from qlora.errors import Problem, UserError

GOOD = {
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
    "gptqmodel": "7.6.0",
    "numpy": "2.2.6",
    "trl": "1.16.0",
    "datasets": "4.8.5",
    "bitsandbytes": "0.50.2",
}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gptqmodel": "7.7.0"}, "gptqmodel 7.7.0 with torch 2.13.0+cpu"),
        ({"gptqmodel": "7.7.0", "torch": "2.14.1", "transformers": "5.17.0"}, "7.7.0 with transformers 5.17.0"),
        ({"numpy": "2.4.6"}, "gptqmodel 7.6.0 with numpy 2.4.6"),
        ({"gptqmodel": "4.2.5"}, "gptqmodel 4.2.5 with transformers 5.23.0"),
        ({"auto-gptq": "0.7.1"}, "auto-gptq 0.7.1 with transformers 5.23.0"),
        ({"autoawq": "0.2.9"}, "autoawq 0.2.9 with transformers 5.23.0"),
        ({"bitsandbytes": "0.45.5"}, "bitsandbytes 0.45.5 with torch"),
        ({"datasets": "4.6.0"}, "trl 1.16.0 with datasets 4.6.0"),
        ({"vllm": "0.33.0", "torch": "2.14.0", "compressed-tensors": "0.19.0"}, "vllm 0.33.0 with compressed-tensors"),
        ({"llmcompressor": "0.14.0.1", "compressed-tensors": "0.17.0"}, "llmcompressor 0.14.0.1 with"),
    ],
)
def test_bad_pairs_are_found_by_name(changed: dict[str, str], named: str) -> None:
    assert not bad_pairs(GOOD)
    problems = bad_pairs(GOOD | changed)
    assert any(named in problem.what for problem in problems), problems
    assert all(problem.fix for problem in problems)


def test_a_pair_needs_both_packages() -> None:
    assert not bad_pairs({"gptqmodel": "7.7.0"})
    assert not bad_pairs({"auto-gptq": "0.7.1", "transformers": "4.46.3"})


def test_pairs_name_packages_that_are_looked_up() -> None:
    for pair in BAD_PAIRS:
        assert {pair.package, pair.other} <= set(PACKAGES)
        SpecifierSet(pair.versions)
        SpecifierSet(pair.other_versions)


def test_requirements_of_the_package_are_read_from_its_metadata() -> None:
    assert unmet_requirements({}) == [Problem("qlora is not installed, only importable", fix="pip install -e .")]


@pytest.mark.skipif("qlora" not in installed_versions(), reason="qlora runs from a checkout that is not installed")
def test_this_environment_meets_them() -> None:
    assert unmet_requirements(installed_versions()) == []


def test_this_machine_is_diagnosed() -> None:
    report = diagnose()
    assert report.kernels["bitsandbytes 4-bit on cpu"] == "works"
    assert report.versions["torch"] and report.cpu_cores > 0
    assert all(free > 0 for free in report.free_disk.values())
    json.dumps(report.to_dict())

    text = io.StringIO()
    print_diagnosis(replace(report, problems=[]), Console(file=text, width=200))
    assert "bitsandbytes" in text.getvalue() and "No known problem" in text.getvalue()
    bad = Problem("a 1 with b 2: reason", fix="do that")
    with pytest.raises(UserError) as raised:
        print_diagnosis(replace(report, problems=[bad]), Console(file=io.StringIO()))
    assert raised.value.exit_code == 2 and raised.value.problems == [bad]
