"""Training that goes on from an adapter, and B that learns faster than A."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from qlora.check import check
from qlora.errors import UserError
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe


def trained(path, output, *overrides):
    """Directory of the adapter, and its tensors."""
    recipe = load_recipe(path, (f"output_dir={output}", *overrides))
    Pipeline(recipe).run_stage("train")
    directory = recipe.run_dir / "adapter"
    return directory, load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("extra", [(), ("lora.dora=true", "lora.rank_pattern={q_proj: 4}")], ids=["plain", "dora"])
def test_training_goes_on_where_the_adapter_is(tiny_recipe, tmp_path, extra):
    path = tiny_recipe()
    first, there = trained(path, tmp_path / "first", *extra)
    still = ("train.max_steps=1", "train.learning_rate=1e-12")
    _, again = trained(path, tmp_path / "second", f"lora.start_from={first}", *still, *extra)
    _, fresh = trained(path, tmp_path / "fresh", *still, *extra)
    assert there.keys() == again.keys()
    for name, tensor in there.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-9)
    assert any((fresh[name] - tensor).abs().max() > 1e-3 for name, tensor in there.items())


def test_its_weights_decide_whether_training_is_done_again_and_not_its_place(tiny_recipe, tmp_path):
    path = tiny_recipe()
    first, _ = trained(path, tmp_path / "first")
    moved = shutil.copytree(first, tmp_path / "moved")
    directory, _ = trained(path, tmp_path / "second", f"lora.start_from={first}")
    written = (directory / "adapter_model.safetensors").stat().st_mtime_ns
    trained(path, tmp_path / "second", f"lora.start_from={moved}")
    assert (directory / "adapter_model.safetensors").stat().st_mtime_ns == written
    other, _ = trained(path, tmp_path / "other", "seed=5")
    trained(path, tmp_path / "second", f"lora.start_from={other}")
    assert (directory / "adapter_model.safetensors").stat().st_mtime_ns != written


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.r=4"], r"another lora\.r 4 \(there 8\)"),
        (["lora.alpha=8", "lora.rslora=true"], r"lora\.alpha 8\.0 \(there 16\.0\), lora\.rslora True"),
        (["lora.target_modules=[q_proj]"], "are not those of lora.target_modules"),
        (["model.quantization=fp4"], "trained on other weights"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_adapter_that_does_not_fit_is_refused(tiny_recipe, tmp_path, overrides, message):
    path = tiny_recipe()
    first, _ = trained(path, tmp_path / "first", "train.max_steps=1")
    with pytest.raises(UserError, match=message):
        trained(path, tmp_path / "second", f"lora.start_from={first}", *overrides)


def test_check_says_so_before_anything_is_trained(tiny_recipe, tmp_path):
    path = tiny_recipe()
    first, _ = trained(path, tmp_path / "first", "train.max_steps=1")
    assert not check(load_recipe(path, [f"lora.start_from={first}"])).problems
    wrong = check(load_recipe(path, [f"lora.start_from={first}", "lora.target_modules=[q_proj]"]))
    assert any("lora.target_modules" in problem.what for problem in wrong.problems)
    nowhere = check(load_recipe(path, [f"lora.start_from={tmp_path / 'nowhere'}"]))
    assert any("there is no adapter_config.json" in problem.what for problem in nowhere.problems)


def test_an_adapter_of_peft_needs_no_provenance(tiny_recipe, tmp_path):
    path = tiny_recipe()
    first, _ = trained(path, tmp_path / "first", "train.max_steps=1")
    (first / "base.json").unlink()
    config = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": None}))
    trained(path, tmp_path / "second", f"lora.start_from={first}", "train.max_steps=1")


def test_b_learns_as_many_times_faster_as_the_recipe_says(tiny_recipe, tmp_path):
    """Adam's first step is as large as the learning rate, and B begins at zero."""
    path, one = tiny_recipe(), ("train.max_steps=1", "train.scheduler=constant", "train.learning_rate=1e-4")
    _, plain = trained(path, tmp_path / "plain", *one)
    _, faster = trained(path, tmp_path / "faster", *one, "train.loraplus_ratio=16")
    assert any("lora_B" in name for name in plain)
    for name, tensor in plain.items():
        torch.testing.assert_close(faster[name], tensor * (16 if "lora_B" in name else 1), rtol=1e-5, atol=1e-9)
