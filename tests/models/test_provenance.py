"""base.json: the same with and without an adapter, complete, and refused where its digests would be meaningless."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config

from qlora.errors import UserError
from qlora.models.provenance import QuantizationSettings, read_provenance, write_provenance

NF4 = QuantizationSettings("nf4", double_quant=True, compute_dtype=torch.bfloat16)
LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEAR += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def save_base(directory: Path, intermediate_size: int = 128, tied: bool = True) -> Path:
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def load(directory: Path, **quantization: bool) -> torch.nn.Module:
    config = BitsAndBytesConfig(
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **quantization or {"load_in_4bit": True},
    )
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, device_map={"": "cpu"}, dtype=torch.bfloat16
    )


def write(model: torch.nn.Module, path: Path, settings: QuantizationSettings = NF4) -> dict:
    write_provenance(model, path, base_id="org/base", revision=None, settings=settings)
    return json.loads(path.read_text())


def test_names_every_linear_layer_and_digests_its_codes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    data = write(load(base), tmp_path / "base.json")
    assert sorted(data["quantized"]) == sorted(f"model.layers.0.{name}" for name in LINEAR)
    assert data["unquantized"] == ["lm_head"]
    assert data["tied"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert (data["base_id"], data["load_dtype"], data["device"]) == ("org/base", "bfloat16", "cpu")
    assert data["settings"] == {
        "quant_type": "nf4",
        "double_quant": True,
        "compute_dtype": "bfloat16",
        "blocksize": 64,
        "quant_storage": "uint8",
        "int8_threshold": None,
    }
    weight = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    codes, state = quantize_4bit(weight, quant_type="nf4")
    recorded = data["quantized"]["model.layers.0.mlp.up_proj"]
    assert recorded["sha256"] == hashlib.sha256(codes.numpy().tobytes()).hexdigest()
    assert recorded["absmax_mean"] == pytest.approx(state.absmax.mean().item(), rel=1e-3)
    assert recorded["absmax_rms"] == pytest.approx(state.absmax.square().mean().sqrt().item(), rel=1e-3)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head", "norm"]},
    ],
    ids=["all_linear", "head_adapted", "embeddings_adapted"],
)
def test_an_adapter_changes_nothing(tmp_path: Path, lora: dict) -> None:
    model = load(save_base(tmp_path / "base"))
    before = write(model, tmp_path / "base.json")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    assert write(model, tmp_path / "base.json") == before


def test_reads_what_it_writes(tmp_path: Path) -> None:
    model = load(save_base(tmp_path / "base", tied=False))
    written = write_provenance(model, tmp_path / "b.json", base_id="x", revision="abc", settings=NF4)
    assert read_provenance(tmp_path / "b.json") == written
    assert written.tied == []


def test_an_unquantized_base_has_no_codes(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"), dtype=torch.bfloat16)
    data = write(model, tmp_path / "b.json", replace(NF4, quant_type="none", double_quant=False))
    assert data["quantized"] == {} and len(data["unquantized"]) == 8 and data["load_dtype"] == "bfloat16"


def test_settings_that_the_weights_contradict_are_refused(tmp_path: Path) -> None:
    model = load(save_base(tmp_path / "base"))
    for wrong in ({"quant_type": "fp4"}, {"double_quant": False}, {"quant_type": "none"}, {"blocksize": 128}):
        with pytest.raises(ValueError, match="quantized"):
            write(model, tmp_path / "b.json", replace(NF4, **wrong))


def test_repacked_weights_are_not_digested(tmp_path: Path) -> None:
    model = load(save_base(tmp_path / "base")).eval()
    with torch.no_grad():
        model(torch.arange(8)[None])
    states = [module.weight.quant_state for module in model.modules() if hasattr(module, "quant_state")]
    if not any(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("bitsandbytes repacks weights only on CPUs with AVX-512 bf16")
    with pytest.raises(ValueError, match="repacked for CPU inference"):
        write(model, tmp_path / "b.json")


def test_8_bit_codes_are_digested_before_and_after_they_were_used(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = load(base, load_in_8bit=True)
    int8 = QuantizationSettings("int8", False, torch.bfloat16, int8_threshold=6.0)
    before = write(model, tmp_path / "b.json", int8)
    recorded = before["quantized"]["model.layers.0.mlp.up_proj"]
    weight = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    codes, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
    assert recorded["sha256"] == hashlib.sha256(codes.numpy().tobytes()).hexdigest()
    assert recorded["absmax_mean"] == pytest.approx(scales.mean().item(), rel=1e-6)
    model(torch.arange(8)[None])  # bitsandbytes moves codes and scales elsewhere
    assert write(get_peft_model(model, LoraConfig(target_modules="all-linear")), tmp_path / "b.json", int8) == before
    for wrong in ({"quant_type": "nf4"}, {"int8_threshold": 0.0}):
        with pytest.raises(ValueError, match="quantized"):
            write(model, tmp_path / "b.json", replace(int8, **wrong))


def test_rows_that_end_inside_a_block_are_refused_where_they_are_dequantized_wrongly(tmp_path: Path) -> None:
    model = load(save_base(tmp_path / "base", intermediate_size=96))
    down_proj = model.get_submodule("model.layers.0.mlp.down_proj").weight
    original = load_file(tmp_path / "base" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float()
    from bitsandbytes.functional import dequantize_4bit

    error = (dequantize_4bit(down_proj.data, down_proj.quant_state).float() - original).abs().max()
    if error < 0.2 * original.abs().max():
        write(model, tmp_path / "b.json")
    else:
        with pytest.raises(UserError, match="rows of 96 wrongly"):
            write(model, tmp_path / "b.json")


@pytest.mark.parametrize("text", ["{}", "not json", "[]"])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(UserError, match="not a provenance file"):
        read_provenance(tmp_path / "base.json")
    with pytest.raises(UserError, match="missing"):
        read_provenance(tmp_path / "nowhere.json")
