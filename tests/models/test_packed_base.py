"""Training on a checkpoint's own codes: weights of the dequantized checkpoint to the bit, products and gradients."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlora.errors import UserError
from qlora.models.adapter_sums import round_once
from qlora.models.base import resolve_base
from qlora.models.loading import attach_adapter, load_for_training, load_plain
from qlora.models.packed_base import packed_notes, with_packed
from qlora.models.packed_checkpoint import write_dequantized
from qlora.models.packed_module import PackedLinear
from qlora.models.preview import preview_base
from qlora.models.shapes import model_shapes, read_config, skeleton
from qlora.models.training_memory import base_bytes
from qlora.recipe import Lora, Model, Recipe
from qlora.training.fused import fuse

FORMATS = [("gptq", 2, False), ("gptq", 3, False), ("gptq", 4, False), ("gptq", 8, False), ("awq", 4, False)]
ACT_ORDER = [("gptq", 3, True), ("gptq", 4, True)]


def settings(directory, compute_dtype="float32"):
    return Model(base=str(directory), quantization="checkpoint", compute_dtype=compute_dtype)


@pytest.fixture
def load(save_packed, tmp_path, monkeypatch):
    """(base, model) of a packed checkpoint, loaded for training; conversions go to a cache of the test's own."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))

    def of(*kind, compute_dtype="float32"):
        base = resolve_base(str(save_packed(*kind)))
        return base, load_for_training(base, settings(base.packed, compute_dtype), "cpu")

    return of


@pytest.mark.parametrize("kind", FORMATS + ACT_ORDER, ids=str)
def test_every_weight_is_that_of_the_dequantized_checkpoint_to_the_bit(load, kind):
    base, model = load(*kind)
    stored = load_file(base.directory / "model.safetensors")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 14 and all(module.packed.bits == kind[1] for module in packed.values())
    assert all((module.packed.rows_K is not None) == kind[2] for module in packed.values())
    for name, module in packed.items():
        assert torch.equal(module.stored_weight(), stored[f"{name}.weight"]), name
        assert torch.equal(module.to(torch.float16).stored_weight(), stored[f"{name}.weight"]), name
    plain = load_plain(base.directory, torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied, as in the checkpoint"


def adapter(model, ids, **lora):
    """The model with an adapter of which all numbers count, and what computes its loss and gradients."""
    adapted = attach_adapter(model, Lora(r=4, alpha=8, **lora)).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return adapted, lambda: run(adapted, ids)


def run(adapted, ids):
    adapted.zero_grad()
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "lora"), [(("gptq", 4, True), {}), (("awq", 4), {"dora": True})], ids=str)
def test_losses_and_gradients_are_those_of_the_dequantized_model_fused_or_not(load, kind, lora):
    base, model = load(*kind)
    ids = torch.arange(24).reshape(2, 12)
    packed, of_packed = adapter(model, ids, **lora)
    _, of_plain = adapter(load_plain(base.directory, torch.float32), ids, **lora)
    expected = of_plain()
    done = []
    for _ in range(2):
        found = of_packed()
        torch.testing.assert_close(found[0], expected[0])
        assert found[1].keys() == expected[1].keys() and len(found[1]) >= 28
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
        done.append(fuse(packed))
    assert (done[0].linears, done[0].blocks) == ((0, 0) if lora else (14, 2))


def test_products_in_float8_are_those_of_the_dequantized_model_to_the_bit(load):
    base, packed = load("gptq", 4, True, compute_dtype="bfloat16")
    ids = torch.arange(24).reshape(2, 12)
    models = [adapter(each, ids)[0].to(torch.bfloat16) for each in (packed, load_plain(base.directory))]
    for model in models:
        assert fuse(model, float8=True).linears == 14
    (found, own), (expected, gradients) = (run(model, ids) for model in models)
    assert torch.equal(found, expected) and own.keys() == gradients.keys()
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


def test_outside_of_training_an_adapter_is_added_before_rounding(load, tmp_path):
    """As the ladder measures it; in fp32 nothing is rounded, and PEFT's own forward is the same."""
    _, model = load("gptq", 4, False)
    adapted, _ = adapter(model, torch.arange(4)[None])
    adapted.save_pretrained(tmp_path)
    expected = adapted.eval()(torch.arange(9)[None]).logits
    _, again = load("gptq", 4, False)
    trained = round_once(PeftModel.from_pretrained(again, tmp_path).eval())
    forwards = [module.forward for name, module in trained.named_modules() if name.endswith("q_proj")]
    assert all("adapter_sums" in forward.__module__ for forward in forwards)
    torch.testing.assert_close(trained(torch.arange(9)[None]).logits, expected)


def test_the_formula_of_memory_counts_codes_scales_and_zero_points(load, save_packed):
    _, model = load("gptq", 3, False, compute_dtype="bfloat16")
    directory = save_packed("gptq", 3, False)
    bare = skeleton(read_config(directory))
    shapes = with_packed(model_shapes(bare), directory)
    recipe = Recipe.model_validate(
        {"name": "t", "model": {"base": "b", "quantization": "checkpoint"}, "data": {"train": [{"path": "x"}]}}
    )
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert base_bytes(recipe, shapes) == held
    assert shapes.packed_bytes < model_shapes(bare).quantized * 0.5


