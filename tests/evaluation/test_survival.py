"""Adapter survival and damage: figures against dense arithmetic, and what a user sees of a damaged checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora import cli
from qlora.artifacts import Lineage, manifest, read_json
from qlora.evaluation.survival import survival
from qlora.measuring import SurvivalOfRun
from qlora.models.checkpoint import overwrite_tensors
from qlora.models.gptq_format import GPTQTensors, dequantize
from qlora.models.loading import load_for_training, load_trained
from qlora.models.packed_checkpoint import PackedLinears
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe
from qlora.stages import Run, computed_source, merged_source, quantize_source


def command(capsys, *arguments: object) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    code = cli._exit_code(lambda: cli.qlora.main([str(each) for each in arguments], standalone_mode=False))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def scales_of(run_dir: Path, layer: int) -> dict[str, torch.Tensor]:
    tensors = load_file(run_dir / "gptq" / "model.safetensors")
    return {name: each for name, each in tensors.items() if f".{layer}." in name and name.endswith(".scales")}


def record_again(run_dir: Path) -> None:
    """Have lineage.json take the checkpoint for the one that was written, as if the writer itself had damaged it."""
    lineage = Lineage(run_dir / "lineage.json")
    lineage.record("quantize", lineage.stages["quantize"] | {"outputs": manifest(run_dir / "gptq")})


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_recipe) -> Path:
    """The recipe of a run that is trained and merged."""
    path = write_recipe(tmp_path_factory.mktemp("survival") / "tiny.yaml", lora={"r": 4, "alpha": 8})
    for stage in ("train", "merge"):
        Pipeline(load_recipe(path)).run_stage(stage)
    return path


@pytest.fixture
def finished(trained, tmp_path) -> Path:
    """A copy of the run of `trained`, with all stages; the recipe is its own."""
    recipe = load_recipe(trained)
    shutil.copytree(recipe.run_dir, tmp_path / "runs" / "tiny")
    path = tmp_path / "tiny.yaml"
    path.write_text(trained.read_text().replace(recipe.output_dir, str(tmp_path / "runs")), encoding="utf-8")
    Pipeline(load_recipe(path)).run()
    return path


@torch.no_grad()
def test_figures_are_those_of_dense_arithmetic(finished):
    run = Run(load_recipe(finished))
    content = read_json(run.dirs.evaluation / "survival.json")
    assert len(content["modules"]) == 14 and len(content["worst"]) == 5 and content["damaged"] == []
    found = {module["name"]: module for module in content["modules"]}
    name = "model.layers.1.mlp.down_proj"
    assert (found[name]["layer"], found[name]["kind"]) == (1, "down_proj")

    adapted = load_trained(load_for_training(run.base, run.recipe.model, "cpu"), run.dirs.adapter, run.base.directory)
    layer = adapted.get_base_model().get_submodule(name)
    base = layer.base_layer(torch.eye(128, dtype=torch.bfloat16)).float().T  # NF4, dequantized to bf16
    update = layer.get_delta_weight("default").float()
    tensors = load_file(run.dirs.gptq / "model.safetensors")
    packed = GPTQTensors(*(tensors[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx")))
    quantized = dequantize(packed, 4)
    moved = quantized - base
    assert found[name]["cosine"] == pytest.approx(
        ((moved * update).sum() / (moved.norm() * update.norm())).item(), rel=1e-3
    )
    assert found[name]["energy"] == pytest.approx(((moved * update).sum() / update.square().sum()).item(), rel=1e-3)
    merged = base + update
    assert found[name]["weight_error"] == pytest.approx(((quantized - merged).norm() / merged.norm()).item(), rel=1e-3)
    steps = packed.scales.float().T.repeat_interleave(32, dim=1)
    codes = [(weight / steps).round().clamp(-8, 7) for weight in (merged, base)]
    assert found[name]["codes_changed"] == pytest.approx((codes[0] != codes[1]).float().mean().item(), abs=1e-3)

    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    error = power = 0.0
    for row in run.held_out_rows:
        adapted(input_ids=torch.tensor([row.input_ids]))
        x, y = (each.float().flatten(0, -2) for each in seen.pop())
        error += (x @ quantized.T - y).square().sum()
        power += y.square().sum()
    assert found[name]["output_error"] == pytest.approx(
        (error / power).sqrt().item(), rel=0.02
    )  # padded rows round otherwise
    loss = {m["name"]: m["relative_loss"] for m in Lineage(run.dirs.lineage).metrics("quantize")["modules"]}
    assert found[name]["expected_error"] == pytest.approx(loss[name] ** 0.5)
    weights = {module["name"]: module["parameters"] for module in content["modules"]}
    mean = sum(found[each]["energy"] * weights[each] for each in found) / sum(weights.values())
    assert content["overall"]["energy"] == pytest.approx(mean) and 0.7 < mean < 1.3
    assert content["worst"][0] == max(found, key=lambda each: found[each]["output_error"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_number_of_bits_looks_damaged_and_doubled_scales_do(trained, bits, tmp_path):
    refine = "quantize.refine={steps: 4, tokens_per_step: 128, learning_rate: 0.02}"
    for settings in (["quantize.group_size=-1", "quantize.sym=false"], [refine]):
        run = Run(load_recipe(trained, [f"quantize.bits={bits}", *settings]))
        output = tmp_path / "gptq"
        output.mkdir()
        quantize_source(run, merged_source(run), output, lambda *_: None)
        source = computed_source(run, "dequantized", run.dirs.merged, "cpu")
        modules, damaged = survival(PackedLinears(output), source, {}, {}, "cpu", lambda *_: None)
        assert len(modules) == 14 and damaged == []
        name = "model.layers.0.self_attn.q_proj"
        scales = load_file(output / "model.safetensors")[f"{name}.scales"]
        overwrite_tensors(output, {f"{name}.scales": 2 * scales})
        _, damaged = survival(PackedLinears(output), source, {}, {}, "cpu", lambda *_: None)
        assert [each.name for each in damaged] == [name] and "times the merged weight" in damaged[0].why
        shutil.rmtree(output)


def test_a_block_of_zeros_and_another_modules_codes_are_found(trained, tmp_path):
    run = Run(load_recipe(trained))
    output = tmp_path / "gptq"
    output.mkdir()
    quantize_source(run, merged_source(run), output, lambda *_: None)
    # Copies: what is loaded are views of the file.
    tensors = {name: each.clone() for name, each in load_file(output / "model.safetensors").items()}
    zeroed, gate, up = "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"
    scales = tensors[f"{zeroed}.scales"].clone()
    scales[1, 32:64] = 0
    changed = {f"{zeroed}.scales": scales}
    for kind in ("qweight", "scales"):
        changed |= {f"{gate}.{kind}": tensors[f"{up}.{kind}"], f"{up}.{kind}": tensors[f"{gate}.{kind}"]}
    overwrite_tensors(output, changed)
    source = computed_source(run, "dequantized", run.dirs.merged, "cpu")
    _, damaged = survival(PackedLinears(output), source, {}, {}, "cpu", lambda *_: None)
    why = {each.name: each.why for each in damaged}
    assert why.keys() == {zeroed, gate, up}
    assert "0.00 times the merged weight in 1 of 4 tiles (outputs 32 to 63 of group 1 first)" in why[zeroed]


def test_an_altered_checkpoint_is_named_and_a_damaged_one_refused(finished, capsys):
    run_dir = load_recipe(finished).run_dir
    file = run_dir / "gptq" / "model.safetensors"
    code, text = command(capsys, "run", finished)
    assert code == 0 and "of the update is left after quantization" in text
    overwrite_tensors(run_dir / "gptq", {name: 2 * scales for name, scales in scales_of(run_dir, 1).items()})
    shutil.rmtree(run_dir / "evaluation")
    for name in ("evaluate", "run"):
        code, text = command(capsys, name, finished)
        assert code == 2 and f"{file}: not the file that quantize wrote" in text
    record_again(run_dir)
    for name in ("evaluate", "run"):  # the second time, nothing is left to be measured
        code, text = command(capsys, name, finished)
        assert code == 3, text
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            assert f"model.layers.1.{module}: damaged: its codes and scales stand for" in text
        assert "layers.0.self_attn.q_proj: damaged" not in text and "times the merged weight; its outputs are" in text
    content = read_json(run_dir / "evaluation" / "survival.json")
    assert len(content["damaged"]) == 7
    assert all(m["output_error"] > 0.5 for m in content["modules"] if m["layer"] == 1)
    shutil.rmtree(run_dir / "gptq")
    assert command(capsys, "run", finished)[0] == 0


def test_a_finished_run_whose_checkpoint_was_altered_is_not_called_up_to_date(finished, capsys):
    run_dir = load_recipe(finished).run_dir
    with (run_dir / "gptq" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    code, text = command(capsys, "run", finished)
    assert code == 2 and "not the file that quantize wrote" in text and "remove" in text


def test_the_gate_on_survival_and_a_run_without_it(finished, capsys):
    code, text = command(capsys, "evaluate", finished, "evaluate.gates.survival=0.5")
    assert code == 0, text
    code, text = command(capsys, "evaluate", finished, "evaluate.gates.survival=0.999999", "quantize.bits=2")
    code, text = command(capsys, "evaluate", finished, "evaluate.survival=false", "evaluate.gates.survival=0.1")
    assert code == 3 and "the share of the update that is left is not known" in text
    assert not (load_recipe(finished).run_dir / "evaluation" / "survival.json").exists()


def test_experts_have_no_update_and_no_module_of_their_own(tiny_recipe, tiny_model, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    base = shutil.copytree(tiny_model, tmp_path / "mixtral")
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, eos_token_id=2)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    path = tiny_recipe(model={"base": str(base)}, train={"max_steps": 2})
    Pipeline(load_recipe(path)).run()
    content = read_json(load_recipe(path).run_dir / "evaluation" / "survival.json")
    found = {module["name"]: module for module in content["modules"]}
    assert len(found) == 4 + 2 * 3 and content["damaged"] == []
    for name, module in found.items():
        assert 0 < module["weight_error"] < 0.3 and module["expected_error"] is not None and module["layer"] == 0
        known = {figure for figure in ("cosine", "energy", "codes_changed", "output_error") if module[figure]}
        assert len(known) == (0 if "experts" in name else 4), name


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_what_pissa_takes_from_the_base_is_no_update(tiny_recipe, base):
    path = tiny_recipe(lora={"init": "pissa"}, train={"max_steps": 1, "learning_rate": 1e-12}, merge={"base": base})
    recipe = load_recipe(path)
    Pipeline(recipe).run_stage("train")
    source = computed_source(Run(recipe), base, recipe.run_dir, "cpu")
    for block in source.linear("model.layers.0.mlp.down_proj.weight"):
        update = (block.after_nK - block.before_nK).norm()
        assert update < 1e-4 * block.after_nK.norm()


def test_of_awq_there_are_no_figures_and_the_reason_is_given(save_packed, trained, tmp_path):
    run = Run(load_recipe(trained))
    shutil.copytree(save_packed("awq"), tmp_path / "gptq")
    run.dirs = type(run.dirs)(tmp_path)
    measured = SurvivalOfRun(run, [])
    assert measured.observers == []
    assert measured.write(tmp_path / "survival.json", lambda *_: None) == {}
    content = json.loads((tmp_path / "survival.json").read_text())
    assert content["modules"] == [] and content["overall"]["energy"] is None and "AWQ" in content["reason"]
