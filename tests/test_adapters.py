"""Every way to adapt, from a recipe through the stages of train and merge: the same logits before and after."""

from pathlib import Path

import pytest
import torch

from qlora.check import check
from qlora.errors import UserError
from qlora.models.loading import load_base, load_plain, load_trained
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe

SETTINGS = {
    "plain": [],
    "rslora": ["lora.rslora=true", "lora.init=gaussian"],
    "dora": ["lora.dora=true", "lora.bias=all"],
    "patterns": ["lora.rank_pattern={q_proj: 2, 'layers.1.mlp.(up|down)_proj': 12}", "lora.alpha_pattern={k_proj: 40}"],
    "loraplus": ["train.loraplus_ratio=8", "lora.dropout=0.1", "lora.target_modules=[q_proj, v_proj]"],
    "loftq": ["lora.init=loftq"],
    "modules_to_save": ["lora.modules_to_save=[norm, lm_head]"],
    "pissa": ["lora.init=pissa", "lora.train_tokens=['<|im_start|>']"],
    "16 bits": ["model.quantization=none", "lora.dora=true", "lora.new_tokens=[<a>]"],
    "start_from": ["lora.start_from={plain}"],
    "combine": ["lora.combine=[{{path: {plain}, weight: 0.5}}, {{path: {rslora}, weight: -1}}]"],
}


@pytest.fixture(scope="module")
def adapters():
    """Directories of adapters that other tests here have trained."""
    return {}


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_logits_are_those_of_training(tiny_recipe, tiny_model, tmp_path, adapters, name):
    model = {"base": str(tiny_model), "compute_dtype": "float32"}
    path = tiny_recipe(model=model, merge={"dtype": "float32"}, output_dir=str(tmp_path), train={"max_steps": 3})

    def merged(setting: str):
        overrides = SETTINGS[setting]
        for other in ("plain", "rslora"):
            if any(f"{{{other}}}" in each for each in overrides) and other not in adapters:
                merged(other)
        filled = [each.format(**adapters) if setting in ("start_from", "combine") else each for each in overrides]
        recipe = load_recipe(path, [*filled, f"name={setting.replace(' ', '-')}"])
        for stage in ("train", "merge"):
            Pipeline(recipe).run_stage(stage)
        adapters[setting] = recipe.run_dir / "adapter"
        return recipe

    recipe, base = merged(name), Path(tiny_model)
    ids = torch.arange(48).reshape(2, 24) * 7 % 460
    trained = load_trained(load_base(base, recipe.model, "cpu", quantized=True), recipe.run_dir / "adapter", base)
    with torch.no_grad():
        logits, found = trained(ids).logits, load_plain(recipe.run_dir / "merged", torch.float32)(ids).logits
        before = load_base(base, recipe.model, "cpu", quantized=True)(ids).logits
    assert (logits[..., : before.shape[-1]] - before).abs().max() > 0.1, "it must have learned something to keep"
    assert (found - logits).abs().max() < 2e-5 * logits.abs().max().clamp(min=1)


def test_an_adapter_of_the_head_is_refused_before_it_would_learn_nothing(tiny_recipe):
    recipe = load_recipe(tiny_recipe(), ["lora.target_modules=[q_proj, lm_head]"])
    assert any("output head" in problem.what for problem in check(recipe).problems)
    with pytest.raises(UserError, match="output head"):
        Pipeline(recipe).run_stage("train")
