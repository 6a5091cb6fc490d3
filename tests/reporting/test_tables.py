"""The ladder on a terminal: every digit is there, however narrow it is."""

import io

import pytest
from rich.console import Console

from qlora.reporting.tables import ladder_table


def rung(name: str, label: str, **figures) -> dict:
    return {"name": name, "label": label, "loss": 2.5, "perplexity": 12.18, "kl": 0.25, "top1": 0.75} | figures


RUNGS = [
    rung("base", "base, 16 bits", exact_match=0.0, metrics={"json_valid": 0.5}, noise={"loss": False},
         intervals={"loss": [2.3, 2.6], "kl": [0.25, 0.25], "exact_match": [0, 0.07], "metrics.json_valid": [0.4, 0.6]},
         general={"perplexity": 20.5, "loss": 3.02}, tasks={"arc": {"acc": {"value": 0.25, "stderr": 0.05}}}),
    rung("trained", "trained, NF4 + LoRA", exact_match=1.0, metrics={"json_valid": 1.0}, general=None,
         intervals={"exact_match": [0.93, 1.0]}),
    rung("gptq", "GPTQ, 4 bits, group 64", exact_match=0.98, metrics={"json_valid": 1.0},
         noise={"exact_match": True, "general.loss": True}, general={"perplexity": 21.5}),
]  # fmt: skip


def shown(rungs: list[dict], width: int | None = None) -> str:
    out = io.StringIO()
    Console(file=out, width=width or 40, soft_wrap=True).print(ladder_table(rungs, 50, 1362, width))
    return out.getvalue()


def test_figures_with_how_far_they_may_be_off():
    lines = shown(RUNGS).splitlines()
    assert lines[0].startswith("The ladder: 50 held-out rows, 1,362 answer tokens")
    assert lines[1].split() == ["general", "arc"]
    assert lines[2].split() == ["model", "loss", "ppl", "KL", "top-1", "exact", "json_valid", "ppl", "acc"]
    base, below, trained, trained_below, gptq, *notes = lines[3:]
    assert base.split()[-8:] == ["2.5000", "12.180", "0.2500", "75.00%", "0%", "50%", "20.500", "0.250"]
    assert below.split() == ["±0.1500", "+7%", "±10%", "±0.098"]
    assert trained_below.split() == ["-7%"] and "—" in trained
    assert "≈98%" in gptq and "≈21.500" in gptq and "≈100%" not in gptq
    assert notes[0].startswith("±") and notes[1].startswith("≈")


@pytest.mark.parametrize("width", [60, 80, 100])
def test_columns_that_find_no_room_go_on_below(width):
    text = shown(RUNGS, width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines()[1:-2])
    for cell in ("12.180", "0.2500", "75.00%", "json_valid", "≈21.500", "±0.098"):
        assert cell in text
    assert text.count("base, 16 bits") == (1 if width == 100 else 2)


def test_what_was_not_measured_has_no_column_and_no_note():
    plain = [rung("base", "base"), rung("gptq", "GPTQ")]
    lines = shown(plain).splitlines()
    assert lines[1].split() == ["model", "loss", "ppl", "KL", "top-1"] and len(lines) == 4
    preferred = [each | {"preferred": 0.75, "margin": 1.5} for each in plain]
    assert shown(preferred).splitlines()[1].split() == ["model", "loss", "KL", "top-1", "preferred", "margin"]
