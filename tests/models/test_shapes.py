"""Counts, FLOPs and memory formulas against published and measured figures."""

from __future__ import annotations

import pytest
from transformers import Gemma3TextConfig, GPT2Config, GptOssConfig, LlamaConfig, MixtralConfig

from qlora.errors import UserError
from qlora.models.estimates import (
    merged_bytes,
)
from qlora.models.gptq_format import pack_rows
from qlora.models.quantize_estimates import gptq_disk_bytes
from qlora.models.resources import STREAMING, TRAINING, Pass, assumed_machine, layer_activation_bytes
from qlora.models.shapes import adapter_shapes, model_shapes, read_config, skeleton, training_flops
from qlora.models.training_memory import DOUBLE_QUANT_BYTES, FOUR_BIT_BYTES, Trained, base_bytes
from qlora.recipe import Lora, Recipe

TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
    tie_word_embeddings=True,
)


def recipe(**sections) -> Recipe:
    return Recipe.model_validate({"name": "t", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}} | sections)


@pytest.fixture(scope="module")
def llama_8b():
    """Shapes and r=16 adapter of Llama-3.1-8B, from its configuration."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    )
    model = skeleton(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return model_shapes(model), adapter_shapes(model, Lora(r=16))


def test_llama_3_1_8b_has_its_published_parameter_counts(llama_8b) -> None:
    shapes, adapter = llama_8b
    assert shapes.total == 8_030_261_248
    assert (shapes.quantized, shapes.head) == (6_979_321_856, 525_336_576)
    assert adapter.trainable == 41_943_040
    assert len(shapes.linears) == 7 * 32
    assert shapes.linears[0].name == "model.layers.0.self_attn.q_proj"
    assert max(linear.in_features for linear in shapes.linears) == 14336


@pytest.mark.parametrize(
    ("sequence", "checkpointing", "giga_flops"),
    [(2048, False, 32.2), (4096, False, 34.0), (2048, True, 46.7), (4096, True, 49.1), (8192, True, 54.0)],
)
def test_flops_per_token_of_llama_3_1_8b(llama_8b, sequence, checkpointing, giga_flops) -> None:
    shapes, adapter = llama_8b
    found = training_flops(shapes, adapter, sequence, recomputed=float(checkpointing)) / 1e9
    assert found == pytest.approx(giga_flops, abs=0.06)


def test_training_memory_is_near_what_was_measured(llama_8b) -> None:
    """TRL on an H100, sequence 4,096, micro-batch 2, bf16 adapter: 9.5 GiB with checkpointing, 51.3 without."""
    shapes, adapter = llama_8b
    asked = recipe(lora={"dtype": "bfloat16"}, train={"kernels": "plain"})
    trained = Trained(asked, shapes, adapter, assumed_machine("cuda:0", "NVIDIA H100", 16), 4096)
    for recomputed, measured, tolerance in ((32, 9.5, 0.06), (0, 51.3, 0.15)):
        parts = trained.parts(Pass(2 * 4096, recomputed))
        assert sum(parts.values()) / 2**30 == pytest.approx(measured, rel=tolerance)


def test_four_bit_bytes_follow_double_quantization(llama_8b) -> None:
    shapes, _ = llama_8b
    assert pytest.approx(0.51587, abs=1e-5) == DOUBLE_QUANT_BYTES
    assert FOUR_BIT_BYTES == 0.5625
    saved = base_bytes(recipe(model={"base": "a/b", "double_quant": False}), shapes) - base_bytes(recipe(), shapes)
    assert saved == pytest.approx(shapes.quantized * (FOUR_BIT_BYTES - DOUBLE_QUANT_BYTES), abs=1)
    plain = base_bytes(recipe(model={"base": "a/b", "quantization": "none"}), shapes)
    assert plain == 2 * shapes.total
    assert merged_bytes(recipe(), shapes) == 2 * shapes.total


def test_tied_embeddings_count_once() -> None:
    tied = model_shapes(skeleton(TINY))
    config = LlamaConfig(**TINY.to_dict() | {"tie_word_embeddings": False})
    untied = model_shapes(skeleton(config))
    assert untied.total - tied.total == 100 * 64
    assert tied.head == untied.head == 100 * 64
    assert tied.quantized == untied.quantized == sum(linear.parameters for linear in tied.linears)


def test_gemma_3_text_has_heads_wider_than_its_hidden_size() -> None:
    config = Gemma3TextConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
        head_dim=128, vocab_size=100,
    )  # fmt: skip
    shapes = model_shapes(skeleton(config))
    by_name = {linear.name.removeprefix("model.layers.0."): linear for linear in shapes.linears}
    assert by_name["self_attn.o_proj"].in_features == 256
    assert shapes.head_dim == 128
    assert layer_activation_bytes(shapes, 2) == 2 * (12 * 128 + 3 * 256 + 128 + 3 * 256)


def test_adapter_counts_follow_pefts_rules() -> None:
    per_layer = {
        "q_proj": 64 + 64, "k_proj": 64 + 32, "v_proj": 64 + 32, "o_proj": 64 + 64,
        "gate_proj": 64 + 192, "up_proj": 64 + 192, "down_proj": 192 + 64,
    }  # fmt: skip
    everywhere = 2 * sum(per_layer.values())

    def trainable(**options) -> int:
        return adapter_shapes(skeleton(TINY), Lora(**options)).trainable

    assert trainable(r=4) == 4 * everywhere
    assert trainable(r=4, target_modules=["q_proj", "v_proj"]) == 4 * 2 * (128 + 96)
    assert trainable(r=4, rank_pattern={"q_proj": 8}) == 4 * everywhere + 4 * 2 * 128
    assert trainable(r=4, target_modules=r".*layers\.0\..*q_proj") == 4 * 128
    assert trainable(r=4, modules_to_save=["lm_head"]) == 4 * everywhere + 100 * 64
    with pytest.raises(UserError, match="nope"):
        trainable(target_modules=["nope"])


def test_gptq_disk_size_is_that_of_the_packed_tensors() -> None:
    import torch

    shapes = model_shapes(skeleton(TINY))
    asked = recipe(quantize={"bits": 4, "group_size": 32})
    expected = 2 * (shapes.total - shapes.quantized)
    for linear in shapes.linears:
        inputs, outputs = linear.in_features, linear.out_features
        expected += pack_rows(torch.zeros(inputs, outputs, dtype=torch.uint8), 4).nbytes
        expected += inputs // 32 * (outputs * 4 // 8 + outputs * 2) + inputs * 4
    assert gptq_disk_bytes(asked, shapes) == expected


def test_gpt2_holds_its_weights_transposed() -> None:
    shapes = model_shapes(skeleton(GPT2Config()))
    assert shapes.total == 124_439_808  # as published
    by_name = {linear.name: (linear.in_features, linear.out_features) for linear in shapes.linears}
    assert by_name["transformer.h.11.mlp.c_fc"] == (768, 3072)
    assert shapes.quantized == shapes.active == 12 * 12 * 768**2


def test_a_token_passes_through_few_of_the_experts() -> None:
    """Mixtral-8x7B: 46.7 billion parameters, of which a token uses 12.9 (arXiv:2401.04088)."""
    model = skeleton(MixtralConfig(vocab_size=32000, hidden_size=4096, num_local_experts=8, num_experts_per_tok=2))
    shapes = model_shapes(model)
    assert shapes.total == 46_702_792_704
    assert shapes.active + 2 * shapes.head == pytest.approx(12.9e9, rel=0.005)
    assert shapes.quantized == 32 * (2 * 4096**2 + 2 * 4096 * 1024), "experts stay in 16 bits while training"
    assert len(shapes.linears) == 32 * (4 + 3 * 8)
    assert shapes.linears[4].name == "model.layers.0.block_sparse_moe.experts.0.w1"
    assert shapes.feed_forward_size == 2 * 14336
    adapter = adapter_shapes(model, Lora(r=8))
    assert adapter.trainable == 32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024)), "attention only"


def test_experts_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match="GptOssExperts"):
        model_shapes(skeleton(GptOssConfig(num_hidden_layers=2, num_local_experts=4)))


def test_a_missing_config_names_the_file(tmp_path) -> None:
    with pytest.raises(UserError, match="config.json"):
        read_config(tmp_path)


def test_rates_are_assumed_by_device_name_and_unknown_where_no_peak_is_known() -> None:
    h100 = assumed_machine("cuda:0", "NVIDIA H100 80GB HBM3", 16)
    pcie = assumed_machine("cuda:0", "NVIDIA H100 PCIe", 16)
    assert h100.peak is not None and pcie.peak is not None and h100.peak > pcie.peak
    a100 = assumed_machine("cuda:0", "NVIDIA A100-SXM4-40GB", 8)
    assert a100.seconds(312e12, TRAINING) == pytest.approx(1 / 0.35)
    assert assumed_machine("cuda:0", "NVIDIA GeForce GTX 1050", 8).seconds(1, TRAINING) is None
    two_cores = assumed_machine("cpu", "CPU", 2)
    assert two_cores.seconds(120e9, TRAINING) == 1 > two_cores.seconds(120e9, STREAMING)
