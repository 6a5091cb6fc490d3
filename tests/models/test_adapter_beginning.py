"""How an adapter begins, and that its base, and so its merge, does not depend on it."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from qlora.artifacts import read_json
from qlora.errors import UserError
from qlora.models.adapter_beginning import begin
from qlora.models.loading import attach_adapter, load_base
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe


def begun(path, *overrides):
    recipe = load_recipe(path, overrides)
    base = load_base(recipe.model.base, recipe.model, "cpu", quantized=True)
    model = attach_adapter(base, recipe.lora)
    begin(model, recipe.lora, recipe.model.base)
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_loftq_is_the_best_that_its_rank_can_make_up_for(tiny_recipe, rank):
    path = tiny_recipe()
    layers = begun(path, "lora.init=loftq", f"lora.r={rank}", "lora.rslora=true")
    weights = load_file(f"{load_recipe(path).model.base}/model.safetensors")
    assert len(layers) == 14
    for name, layer in layers.items():
        base = layer.get_base_layer()
        assert isinstance(base, Linear4bit)
        lost = weights[f"{name}.weight"].double() - base(torch.eye(base.in_features, dtype=torch.bfloat16)).T.double()
        update = (
            layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        best = torch.linalg.svdvals(lost)[rank:].square().sum().sqrt()
        assert (lost - update).norm() <= 1.02 * best + 1e-5 * lost.norm()


def test_it_begins_nearer_to_the_16_bit_model_and_merges_as_exactly(tiny_recipe, tmp_path):
    ladders = {}
    for init in ("default", "loftq"):
        path = tiny_recipe(lora={"init": init, "r": 16}, evaluate={"gates": {"merge_kl": 0.005}})
        still = ("train.max_steps=1", "train.learning_rate=1e-12", f"name={init}", f"output_dir={tmp_path}")
        Pipeline(load_recipe(path, still)).run()
        rungs = read_json(tmp_path / init / "evaluation" / "ladder.json")["rungs"]
        ladders[init] = {rung["name"]: rung for rung in rungs}
    # KL is to the trained model, so that of the 16-bit base says how far it is from it.
    assert ladders["loftq"]["base"]["kl"] < 0.8 * ladders["default"]["base"]["kl"]
    bases = [read_json(tmp_path / init / "adapter" / "base.json")["digest"] for init in ladders]
    assert bases[0] == bases[1]


def test_gaussian_is_pefts_and_begins_with_no_update(tiny_recipe):
    fresh = [begun(tiny_recipe(), f"lora.init={init}", "lora.r=8") for init in ("default", "gaussian")]
    for name, layer in fresh[1].items():
        down_RK, up_NR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert not up_NR.any() and float(down_RK.std()) == pytest.approx(1 / 8, rel=0.3)
        assert float(fresh[0][name].lora_A["default"].weight.std()) != pytest.approx(1 / 8, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=none"], "makes up for quantization"),
        (["lora.dora=true"], "DoRA"),
        (["lora.start_from=somewhere"], "how a new adapter begins"),
        (["train.method=dpo"], "compares with the base"),
    ],
    ids=["nothing to make up for", "dora", "start_from", "dpo"],
)
def test_what_cannot_begin_so_is_refused(tiny_recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(tiny_recipe(), ("lora.init=loftq", *overrides))
