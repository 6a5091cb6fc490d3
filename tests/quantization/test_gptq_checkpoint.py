"""Whole checkpoints: against naive GPTQ on the whole model, through the loader, byte for byte, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.errors import UserError
from qlora.models.checkpoint import CheckpointReader
from qlora.models.gptq_format import TENSOR_NAMES, GPTQTensors, check_tensors, dequantize, read_quantization_config
from qlora.models.loading import load_gptq
from qlora.models.side_files import older_spellings
from qlora.quantization import GPTQSettings, quantize_checkpoint
from qlora.quantization.grid import choose_grid
from qlora.quantization.journal import JOURNAL_NAME

SETTINGS = GPTQSettings(bits=4, group_size=32, asymmetric_calibration=0)
GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def quantized_weights(directory) -> dict[str, torch.Tensor]:
    """Module name → dequantized weight of every packed layer, after checking its tensors."""
    reader = CheckpointReader(directory)
    settings = read_quantization_config(directory)
    weights = {}
    for name in (name.removesuffix(".qweight") for name in reader.names() if name.endswith(".qweight")):
        tensors = GPTQTensors(*(reader.read(f"{name}.{kind}") for kind in TENSOR_NAMES))
        check_tensors(name, tensors, settings)
        weights[name] = dequantize(tensors, settings.bits)
    return weights


def agreement_with_whole_model_gptq(model, rows, weights, settings) -> dict[str, float]:
    """Share of equal weights per module between `weights` and GPTQ in float64, which runs the whole model on every row
    for every group of linears, without padding. Each module is compared behind the same quantized ones before it."""
    shares = {}
    for index, layer in enumerate(model.get_decoder().layers):
        for group in GROUPS:
            linears = [layer.get_submodule(name) for name in group]
            seen: list[torch.Tensor] = []
            handle = linears[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].double()))
            for row in rows:
                model(torch.tensor([row.input_ids]))
            handle.remove()
            x_TK = torch.cat(seen)
            for local, linear in zip(group, linears, strict=True):
                name = f"model.layers.{index}.{local}"
                expected = naive_gptq(linear.weight.double(), x_TK.T @ x_TK / len(x_TK), settings)
                shares[name] = torch.isclose(weights[name].double(), expected).double().mean().item()
                linear.weight.copy_(weights[name])
    return shares


def naive_gptq(w_NK, hessian, settings) -> torch.Tensor:
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian[order][:, order] + settings.damp * hessian.diagonal().mean() * torch.eye(len(order))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    cost = torch.empty(len(order), dtype=torch.float64)
    cost[order] = 1 / upper.diagonal() ** 2
    grid = choose_grid(w_NK.T.contiguous(), cost, bits=settings.bits, group_size=settings.group_size, sym=settings.sym)
    w_NK, quantized = w_NK.clone(), torch.empty_like(w_NK)
    for i, column in enumerate(order.tolist()):
        scale, zero = (part[column // settings.group_size].double() for part in (grid.scales_GN, grid.zeros_GN))
        code = ((w_NK[:, column] / scale).round() + zero).clamp(0, 2**settings.bits - 1)
        quantized[:, column] = scale * (code - zero)
        error = (w_NK[:, column] - quantized[:, column]) / upper[i, i]
        w_NK[:, order] -= error[:, None] * upper[i]
    return quantized


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, bits=3, sym=False)], ids=["4 sym", "3 asym"])
def test_equals_gptq_on_the_whole_model(save_model, output_dir, rows, kind, settings):
    source = save_model(kind)
    quantize_checkpoint(source, output_dir, rows, settings, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    shares = agreement_with_whole_model_gptq(model, rows, quantized_weights(output_dir), settings)
    assert len(shares) == 3 * 7
    # float32 against float64: a weight half way between two codes may fall on either side, and its row follows.
    assert min(shares.values()) > 0.98
    assert sum(shares.values()) / len(shares) > 0.999


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_loads_as_the_model_whose_weights_were_replaced(save_model, output_dir, rows, kind):
    source = save_model(kind, torch.bfloat16)
    quantize_checkpoint(source, output_dir, rows, SETTINGS, device="cpu")
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weights = quantized_weights(output_dir)
    assert len(weights) == 3 * 7
    for name, weight in weights.items():
        expected.get_submodule(name).weight.copy_(weight)
    loaded = load_gptq(output_dir, dtype=torch.float32)
    input_ids = torch.tensor([rows[0].input_ids])
    assert torch.equal(loaded(input_ids).logits, expected(input_ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("sym", [True, False])
def test_eight_bits_change_next_to_nothing(save_model, output_dir, rows, sym, group_size):
    source = save_model("qwen2")
    settings = GPTQSettings(bits=8, group_size=group_size, sym=sym, asymmetric_calibration=0)
    report = quantize_checkpoint(source, output_dir, rows, settings, device="cpu")
    assert max(module.relative_loss for module in report.modules) < 1e-4
    input_ids = torch.tensor([rows[0].input_ids])
    logits = AutoModelForCausalLM.from_pretrained(source).eval()(input_ids).logits
    found = load_gptq(output_dir, dtype=torch.float32)(input_ids).logits
    assert (found - logits).norm() < 0.02 * logits.norm()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_everything_else_is_unchanged(save_model, output_dir, rows, kind):
    source = save_model(kind, torch.bfloat16)
    quantize_checkpoint(source, output_dir, rows, SETTINGS, device="cpu")
    before, after = load_file(source / "model.safetensors"), load_file(output_dir / "model.safetensors")
    packed = quantized_weights(output_dir)
    replaced = {f"{name}.weight" for name in packed}
    assert set(after) == set(before) - replaced | {f"{name}.{kind}" for name in packed for kind in TENSOR_NAMES}
    for name in set(before) - replaced:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
    config = json.loads((output_dir / "config.json").read_text())
    quantization = config.pop("quantization_config")
    written = json.loads((source / "config.json").read_text())
    assert config == written | older_spellings(written)
    assert json.loads((output_dir / "quantize_config.json").read_text()) == quantization
    assert quantization["desc_act"] is False and "modules_in_block_to_quantize" not in quantization
    assert (output_dir / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


def test_a_stored_copy_of_tied_embeddings_is_dropped(save_model, output_dir, rows):
    source = save_model("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(source, output_dir, rows, SETTINGS, device="cpu")
    assert "lm_head.weight" not in CheckpointReader(output_dir).names()


def test_same_input_gives_the_same_bytes_without_traces_of_the_machine(save_model, tmp_path, rows):
    source = save_model("llama", torch.bfloat16)
    contents = []
    for name in ("first", "second"):
        output = tmp_path / name
        output.mkdir()
        quantize_checkpoint(source, output, rows, SETTINGS, device="cpu")
        contents.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert contents[0] == contents[1]
    assert not [name for name, content in contents[0].items() if str(tmp_path).encode() in content]


class _Killed(Exception):
    """Stands for a process that ends in the middle of its work."""


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
@pytest.mark.parametrize("layers", [1, 2])
def test_an_interrupted_run_continues_after_the_last_layer_with_the_same_bytes(
    save_model, output_dir, tmp_path, rows, layers, asymmetric
):
    settings = replace(SETTINGS, asymmetric_calibration=asymmetric)
    source = save_model("llama", torch.bfloat16)
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = quantize_checkpoint(source, whole, rows, settings, device="cpu")

    def stop(done: int, _: int, name: str) -> None:
        if done == layers + 1:
            raise _Killed(name)

    with pytest.raises(_Killed):
        quantize_checkpoint(source, output_dir, rows, settings, device="cpu", progress=stop)
    journal = output_dir / JOURNAL_NAME
    # As if the last line had been cut off while it was written.
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:layers]) + '{"layer": 2, "mod')
    again = []
    report = quantize_checkpoint(
        source, output_dir, rows, settings, device="cpu", progress=lambda *call: again.append(call)
    )
    assert report.modules == expected.modules and len(again) == 3
    assert {path.name: path.read_bytes() for path in output_dir.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


@torch.no_grad()
def test_asymmetric_calibration_brings_outputs_closer_to_the_full_model(save_model, tmp_path, rows):
    source = save_model("llama")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    errors = []
    for share in (0.0, 0.5):
        output = tmp_path / str(share)
        output.mkdir()
        quantize_checkpoint(source, output, rows, replace(SETTINGS, bits=3, asymmetric_calibration=share), device="cpu")
        loaded = load_gptq(output, dtype=torch.float32)
        states = [
            [m(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[-1][0] for row in rows]
            for m in (model, loaded)
        ]
        errors.append((torch.cat(states[0]) - torch.cat(states[1])).square().mean())
    assert errors[1] < 0.95 * errors[0]


def test_weights_count_in_calibration(save_model, output_dir, tmp_path, rows):
    source = save_model("llama")
    marked = [replace(row, loss=(False,) * 4 + (True,) * (len(row.input_ids) - 4)) for row in rows]
    quantize_checkpoint(source, output_dir, rows, SETTINGS, device="cpu")
    other = tmp_path / "other"
    other.mkdir()
    quantize_checkpoint(source, other, marked, replace(SETTINGS, prompt_weight=0.1), device="cpu")
    first, second = quantized_weights(output_dir), quantized_weights(other)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_the_report_covers_every_module(save_model, output_dir, rows):
    calls = []
    report = quantize_checkpoint(
        save_model("llama"), output_dir, rows, SETTINGS, device="cpu", progress=lambda *call: calls.append(call)
    )
    assert calls == [(index + 1, 3, f"model.layers.{index}") for index in range(3)]
    assert {module.name for module in report.modules} == set(quantized_weights(output_dir))
    assert report.tokens == sum(len(row.input_ids) for row in rows) and report.rows == len(rows) and not report.warnings
    assert all(0 < module.relative_loss < 0.05 and module.damp == SETTINGS.damp for module in report.modules)
    assert json.loads(json.dumps(report.to_dict()))["modules"][0]["name"] == "model.layers.0.self_attn.q_proj"


def test_too_few_tokens_are_reported(save_model, output_dir, rows):
    report = quantize_checkpoint(save_model("llama"), output_dir, rows[:2], SETTINGS, device="cpu")
    assert "21 modules saw fewer calibration tokens than they have inputs" in report.warnings[0]


def test_inputs_that_calibration_never_excites_are_reported(save_model, output_dir, rows):
    def silence(model):
        model.model.layers[0].input_layernorm.weight.data[:5] = 0

    report = quantize_checkpoint(save_model("llama", change=silence), output_dir, rows, SETTINGS, device="cpu")
    assert [module.dead_columns for module in report.modules[:4]] == [5, 5, 5, 0]


def test_one_hessian_pass_per_layer_is_another_result(save_model, output_dir, tmp_path, rows):
    source = save_model("llama")
    quantize_checkpoint(source, output_dir, rows, SETTINGS, device="cpu")
    other = tmp_path / "other"
    other.mkdir()
    quantize_checkpoint(source, other, rows, replace(SETTINGS, true_sequential=False), device="cpu")
    first, second = quantized_weights(output_dir), quantized_weights(other)
    assert torch.equal(first["model.layers.0.self_attn.q_proj"], second["model.layers.0.self_attn.q_proj"])
    assert not torch.equal(first["model.layers.0.mlp.down_proj"], second["model.layers.0.mlp.down_proj"])


def test_some_modules_only(save_model, output_dir, rows):
    modules = ["mlp.gate_proj", "mlp.up_proj"]
    source = save_model("llama")
    settings = replace(SETTINGS, skip=("self_attn", "down_proj"))
    quantize_checkpoint(source, output_dir, rows, settings, device="cpu")
    assert {name.split(".", 3)[3] for name in quantized_weights(output_dir)} == set(modules)
    config = json.loads((output_dir / "config.json").read_text())["quantization_config"]
    assert config["modules_in_block_to_quantize"] == [modules]


def test_tensors_under_another_prefix_keep_their_names(save_model, output_dir, rows):
    source = save_model("llama")
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace("model.", "language_model.model.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(source, output_dir, rows, SETTINGS, device="cpu")
    assert "language_model.model.layers.0.mlp.up_proj" in quantized_weights(output_dir)


def test_missing_tensors_are_named(save_model, output_dir, rows):
    source = save_model("llama")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        quantize_checkpoint(source, output_dir, rows, SETTINGS, device="cpu")


def test_unknown_modules_are_refused_before_any_work(save_model, output_dir, rows):
    settings = replace(SETTINGS, skip=("mlp\\.gate$", "mlp"))
    with pytest.raises(UserError, match="gate.*: no module that is quantized has such a name"):
        quantize_checkpoint(save_model("llama"), output_dir, rows, settings, device="cpu")
    assert not list(output_dir.iterdir())


def test_group_sizes_that_do_not_divide_are_refused_before_any_work(save_model, output_dir, rows):
    with pytest.raises(UserError, match="down_proj: 96 inputs are not divisible by the group size 64"):
        quantize_checkpoint(save_model("llama"), output_dir, rows, GPTQSettings(group_size=64), device="cpu")
    assert not list(output_dir.iterdir())


def test_quantized_models_are_refused(save_model, output_dir, tmp_path, rows):
    quantize_checkpoint(save_model("llama"), output_dir, rows, SETTINGS, device="cpu")
    with pytest.raises(UserError, match="already quantized"):
        quantize_checkpoint(output_dir, tmp_path, rows, SETTINGS, device="cpu")


def test_weights_that_are_not_finite_are_named(save_model, output_dir, rows):
    def poison(model):
        model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")

    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj: weights are not finite"):
        quantize_checkpoint(save_model("llama", change=poison), output_dir, rows, SETTINGS, device="cpu")


@pytest.mark.parametrize("changes", [{"bits": 5}, {"group_size": 48}, {"damp": 0.0}])
def test_settings_outside_the_format_are_refused(changes):
    with pytest.raises(UserError):
        GPTQSettings(**changes)
