"""PiSSA: what is left of the weights is the same wherever it is computed, and the merge is exact on it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file

from qlora import rungs as ladder
from qlora.artifacts import read_json
from qlora.check import check
from qlora.errors import UserError
from qlora.merging import merge_adapter
from qlora.models.adapter_beginning import begin, take_parts
from qlora.models.checkpoint import CheckpointReader
from qlora.models.loading import attach_adapter, load_base, load_plain, load_trained
from qlora.models.principal import FILE, on_grid, principal_part
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe
from qlora.stages import Run

IDS = torch.arange(48).reshape(2, 24) * 7 % 500


def part_of(weight_NK, rank=8, scaling=0.7, dtype=torch.float32):
    outputs, inputs = weight_NK.shape
    fresh = torch.ones(rank, inputs, dtype=dtype), torch.zeros(outputs, rank, dtype=dtype)
    return principal_part(weight_NK.float(), *fresh, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 8, 100])
def test_the_product_is_exact_in_whatever_order_it_is_summed(rank, dtype):
    """So that a GPU's kernels and a CPU's come to the same bits."""
    generator = torch.Generator().manual_seed(0)
    part = part_of(torch.randn(96, 160, generator=generator) * 3e-2, rank, dtype=dtype)
    up_NR, down_RK = part.up_NR.double(), part.down_RK.double()
    together, one_by_one = up_NR @ down_RK, torch.zeros(96, 160, dtype=torch.float64)
    for r in torch.randperm(rank, generator=generator).tolist():
        one_by_one += up_NR[:, r : r + 1] * down_RK[r]
    assert torch.equal(together, one_by_one)
    for matrix in (part.up_NR, part.down_RK):
        assert torch.equal(on_grid(matrix, rank).to(dtype), matrix)


def test_it_is_the_principal_part_whatever_the_rank(tiny_model):
    reader = CheckpointReader(tiny_model)
    weight_NK = reader.read("model.layers.0.mlp.down_proj.weight")
    sizes = torch.linalg.svdvals(weight_NK.double())
    for rank in (1, 16, 100):  # of 64
        part = part_of(weight_NK, rank)
        left = part.rest(weight_NK, torch.float32, "cpu")
        best = sizes[rank:].square().sum().sqrt()
        assert left.norm() <= 1.02 * best + 1e-5 * weight_NK.norm()
        whole = left.double() + part.scaling * part.up_NR.double() @ part.down_RK.double()
        torch.testing.assert_close(whole, weight_NK.double(), rtol=0, atol=1e-7)


def test_rows_of_what_is_left_are_those_of_the_whole():
    weight_NK = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    part = part_of(weight_NK)
    whole = part.rest(weight_NK, torch.bfloat16, "cpu")
    rows = slice(64, 192)
    assert torch.equal(part.of_rows(rows).rest(weight_NK[rows], torch.bfloat16, "cpu"), whole[rows])


def loaded(path, tmp_path, *overrides):
    """A model as training begins with it, and the base that it is made of."""
    recipe = load_recipe(path, ("lora.init=pissa", *overrides))
    base = load_base(recipe.model.base, recipe.model, "cpu", quantized=True)
    model = attach_adapter(base, recipe.lora)
    begin(model, recipe.lora, recipe.model.base, take_parts(model, recipe.lora, recipe.model.base, tmp_path))
    return model, recipe


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_are_those_that_loading_makes_of_what_is_left(tiny_recipe, tmp_path, quant_type, double_quant):
    settings = f"model.quantization={quant_type}", f"model.double_quant={double_quant}"
    model, recipe = loaded(tiny_recipe(), tmp_path, *settings)
    left = shutil.copytree(recipe.model.base, tmp_path / "left")
    tensors = load_file(left / "model.safetensors")
    parts = load_file(tmp_path / FILE)
    for name in [name.removesuffix(".scaling") for name in parts if name.endswith(".scaling")]:
        taken = parts[f"{name}.scaling"] * (parts[f"{name}.B"].double() @ parts[f"{name}.A"].double())
        tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].double() - taken).float().bfloat16()
    save_file(tensors, left / "model.safetensors", {"format": "pt"})
    expected = load_base(left, recipe.model, "cpu", quantized=True)
    layers = 0
    for name, layer in expected.named_modules():
        if isinstance(layer, Linear4bit):
            found = model.get_base_model().get_submodule(name).get_base_layer().weight
            assert torch.equal(found.data, layer.weight.data)
            states = found.quant_state.as_dict(), layer.weight.quant_state.as_dict()
            assert states[0].keys() == states[1].keys()
            tensors = {key: value for key, value in states[1].items() if torch.is_tensor(value)}
            assert len(tensors) >= 2
            assert all(torch.equal(states[0][key].flatten(), value.flatten()) for key, value in tensors.items())
            layers += 1
    assert layers == 14


def test_it_begins_nearer_to_the_16_bit_model_than_its_quantized_base(tiny_recipe, tmp_path):
    model, recipe = loaded(tiny_recipe(), tmp_path, "lora.r=32", "lora.alpha=8")
    exact, quantized = (
        load_base(recipe.model.base, recipe.model, "cpu", quantized=each).eval() for each in (False, True)
    )
    with torch.no_grad():
        logits, nf4, pissa = (each(IDS).logits.float() for each in (exact, quantized, model.eval()))
    assert (pissa - logits).norm() < 0.7 * (nf4 - logits).norm()


SETTINGS = {
    "nf4": ["lora.rslora=true", "lora.rank_pattern={q_proj: 4}", "lora.modules_to_save=[norm]"],
    "fp4": ["model.quantization=fp4", "model.double_quant=false", "lora.dtype=bfloat16"],
    "none": ["model.quantization=none"],
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_merge_is_the_trained_model(tiny_recipe, tmp_path, kind):
    overrides = ["lora.init=pissa", *SETTINGS[kind], "merge.dtype=float32", f"output_dir={tmp_path}"]
    recipe = load_recipe(tiny_recipe(), [*overrides, "train.max_steps=3"])
    Pipeline(recipe).run_stage("train")
    Pipeline(recipe).run_stage("merge")
    run, base = recipe.run_dir, Path(recipe.model.base)
    about = read_json(run / "adapter" / "base.json")
    assert about["beginning"] and (run / "adapter" / FILE).is_file()
    assert read_json(run / "adapter" / "adapter_config.json")["init_lora_weights"] == "pissa"
    trained = load_trained(load_base(base, recipe.model, "cpu", quantized=True), run / "adapter", base)
    merged = load_file(run / "merged" / "model.safetensors")
    beginning = load_file(run / "adapter" / FILE)
    weights = load_file(base / "model.safetensors")
    (tmp_path / "original").mkdir()
    merge_adapter(base, run / "adapter", tmp_path / "original", base="original", dtype=torch.float32)
    original = load_file(tmp_path / "original" / "model.safetensors")
    layers = 0
    for name, layer in trained.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        held = layer.get_base_layer()
        eye = torch.eye(held.in_features, dtype=torch.bfloat16)
        update = layer.scaling["default"] * (
            layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        began = beginning[f"{name}.scaling"] * (beginning[f"{name}.B"].double() @ beginning[f"{name}.A"].double())
        assert (update - began).norm() > 1e-3 * began.norm()  # it has learned
        expected = (held(eye).T.float().double() + update).float()
        assert torch.equal(merged[f"{name}.weight"], expected)
        plain = weights[f"{name}.weight"].double() - began + update
        torch.testing.assert_close(original[f"{name}.weight"].double(), plain, rtol=0, atol=1e-6)
        layers += 1
    assert layers == 14
    with torch.no_grad():
        left = trained(IDS).logits.float().log_softmax(-1)
        right = load_plain(run / "merged")(IDS).logits.float().log_softmax(-1)
    assert (left.exp() * (left - right)).sum(-1).mean() < 1e-3


def test_a_whole_run_straight_from_the_adapter_and_what_its_ladder_compares(tiny_recipe, tmp_path):
    """GPTQ of what is merged when it is read; the ladder's base is the quantized base, not what is left of it."""
    recipe = load_recipe(tiny_recipe(), ["lora.init=pissa", "merge.write=false", f"output_dir={tmp_path}"])
    Pipeline(recipe).run()
    rungs = {rung["name"]: rung for rung in read_json(recipe.run_dir / "evaluation" / "ladder.json")["rungs"]}
    assert rungs["trained"]["loss"] < rungs["nf4"]["loss"] and rungs["gptq"]["kl"] < 0.2
    started = Run(recipe)
    models = ladder.rungs(started, started.eval_rows.rows)
    loaded = {model.name: model.load() for model in models if model.name in ("nf4", "trained")}
    base = load_base(recipe.model.base, recipe.model, "cpu", quantized=True)
    for name, layer in base.named_modules():
        if isinstance(layer, Linear4bit):
            assert torch.equal(loaded["nf4"].get_submodule(name).weight, layer.weight)
            held = loaded["trained"].get_base_model().get_submodule(name).get_base_layer()
            assert not torch.equal(held.weight, layer.weight)


