"""Folders to give away: whole, loadable, without a path of this machine; and files that changed are named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from qlora.artifacts import read_json, write_json


@pytest.fixture(scope="module")
def exported(run_dir, qlora, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("export") / "facts"
    assert str(run_dir.parent) in (run_dir / "report" / "index.html").read_text()
    result = qlora("export", run_dir, "--to", target)
    assert result.returncode == 0, result.stderr
    return target


def test_an_export_has_everything_and_names_nothing_of_this_machine(exported, run_dir, tiny_model, facts_file):
    assert {path.name for path in exported.iterdir()} == {
        "adapter", "merged", "gptq", "report", "README.md", "MANIFEST.json", "contract.json", "ladder.json",
        "survival.json", "recipe.yaml", "lineage.json",
    }  # fmt: skip
    private = [str(path) for path in (run_dir.parent, tiny_model.parent, facts_file.parent, Path.home())]
    for path in exported.rglob("*"):
        if path.is_file():
            assert not [text for text in private if f"{text}/".encode() in path.read_bytes()], path
    recipe = yaml.safe_load((exported / "recipe.yaml").read_text())
    assert recipe["data"]["train"][0]["path"] == facts_file.name and recipe["model"]["base"] == tiny_model.name
    assert "publish" not in recipe
    files = read_json(exported / "MANIFEST.json")["files"]
    assert files["gptq/model.safetensors"]["sha256"] in json.dumps(read_json(run_dir / "lineage.json"))


def test_weights_are_links_and_load(exported, run_dir):
    from qlora.models.loading import load_gptq

    weights = exported / "gptq" / "model.safetensors"
    assert weights.samefile(run_dir / "gptq" / "model.safetensors")
    assert load_gptq(exported / "gptq", torch.bfloat16).num_parameters() > 0


def test_cards_are_in_the_hubs_format_and_say_what_matters(exported):
    from huggingface_hub import ModelCard

    for kind in ("gptq", "merged", "adapter"):
        card = ModelCard.load(exported / kind / "README.md")
        assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-generation"
        assert card.data.base_model is None  # a folder on this machine, which is no model on the Hub
        for part in (
            "GPTQ, 4 bits, group 32",
            "Verdict: **ship**",
            "8 rows with",
            "## Limits",
            "Fingerprints",
            "top1 0.5",
        ):
            assert part in card.text, part
    text = (exported / "gptq" / "README.md").read_text()
    assert "sglang.launch_server" in text and "from_pretrained" in text and "qlora verify http" in text
    assert "PeftModel.from_pretrained" in (exported / "adapter" / "README.md").read_text()
    assert "`gptq/`" in (exported / "README.md").read_text()


def test_verify_names_every_file_that_differs_is_missing_or_was_added(exported, qlora, tmp_path):
    assert qlora("verify", exported).returncode == 0
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "ladder.json").unlink()
    (copy / "gptq" / "extra.py").write_text("print()")
    card = copy / "README.md"
    card.write_text(card.read_text().replace("A", "B", 1))
    (copy / "gptq" / "config.json").write_text("{}")
    result = qlora("verify", copy)
    assert result.returncode == 3
    for text in (
        "ladder.json: is missing",
        "gptq/extra.py: was added",
        "README.md: has other bytes",
        "gptq/config.json",
    ):
        assert text in result.stderr


def test_verify_of_a_run_compares_with_its_lineage(run_dir, qlora, tmp_path):
    assert "whole" in qlora("verify", run_dir).stdout
    copy = tmp_path / "facts"
    shutil.copytree(run_dir, copy)
    (copy / "adapter" / "base.json").write_text("{}")
    result = qlora("verify", copy)
    assert result.returncode == 3 and "adapter/base.json" in result.stderr
    assert qlora("verify", tmp_path).returncode == 2


def test_what_a_run_has_not_is_refused_and_nothing_is_written(run_dir, qlora, tmp_path, exported):
    target = tmp_path / "target"
    result = qlora("export", run_dir, "--to", target, "--what", "gptq,gguf")
    assert result.returncode == 2 and "gguf" in result.stderr
    copy = tmp_path / "facts"
    shutil.copytree(run_dir, copy)
    lineage = read_json(copy / "lineage.json")
    del lineage["stages"]["quantize"]
    write_json(copy / "lineage.json", lineage)
    result = qlora("export", copy, "--to", target)
    assert result.returncode == 2 and "qlora quantize RECIPE" in result.stderr and not target.exists()
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    result = qlora("export", run_dir, "--to", target)
    assert result.returncode == 2 and (target / "mine.txt").is_file()
    assert qlora("export", run_dir, "--to", tmp_path / "part", "--what", "gptq").returncode == 0
    assert not (tmp_path / "part" / "adapter").exists()
    assert qlora("export", run_dir, "--to", tmp_path / "part", "--what", "adapter").returncode == 0
    assert not (tmp_path / "part" / "gptq").exists()


def test_a_mismatch_of_tokens_is_in_the_verdict_and_first_in_the_card(run_dir, qlora, tmp_path):
    copy = tmp_path / "facts"
    shutil.copytree(run_dir, copy)
    contract = read_json(copy / "evaluation" / "contract.json")
    contract["mismatches"] = ["the EOS token of gptq/ is 1, training used 2"]
    write_json(copy / "evaluation" / "contract.json", contract)
    lineage = read_json(copy / "lineage.json")
    from qlora.artifacts import manifest

    lineage["stages"]["evaluate"]["outputs"] = manifest(copy / "evaluation")
    write_json(copy / "lineage.json", lineage)
    assert qlora("export", copy, "--to", tmp_path / "out").returncode == 0
    text = (tmp_path / "out" / "gptq" / "README.md").read_text()
    assert "did not pass its own checks" in text and "the EOS token of gptq/ is 1" in text
