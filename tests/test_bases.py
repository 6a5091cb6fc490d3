"""Bases other than NF4 through the whole pipeline: LLM.int8, a checkpoint's own codes, linears left in 16 bits."""

import json
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, Qwen3MoeConfig

from qlora.artifacts import read_json
from qlora.check import check
from qlora.errors import UserError
from qlora.models.frozen import eight_bit_codes
from qlora.models.held import mixture_notes, training_shapes
from qlora.models.loading import attach_adapter, load_base
from qlora.models.provenance import decompressed_absmax
from qlora.models.shapes import skeleton
from qlora.models.training_memory import base_bytes
from qlora.pipeline import Pipeline
from qlora.recipe import Recipe
from qlora.recipe_file import load_recipe
from qlora.stages import Run, merge


def run(path, *overrides):
    recipe = load_recipe(path, overrides)
    report = check(recipe)
    assert report.problems == [], report.problems
    Pipeline(recipe).run()
    ladder = read_json(recipe.run_dir / "evaluation" / "ladder.json")
    return recipe.run_dir, {rung["name"]: rung for rung in ladder["rungs"]}, report


def test_int8_with_skipped_modules_goes_through_all_stages_and_merges_exactly(tiny_recipe, capsys, supported):
    run_dir, rungs, report = run(
        tiny_recipe(),
        "model.quantization=int8",
        "model.int8_threshold=5",
        r"model.skip_modules=['layers\.0\.mlp', 'v_proj$']",
        "evaluate.gates.merge_kl=1.0e-9",  # would not be met in bf16, and does not apply
    )
    assert list(rungs) == ["base", "nf4", "trained", "merged", "gptq"]
    assert rungs["nf4"]["label"] == "base, INT8" and rungs["trained"]["label"] == "trained, INT8 + LoRA"
    assert rungs["trained"]["loss"] < rungs["base"]["loss"] and rungs["merged"]["kl"] < 2e-3
    assert rungs["gptq"]["kl"] < rungs["base"]["kl"]
    written = read_json(run_dir / "adapter" / "base.json")
    assert (written["settings"]["quant_type"], written["settings"]["int8_threshold"]) == ("int8", 5.0)
    skipped = [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]
    skipped += [f"model.layers.{index}.self_attn.v_proj" for index in (0, 1)]
    assert written["unquantized"] == sorted(["lm_head", *skipped]) and len(written["quantized"]) == 14 - 5
    assert "the gate merge_kl did not apply" in " ".join(capsys.readouterr().out.split())
    assert report.base.quantized_parameters == sum(
        codes["shape"][0] * codes["shape"][1] for codes in written["quantized"].values()
    )
    supported(run_dir)


