"""The parts of the GPTQ benchmarks that decide what a table says."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import gptq
import gptq_quality
from gptq_measure import KeptReference, shared_windows
from gptq_report import Results, summary, table
from random_llama import SHAPES, first_layers, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.errors import UserError


def test_seconds_are_extrapolated_from_the_two_largest_depths():
    assert gptq.extrapolate({2: 100.0, 4: 52.0, 8: 68.0}, 32) == 164
    assert gptq.extrapolate({2: 8.0}, 80) == 320


def test_a_failed_engine_is_a_row_with_its_log():
    row = gptq.outcome({"job": {"engine": "gptqmodel", "model": "/models/a"}, "error": "no", "log": "x.log"})
    assert "failed: no (see x.log)" in gptq.table([row])


def test_the_first_layers_of_a_checkpoint_are_its_own(tmp_path):
    whole = write_checkpoint("tiny", 4, tmp_path / "whole", "cpu")
    part = first_layers(whole, "tiny", 2, tmp_path / "part")
    assert (part / "model-layer-001.safetensors").samefile(whole / "model-layer-001.safetensors")
    models = [AutoModelForCausalLM.from_pretrained(directory) for directory in (whole, part)]
    assert [len(model.model.layers) for model in models] == [4, 2]
    weights = [model.state_dict() for model in models]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    ids = AutoTokenizer.from_pretrained(part)("a row")["input_ids"]
    assert 0 < max(ids) < SHAPES["tiny"]["vocab_size"]


def test_windows_that_two_texts_share_are_counted():
    first, second = list(range(100)), [5, *range(60, 100), 7]
    assert shared_windows([first], [second], width=32) == 40 - 32 + 1
    assert shared_windows([first], [second], width=64) == shared_windows([[1, 2]], [first], width=64) == 0


def test_a_kept_reference_outlives_its_process_and_refuses_other_rows(tmp_path):
    logp_NV = torch.randn(6, 50).log_softmax(-1)
    first = KeptReference(tmp_path, 6, 50)
    first.store(0, logp_NV[:4])
    first.store(4, logp_NV[4:])
    assert not KeptReference(tmp_path, 6, 50).complete
    first.store(0, logp_NV)
    first.finish()
    again = KeptReference(tmp_path, 6, 50)
    assert again.complete and again.top_N.tolist() == logp_NV.argmax(-1).tolist()
    torch.testing.assert_close(again.read(2, 6, torch.device("cpu")), logp_NV[2:], atol=5e-3, rtol=1e-3)
    with pytest.raises(UserError, match="other rows"):
        KeptReference(tmp_path, 7, 50)


def record(name, seed, loss, kl, perplexity=20.0, **more):
    return {"name": name, "seed": seed, "loss": loss, "kl": kl, "top1": 0.9, "perplexity": perplexity} | more


def test_results_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add(record("base", 0, 2.0, 0.5))
    results.add({"name": "ours", "seed": 0, "error": "out of memory", "log": "x"})
    with results.path.open("a") as file:
        file.write('{"name": "merg')
    again = Results(results.path)
    assert again.has(0, "base") and not again.has(0, "ours") and not again.has(1, "base")
    again.add(record("merged", 0, 1.0, 0.0))
    assert [json.loads(line)["name"] for line in results.path.read_text().splitlines()] == ["base", "ours", "merged"]


def test_figures_are_held_against_those_of_the_same_seed():
    form = {"bits": 4, "group_size": 64}
    records = [{"name": "ours", "seed": 0, "error": "first try", "log": "x"}]
    for seed, shift in ((0, 0.0), (1, 1.0)):
        records += [
            record("base", seed, 3.0 + shift, 0.8),
            record("trained", seed, 1.0 + shift, 0.0),
            record("merged", seed, 1.0 + shift, 0.0, perplexity=20.0 + shift),
            record("ours", seed, 1.1 + shift, 0.02, 21.0 + shift, engine="ours", quantize_seconds=3.0, **form),
            record("a", seed, 1.5 + shift, 0.08, engine="gptqmodel", **form),
            record("b", seed, 1.5 + shift, 0.04, engine="llmcompressor", **form),
            record("c", seed, 1.5 + shift, 0.01, engine="gptqmodel", bits=8, group_size=64),
        ]
    rows = {row["name"]: row for row in summary(records)}
    ours = rows["ours"]
    assert ours["seeds"] == [0, 1] and ours["quantize_seconds"]["mean"] == 3.0
    assert ours["kl_share"]["values"] == pytest.approx([0.5, 0.5])  # not of another number of bits
    assert ours["gain_retained"]["mean"] == pytest.approx(0.95)
    assert ours["perplexity_change"]["values"] == pytest.approx([1 / 20, 1 / 21])
    assert ours["loss"]["std"] == pytest.approx(0.5**0.5) and "kl_share" not in rows["a"]
    assert "| ours | 2 | 1.6000 ± 0.7071 |" in table(list(rows.values()))


def test_variants_are_overlaid_and_checked(tmp_path):
    path = tmp_path / "variants.yaml"
    text = "quantize: {bits: 3, calibration: {samples: 8}}\nvariants: {a: {quantize: {calibration: "
    path.write_text(text + '{mix: {from: "${general}", share: 0.5}}}}, b: {engine: gptqmodel}}')
    first, second = gptq_quality.read_variants(path, "/texts/valid.txt", None)
    assert first["quantize"] == {
        "bits": 3,
        "calibration": {"samples": 8, "mix": {"from": "/texts/valid.txt", "share": 0.5}},
    }
    assert (first["engine"], second["engine"], second["quantize"]["bits"]) == ("ours", "gptqmodel", 3)
    with pytest.raises(UserError, match="no variant c"):
        gptq_quality.read_variants(path, "", ["c"])


def test_the_variants_that_come_with_the_script_are_valid():
    path = Path(gptq_quality.__file__).with_suffix(".yaml")
    names = [variant["name"] for variant in gptq_quality.read_variants(path, "/texts/valid.txt", None)]
    for bits in (4, 3, 2):
        assert {f"{engine}-{bits}bit" for engine in ("ours", "gptqmodel", "llmcompressor")} <= set(names)