def test_training_that_was_interrupted_ends_with_the_same_adapter(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe(), ["lora.init=pissa", f"output_dir={tmp_path}"])
    Pipeline(recipe).run_stage("train")
    adapter = recipe.run_dir / "adapter"
    names = ("adapter_model.safetensors", FILE, "base.json")
    before = {name: (adapter / name).read_bytes() for name in names}
    shutil.rmtree(adapter)
    shutil.rmtree(recipe.run_dir / "checkpoints" / "checkpoint-6")
    assert (recipe.run_dir / "checkpoints" / "checkpoint-4").is_dir()
    again = Pipeline(recipe)
    again.run_stage("train")
    assert again.lineage.metrics("train")["resumed_from"] == "checkpoint-4"
    assert {name: (adapter / name).read_bytes() for name in names} == before


@pytest.fixture
def adapter(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe(), ["lora.init=pissa", "train.max_steps=1", f"output_dir={tmp_path}/trained"])
    Pipeline(recipe).run_stage("train")
    return recipe.run_dir / "adapter"


def test_an_adapter_with_a_base_of_its_own_is_not_another_ones(adapter, tiny_recipe, tmp_path):
    for key, message in {
        f"lora.start_from={adapter}": "a base of its own",
        f"lora.combine=[{{path: {adapter}}}]": "a base of its own",
    }.items():
        recipe = load_recipe(tiny_recipe(), [key, f"output_dir={tmp_path}/again"])
        assert any(message in problem.what for problem in check(recipe).problems)
        with pytest.raises(UserError, match=message):
            Pipeline(recipe).run_stage("train")


