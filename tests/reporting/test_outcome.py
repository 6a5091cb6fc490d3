"""What users read about a quantized model: nothing that fell short stays silent."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from qlora.data.calibration import CalibrationRow
from qlora.quantization import GPTQSettings, quantize_checkpoint
from qlora.quantization.refine import RefineReport
from qlora.recipe import Quantize
from qlora.reporting.outcome import quantize_notes, quantized_label, summary


def refined(kept: bool) -> dict[str, Any]:
    after = 0.02 if kept else 0.05
    return asdict(RefineReport(kept, 0.041, after, 10, 4000, 7, 2, 100, 10, teacher_seconds=1.0, seconds=2.0))


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a mixture of experts that a single token was not enough for, and whose layers have inputs that stay zero."""
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.model.layers[0].input_layernorm.weight.data[:5] = 0
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    (folder / "gptq").mkdir()
    report = quantize_checkpoint(
        Path(folder / "model"), folder / "gptq", [CalibrationRow((5,))], GPTQSettings(group_size=32), device="cpu"
    )
    return asdict(report) | {"calibration_tokens": report.tokens}


def test_every_kind_of_fallback_has_its_line(metrics: dict[str, Any]) -> None:
    notes = quantize_notes(metrics | {"refine": refined(kept=False)})
    assert all(note.startswith("quantized: ") for note in notes)
    for expected in (
        "modules were rounded: no calibration token reached model.layers.0.block_sparse_moe.experts.",
        "modules saw fewer calibration tokens than they have inputs",
        "15 inputs of 3 modules were zero on every calibration token (model.layers.0.self_attn.q_proj: 5 of 64)",
        "refinement was not kept, and scales are those of GPTQ: KL on 2 held-back rows 0.0410 → 0.0500",
    ):
        assert sum(expected in note for note in notes) == 1, (expected, notes)
    assert len(notes) == 4


def test_nothing_is_said_where_nothing_fell_short(metrics: dict[str, Any]) -> None:
    modules = [module | {"dead_columns": None} for module in metrics["modules"]]  # another engine does not say
    assert quantize_notes({"warnings": [], "modules": modules, "refine": refined(kept=True)}) == []


def test_summary_and_label_say_whether_refinement_was_kept(metrics: dict[str, Any]) -> None:
    plain = f"{2 * (4 + 3 * 4)} layers, 1 calibration tokens"
    assert summary("quantize", metrics) == plain
    assert summary("quantize", metrics | {"refine": refined(kept=True)}) == (
        f"{plain}, KL on held-back rows 0.0410 → 0.0200"
    )
    assert summary("quantize", metrics | {"refine": refined(kept=False)}).endswith("0.0410 → 0.0500, not kept")
    section = Quantize(bits=3, group_size=64)
    assert quantized_label(section, metrics) == "GPTQ, 3 bits, group 64"
    assert quantized_label(section, metrics | {"refine": refined(kept=True)}) == "GPTQ, 3 bits, group 64, refined"
    assert quantized_label(section, metrics | {"refine": refined(kept=False)}) == "GPTQ, 3 bits, group 64"