@pytest.mark.parametrize(("method", "desc_act"), [("gptq", True), ("awq", False)], ids=["gptq", "awq"])
def test_a_checkpoints_own_codes_go_through_all_stages_and_merge_exactly(
    tiny_recipe, save_packed, method, desc_act, tmp_path, monkeypatch, supported
):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))  # where a number will be changed
    base = save_packed(method, 4, desc_act)
    path = tiny_recipe(model={"base": str(base), "quantization": "checkpoint"}, evaluate={"gates": {"merge_kl": 2e-3}})
    run_dir, rungs, report = run(path)
    assert list(rungs) == ["base", "trained", "merged", "gptq"], "training begins with the base itself"
    assert rungs["trained"]["label"] == f"trained, {method.upper()} + LoRA"
    assert rungs["trained"]["loss"] < rungs["base"]["loss"]
    written = read_json(run_dir / "adapter" / "base.json")
    assert written["settings"]["quant_type"] == "checkpoint" and len(written["quantized"]) == 14
    supported(run_dir)
    assert any("its own codes" in warning.what for warning in report.warnings)
    logs = "".join(file.read_text() for file in (run_dir / "logs").iterdir())
    assert "14 linears stay packed as in the checkpoint, dequantized for each product by torch" in logs
    (converted,) = (tmp_path / "cache" / "models").glob("[!.]*")
    # One weight of the base that is another number: the merge says which.
    tensors = load_file(converted / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    tensors[f"{name}.weight"][3, 5] += 0.5
    save_file(tensors, converted / "model.safetensors", {"format": "pt"})
    shutil.rmtree(run_dir / "merged")
    with pytest.raises(UserError, match=f"{name}: weights differ from those the adapter was trained on"):
        partial = run_dir / "again"
        partial.mkdir()
        merge(Run(load_recipe(path)), "", partial, lambda *_: None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"quantization": "checkpoint"}, "trains on the codes of a GPTQ or AWQ base, and .* is neither"),
        ({"skip_modules": ["no_such_linear"]}, "no linear that training would quantize has such a name"),
        ({"skip_modules": ["lm_head"]}, "the output head stays in 16 bits anyway"),
        ({"skip_modules": ["_proj"]}, "every linear is skipped"),
        ({"skip_modules": ["("]}, "not a regular expression"),
    ],
    ids=str,
)
def test_what_the_base_cannot_be_is_refused_by_check_and_before_training(tiny_recipe, tmp_path, model, message):
    recipe = load_recipe(tiny_recipe(model=model))
    with pytest.raises(UserError, match=message):
        check(recipe).raise_for_problems()
    with pytest.raises(UserError, match=message):
        Pipeline(recipe).run()
    assert not (tmp_path / "runs" / "tiny" / "adapter").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.int8_threshold=4"], "int8_threshold is of quantization: int8"),
        (["model.quantization=none", "model.skip_modules=[q_proj]"], "skip_modules is of nf4, fp4 and int8"),
        (["model.quantization=checkpoint", "model.skip_modules=[q_proj]"], "skip_modules is of nf4, fp4 and int8"),
        (["model.quantization=int8", "model.compute_dtype=float8"], "4-bit or packed codes"),
        (["model.quantization=int8", "lora.init=loftq"], "loftq makes up for quantization to 4 bits"),
        (["model.quantization=int8", "lora.dora=true"], "loses the scales of 8-bit layers"),
        (["model.cpu_offload=true"], "PEFT puts it on the meta device"),
        (["model.load_in_8bit=true"], "use quantization: int8"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused_with_the_reason(tiny_recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(tiny_recipe(), overrides)


BASIC = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BASIC |= {"num_key_value_heads": 2, "intermediate_size": 128}
MIXTURES = {
    "mixtral": lambda: MixtralConfig(**BASIC, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **BASIC, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}


def recipe_of(**model):
    return Recipe.model_validate(
        {"name": "t", "model": {"base": "b"} | model, "data": {"train": [{"path": "x"}]}, "lora": {"r": 4}}
    )


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_of_a_mixture_it_is_stated_what_is_quantized_and_the_formula_counts_it(kind, quantization, tmp_path):
    config = MIXTURES[kind]()
    recipe = recipe_of(quantization=quantization)
    bare = skeleton(config)
    shapes = training_shapes(bare, recipe.model, tmp_path)
    attach_adapter(bare, recipe.lora)
    (note,) = mixture_notes(bare, recipe, shapes)
    type(skeleton(config))(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    loaded = load_base(tmp_path / "base", recipe.model, "cpu", quantized=True)
    held = sum(parameter.nbytes for parameter in loaded.parameters())
    for module in loaded.modules():
        state = getattr(module.weight, "quant_state", None) if hasattr(module, "weight") else None
        if isinstance(module, Linear8bitLt):
            held += eight_bit_codes(module)[1].nbytes
        elif state is not None:
            blocks = decompressed_absmax(state).numel()
            held += blocks + 4 * -(-blocks // 256)
    # Of small layers, not even one block of second-level scales is full.
    assert base_bytes(recipe, shapes) == pytest.approx(held, rel=1e-3)
    experts = sum(each.nbytes for name, each in loaded.named_parameters() if each.ndim == 3)
    assert shapes.experts * 2 == experts > held / 2
    mib = f"{experts / 2**20:.1f} MiB"
    assert f"(mlp.experts.down_proj, mlp.experts.gate_up_proj) in 16 bits ({mib}" in note.what
    assert "without an adapter" in note.what and f"its linears in {quantization}" in note.what
    assert "an adapter is on k_proj, o_proj, q_proj, v_proj" in note.what
    assert mixture_notes(skeleton(MixtralConfig(**BASIC, num_local_experts=4)), recipe_of(quantization="none"), shapes)


def test_a_mixtures_packed_experts_are_refused(tmp_path):
    MIXTURES["mixtral"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="one packed linear each in the checkpoint"):
        training_shapes(skeleton(MIXTURES["mixtral"]()), recipe_of(quantization="checkpoint").model, tmp_path)