def test_a_merge_without_its_beginning_is_refused(adapter, tiny_model, tmp_path):
    output = tmp_path / "merged"
    output.mkdir()
    options = {"base": "dequantized", "dtype": torch.float32}
    kept, config = adapter / FILE, adapter / "adapter_config.json"
    tensors = load_file(kept)
    name = next(name for name in tensors if name.endswith(".A"))
    save_file(tensors | {name: tensors[name] * 2}, kept)
    with pytest.raises(UserError, match="not the beginning that base.json tells of"):
        merge_adapter(tiny_model, adapter, output, **options)
    kept.unlink()
    with pytest.raises(UserError, match="init_lora_weights: pissa"):
        merge_adapter(tiny_model, adapter, output, **options)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": True}))
    with pytest.raises(UserError, match="missing"):
        merge_adapter(tiny_model, adapter, output, **options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.dora=true"], "DoRA"),
        (["lora.start_from=somewhere"], "how a new adapter begins"),
        (["lora.combine=[{path: somewhere}]"], "how a new adapter begins"),
        (["train.method=dpo"], "compares with the base"),
        (["train.method=kto"], "compares with the base"),
    ],
    ids=["dora", "start_from", "combine", "dpo", "kto"],
)
def test_what_cannot_begin_so_is_refused(tiny_recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(tiny_recipe(), ("lora.init=pissa", *overrides))


def test_layers_that_it_cannot_take_apart_are_named_by_check(tiny_recipe):
    report = check(load_recipe(tiny_recipe(), ("lora.init=pissa", "lora.target_modules=[q_proj, embed_tokens]")))
    assert any("embed_tokens is not a linear layer" in problem.what for problem in report.problems), report.problems