@pytest.fixture
def copy(save_packed, tmp_path):
    """A copy of a packed checkpoint to change: its directory, and a function that edits config or tensors."""

    def of(*kind):
        directory = shutil.copytree(save_packed(*kind), tmp_path / "copy")

        def edit(quantization=None, tensors=None):
            config = json.loads((directory / "config.json").read_text())
            config["quantization_config"] |= quantization or {}
            (directory / "config.json").write_text(json.dumps(config))
            if tensors is not None:
                found = load_file(directory / "model.safetensors")
                tensors(found)
                save_file(found, directory / "model.safetensors", {"format": "pt"})

        return directory, edit

    return of


def load_copy(directory):
    from qlora.models.packed_base import load_packed

    return load_packed(directory, settings(directory), torch.float32, "cpu")


def test_a_bias_of_zeros_that_no_linear_has_is_left_out_and_any_other_is_refused(copy):
    directory, edit = copy("gptq", 4, False)
    prefix = "model.layers.0.mlp.up_proj"
    edit(tensors=lambda found: found.update({f"{prefix}.bias": torch.zeros(128, dtype=torch.float16)}))
    assert load_copy(directory).model.layers[0].mlp.up_proj.bias is None
    edit(tensors=lambda found: found.update({f"{prefix}.bias": torch.ones(128, dtype=torch.float16)}))
    with pytest.raises(UserError, match="a bias for a linear without"):
        load_copy(directory)


def test_groups_of_unequal_size_are_refused(copy):
    directory, edit = copy("gptq", 4, True)
    edit(tensors=lambda found: found["model.layers.0.mlp.up_proj.g_idx"].fill_(0))
    with pytest.raises(UserError, match="groups of unequal size"):
        load_copy(directory)


def test_what_is_packed_without_a_place_in_the_model_is_refused(copy):
    directory, edit = copy("gptq", 4, False)
    name = "model.layers.0.mlp.up_proj.qweight"
    edit(tensors=lambda found: found.update({"model.layers.7.extra.qweight": found[name].clone()}))
    with pytest.raises(UserError, match="1 packed linears have no place in LlamaForCausalLM"):
        load_copy(directory)


@pytest.mark.parametrize(
    "keys",
    [{"use_exllama": True}, {"disable_exllama": False}, {"backend": "marlin"}, {"exllama_config": {"version": 2}}],
    ids=lambda keys: next(iter(keys)),
)
def test_kernels_that_a_config_asks_for_change_nothing_and_are_named(copy, keys):
    directory, edit = copy("gptq", 4, False)
    before = load_copy(directory)(torch.arange(9)[None]).logits
    edit(quantization=keys)
    found = preview_base(str(directory))
    shapes = model_shapes(skeleton(read_config(directory)))
    codes, kernels = packed_notes(found, settings(directory), shapes)
    assert "its own codes" in codes.what and "Triton kernel on a GPU" in codes.what
    assert f"{next(iter(keys))}: " in kernels.what and "no backward pass" in kernels.what
    assert torch.equal(load_copy(directory)(torch.arange(9)[None]).logits, before)
    held_in_nf4, _ = packed_notes(found, Model(base=str(directory)), shapes)
    assert "model.quantization: checkpoint trains on its own codes" in held_in_nf4.what


def test_a_base_in_16_bits_has_no_codes(tiny_model):
    base = resolve_base(str(tiny_model))
    with pytest.raises(UserError, match="trains on the codes of a GPTQ or AWQ base, and .* is neither"):
        load_for_training(base, settings(tiny_model), "cpu")


def test_packed_biases_and_transposed_weights_of_gpt2(tmp_path):
    """GPT-2: Conv1D, biases, and checkpoints without the decoder's prefix."""
    from transformers import AutoModelForCausalLM, GPT2Config

    from qlora.data.calibration import CalibrationRow
    from qlora.quantization import GPTQSettings, quantize_checkpoint

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=160, n_embd=64, n_layer=1, n_head=4, n_positions=64, initializer_range=0.1)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.save_pretrained(tmp_path / "base")
    for name in ("gptq", "plain"):
        (tmp_path / name).mkdir()
    rows = [CalibrationRow(tuple(range(i, i + 20))) for i in range(8)]
    quantize_checkpoint(tmp_path / "base", tmp_path / "gptq", rows, GPTQSettings(group_size=32), device="cpu")
    write_dequantized(tmp_path / "gptq", tmp_path / "plain")
    packed, plain = load_copy(tmp_path / "gptq"), load_plain(tmp_path / "plain", torch.float32)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 4
    torch.testing.assert_close(packed(torch.arange(20)[None]).logits, plain(torch.arange(20)[None]).logits)


def test_those_who_come_together_convert_once(save_packed, tmp_path, monkeypatch, capsys):
    """As the processes of a launch do; the lock is of an open file, so threads stand for them."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(resolve_base, str(save_packed("gptq", 4, False))) for _ in range(2)]
    assert found[0].result() == found[1].result()
    assert capsys.readouterr().out.count("converting") == 1
