"""The merged model is the trained one: the same logits, each tensor equal to the formula, for every LoRA variant."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora.merging import MergeReport, merge_adapter

TOKENS = torch.arange(48).reshape(2, 24) * 7 % 80

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True},
    "one_module": {"target_modules": ["q_proj"]},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.(up|down)_proj": 8, "^model.layers.0.self_attn.o_proj": 6},
        "alpha_pattern": {"k_proj": 3, "layers.1.self_attn.v_proj": 40},
    },
    "patterns_rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7}, "use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "bias_all": {"bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "bias_lora_only": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "head_saved": {"modules_to_save": ["lm_head"]},
    "head_and_embeddings_saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms_saved": {"modules_to_save": ["input_layernorm", "norm"]},
    "head_adapted": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings_adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [70, 3]},
    "tokens_of_both": {"trainable_token_indices": {"embed_tokens": [70, 3], "lm_head": [3, 70]}, "use_dora": True},
}


TIED_VARIANTS = ["plain", "head_saved", "head_and_embeddings_saved", "head_adapted", "embeddings_adapted", "tokens"]


def merge(trained: Any, output: Path, **options: Any) -> MergeReport:
    output.mkdir()
    defaults = {"base": "dequantized", "dtype": torch.float32}
    return merge_adapter(trained.base, trained.adapter, output, **defaults | options)


@functools.cache
def model_logits(directory: Path, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        return model(TOKENS).logits.float()


def base_weight(layer: torch.nn.Module) -> torch.Tensor:
    """What bitsandbytes multiplies with, in fp32."""
    weight = layer.weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.detach().float()


def expected_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """W' of every linear layer of the live model: the formula in fp64, rounded to fp32."""
    expected = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = (lora["default"].weight.detach().double() for lora in (module.lora_A, module.lora_B))
            weight = (base_weight(module.base_layer) + module.scaling["default"] * (b @ a)).float()
            if "default" in module.lora_magnitude_vector:
                magnitude = module.lora_magnitude_vector["default"].weight.detach()
                norm = torch.linalg.vector_norm(weight.double(), dim=1)
                weight = ((magnitude / norm).unsqueeze(1) * weight.double()).float()
            expected[f"{name}.weight"] = weight
        elif isinstance(module, bitsandbytes.nn.Linear4bit) and not name.endswith("base_layer"):
            expected[f"{name}.weight"] = base_weight(module)
    return expected


@pytest.mark.parametrize(
    ("variant", "tied"), [(name, False) for name in VARIANTS] + [(name, True) for name in TIED_VARIANTS]
)
def test_merged_logits_are_those_of_training(
    train: Callable[..., Any], tmp_path: Path, variant: str, tied: bool
) -> None:
    trained = train(tied=tied, **VARIANTS[variant])
    trained_logits = trained.logits(TOKENS)
    merge(trained, tmp_path / "merged")
    difference = (model_logits(tmp_path / "merged", torch.float32) - trained_logits).abs().max()
    moved = (model_logits(trained.base, torch.float32) - trained_logits).abs().max()
    assert moved > 1e-2, "the adapter must matter for this test to mean anything"
    assert difference < 2e-5 * trained_logits.abs().max().clamp(min=1)


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "patterns", "head_adapted", "one_module"])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_each_tensor_is_the_formula(
    train: Callable[..., Any], tmp_path: Path, variant: str, compute_dtype: torch.dtype
) -> None:
    trained = train(compute_dtype=compute_dtype, **VARIANTS[variant])
    expected = expected_weights(trained.model)
    assert len(expected) >= 14
    for dtype in (torch.float32, torch.bfloat16):
        merge(trained, tmp_path / str(dtype), dtype=dtype, rounding="nearest")
        merged = load_file(tmp_path / str(dtype) / "model.safetensors")
        for name, weight in expected.items():
            assert merged[name].dtype == dtype
            assert torch.equal(merged[name], weight.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_an_update_of_less_than_a_step_is_kept(
    train: Callable[..., Any], tmp_path: Path, base: str, dtype: torch.dtype
) -> None:
    """What is left of the update, by projection on it: all, where rounding to nearest loses most."""
    trained = train(compute_dtype=torch.bfloat16)
    adapter = trained.adapter / "adapter_model.safetensors"
    small = {name: tensor / 20000 if "lora_B" in name else tensor for name, tensor in load_file(adapter).items()}
    save_file(small, adapter, metadata={"format": "pt"})
    weights = {}
    for name, options in (
        ("exact", {"dtype": torch.float32}),
        ("stochastic", {"dtype": dtype}),
        ("again", {"dtype": dtype}),
        ("nearest", {"dtype": dtype, "rounding": "nearest"}),
    ):
        report = merge(trained, tmp_path / name, base=base, **options)
        assert report.rounding == options.get("rounding", "stochastic")
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    (tmp_path / "none").mkdir()
    save_file(
        {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in small.items()}, adapter
    )
    merge_adapter(trained.base, trained.adapter, tmp_path / "none", base=base, dtype=torch.float32)
    before = load_file(tmp_path / "none" / "model.safetensors")
    kept = {"stochastic": [0.0, 0.0], "nearest": [0.0, 0.0]}
    for name, exact in weights["exact"].items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(weights["stochastic"][name], weights["nearest"][name])
            continue
        update = (exact - before[name]).double()
        assert torch.equal(weights["stochastic"][name], weights["again"][name])
        for rounding, sums in kept.items():
            change = weights[rounding][name].double() - before[name]
            sums[0] += (change * update).sum().item()
            sums[1] += (update * update).sum().item()
        # Never further than the next number on either side.
        step = torch.exp2(torch.floor(torch.log2(exact.abs())) - (7 if dtype == torch.bfloat16 else 10)).clamp(
            min=2**-24
        )
        assert ((weights["stochastic"][name].float() - exact).abs() <= step).all()
    shares = {rounding: change / whole for rounding, (change, whole) in kept.items()}
    assert abs(shares["stochastic"] - 1) < 0.1, shares
    if dtype == torch.bfloat16:
        assert shares["nearest"] < 0.7, shares


def test_what_was_not_trained_keeps_its_bytes(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(compute_dtype=torch.bfloat16)
    merge(trained, tmp_path / "merged", dtype=torch.float16)
    base = load_file(trained.base / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    kept = [name for name in base if "_proj.weight" not in name]
    assert len(kept) == 13 and all(torch.equal(base[name], merged[name]) for name in kept)
    assert all(merged[name].dtype == torch.bfloat16 for name in kept)
    assert all(merged[name].dtype == torch.float16 for name in base if "_proj.weight" in name)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float16"


def test_bf16_model_stays_close(train: Callable[..., Any], tmp_path: Path) -> None:
    """In the dtype of real runs both sides round at every operation; the distributions still agree."""
    trained = train(compute_dtype=torch.bfloat16)
    merge(trained, tmp_path / "merged", dtype=torch.bfloat16)
    left = trained.logits(TOKENS).log_softmax(-1)
    right = model_logits(tmp_path / "merged", torch.bfloat16).log_softmax(-1)
    divergence = (left.exp() * (left - right)).sum(-1).mean()
    assert divergence < 1e-3


def test_llama_without_biases_and_fp4(train: Callable[..., Any], tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=80, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    trained = train(config, quant_type="fp4")
    report = merge(trained, tmp_path / "merged")
    expected = expected_weights(trained.model)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert report.merged_modules == 7 and report.absmax_deviation == 0
    assert all(torch.equal(merged[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32], ids=["from_bfloat16", "from_float32"])
def test_unquantized_base_is_merged_in_the_dtype_it_was_loaded_in(
    train: Callable[..., Any], tmp_path: Path, base_dtype: torch.dtype
) -> None:
    trained = train(quant_type="none", base_dtype=base_dtype, compute_dtype=torch.bfloat16)
    merge(trained, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = expected_weights(trained.model)
    assert len(expected) == 14
    assert all(torch.equal(merged[name], weight) for name, weight in expected.items())


def test_float32_checkpoint_loaded_in_bf16(train: Callable[..., Any], tmp_path: Path) -> None:
    """The codes come from the rounded weights, not from those of the file."""
    trained = train(base_dtype=torch.float32, compute_dtype=torch.bfloat16)
    merge(trained, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], weight) for name, weight in expected_weights(trained.model).items())


def test_original_base(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(target_modules=["q_proj"])
    report = merge(trained, tmp_path / "merged", base="original")
    base = load_file(trained.base / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert report.base == "original"
    for name, module in trained.model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = (lora["default"].weight.detach().double() for lora in (module.lora_A, module.lora_B))
            expected = base[f"{name}.weight"] + module.scaling["default"] * (b @ a)
            assert torch.equal(merged[f"{name}.weight"], expected.float())
    untouched = [name for name in base if "q_proj.weight" not in name]
    assert all(torch.equal(merged[name].float(), base[name].float()) for name in untouched)


def test_tied_embeddings_are_written_once(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(tied=True)
    report = merge(trained, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert not report.untied and "lm_head.weight" not in merged
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_training_one_of_two_tied_tensors_unties_them(train: Callable[..., Any], tmp_path: Path, saved: str) -> None:
    trained = train(tied=True, modules_to_save=[saved])
    report = merge(trained, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(trained.base / "model.safetensors")["model.embed_tokens.weight"]
    names = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}
    trained_name = names.pop(saved)
    (other_name,) = names.values()
    assert report.untied and report.replaced_tensors == 1
    assert torch.equal(merged[other_name], base) and not torch.equal(merged[trained_name].float(), base.float())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_same_bytes_on_every_run(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(use_dora=True, modules_to_save=["lm_head"])
    for name in ("one", "two"):
        merge(trained, tmp_path / name, dtype=torch.bfloat16, max_shard_bytes=50_000)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 2
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    logits = [model_logits(tmp_path / "one", torch.float32), trained.logits(TOKENS)]
    assert (logits[0] - logits[1]).abs().max() < 0.1
