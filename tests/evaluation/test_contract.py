"""Which engines take which checkpoints: every rule of the table, on real shapes."""

from __future__ import annotations

import pytest
from transformers import FalconConfig, GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from qlora.evaluation.contract import engine_support
from qlora.models.gptq_format import GPTQFormat
from qlora.models.shapes import LinearShape, model_shapes, skeleton
from qlora.quantization.settings import GPTQSettings


def layer(hidden: int, feed_forward: int, attention: int | None = None) -> list[LinearShape]:
    attention = attention or hidden
    return [
        LinearShape("model.layers.0.self_attn.q_proj", hidden, attention),
        LinearShape("model.layers.0.self_attn.o_proj", attention, hidden),
        LinearShape("model.layers.0.mlp.gate_proj", hidden, feed_forward),
        LinearShape("model.layers.0.mlp.down_proj", feed_forward, hidden),
    ]


LLAMA_8B = layer(4096, 14336)
SMOLLM2 = layer(576, 1536)
GEMMA_3_1B = layer(1152, 6912, attention=1024)


def accepted(settings: GPTQFormat, shapes: list[LinearShape], heads: int | None = None) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for verdict in engine_support(settings, shapes, attention_heads=heads):
        assert verdict.accepts or verdict.reason
        found.setdefault(verdict.engine, []).extend([verdict.tensor_parallel] if verdict.accepts else [])
    return found


def test_the_default_checkpoint_of_llama_8b_loads_everywhere() -> None:
    assert accepted(GPTQFormat(4, 128), LLAMA_8B, heads=32) == {
        "vLLM": [1, 2, 4, 8],
        "SGLang (Marlin)": [1, 2, 4, 8],
        "SGLang (legacy path)": [1, 2, 4, 8],
        "gptqmodel": [1],
        "transformers + gptqmodel": [1],
        "ExLlamaV2": [1],
        "AutoGPTQ": [1],
    }


@pytest.mark.parametrize(
    ("settings", "takers"),
    [
        (
            GPTQFormat(8, 128),
            {"vLLM", "SGLang (Marlin)", "SGLang (legacy path)", "gptqmodel", "transformers + gptqmodel", "AutoGPTQ"},
        ),
        (GPTQFormat(3, 128), {"SGLang (legacy path)", "gptqmodel", "transformers + gptqmodel", "AutoGPTQ"}),
        (
            GPTQFormat(4, 128, sym=False),
            {"SGLang (legacy path)", "gptqmodel", "transformers + gptqmodel", "ExLlamaV2", "AutoGPTQ"},
        ),
        (
            GPTQFormat(4, 128, desc_act=True),
            {"SGLang (legacy path)", "gptqmodel", "transformers + gptqmodel", "ExLlamaV2", "AutoGPTQ"},
        ),
    ],
)
def test_engines_differ_in_bits_zero_points_and_group_order(settings: GPTQFormat, takers: set[str]) -> None:
    assert {engine for engine, ranks in accepted(settings, LLAMA_8B, heads=32).items() if ranks} == takers


def test_one_group_per_layer_may_be_in_activation_order() -> None:
    assert accepted(GPTQFormat(4, -1, desc_act=True), LLAMA_8B)["vLLM"] == [1, 2, 4, 8]


def test_groups_must_be_whole_on_every_rank_of_a_layer_split_along_its_inputs() -> None:
    assert accepted(GPTQFormat(4, 128), GEMMA_3_1B, heads=4)["vLLM"] == [1, 2]
    assert accepted(GPTQFormat(4, 64), GEMMA_3_1B, heads=4)["vLLM"] == [1, 2, 4]  # 6912 / 4 = 27 · 64
    reason = next(
        verdict.reason
        for verdict in engine_support(GPTQFormat(4, 128), GEMMA_3_1B, attention_heads=4)
        if verdict.engine == "vLLM" and verdict.tensor_parallel == 8
    )
    assert "4 attention heads cannot be divided by 8" in reason
    assert "6912 inputs (down_proj) are not whole groups of 128 on each of 8 ranks" in reason


def test_smollm2_needs_groups_of_64_and_one_gpu() -> None:
    assert accepted(GPTQFormat(4, 128), SMOLLM2)["vLLM"] == []
    assert accepted(GPTQFormat(4, 64), SMOLLM2, heads=9)["vLLM"] == [1]


def test_modules_that_differ_are_read_by_some_engines_only() -> None:
    longer = GPTQSettings(modules={"down_proj": {"bits": 8}}).format
    assert {engine for engine, ranks in accepted(longer, LLAMA_8B).items() if ranks} == {
        "vLLM", "SGLang (Marlin)", "SGLang (legacy path)", "gptqmodel",
    }  # fmt: skip
    assert accepted(GPTQSettings(modules={"down_proj": {"bits": 3}}).format, LLAMA_8B)["vLLM"] == []
    skipping = accepted(GPTQSettings(skip=["down_proj"]).format, LLAMA_8B)
    assert skipping["AutoGPTQ"] == [] and skipping["transformers + gptqmodel"] == skipping["ExLlamaV2"] == [1]


def test_groups_are_those_of_each_module() -> None:
    settings = GPTQSettings(group_size=128, modules={"": {"group_size": 64}}).format
    assert accepted(settings, SMOLLM2, heads=9)["vLLM"] == [1]


def test_awq_is_read_by_four_engines() -> None:
    verdicts = engine_support(GPTQFormat(4, 128, sym=False), LLAMA_8B, method="awq")
    assert {verdict.engine for verdict in verdicts if verdict.accepts} == {
        "vLLM", "SGLang (Marlin)", "gptqmodel", "transformers + gptqmodel",
    }  # fmt: skip


def moe(**options) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        hidden_size=128, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, **options
    )


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (LlamaConfig(num_hidden_layers=1), {}),
        (GPT2Config(n_layer=1), {"transformers + gptqmodel": "cannot load GPT-2"}),
        (FalconConfig(num_hidden_layers=1), {"transformers + gptqmodel": "reads Falcon without the packed tensors"}),
        (
            MixtralConfig(num_hidden_layers=1),
            {"transformers + gptqmodel": "logits are off by 54 %", "gptqmodel": "mlp.experts.N.gate_proj"},
        ),
        (moe(), {"transformers + gptqmodel": "logits are off by 14 %"}),
        (
            moe(mlp_only_layers=[0]),
            {"transformers + gptqmodel": "logits are off by 14 %", "gptqmodel": "mlp_only_layers"},
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_architectures_that_gptqmodel_fails_with_are_named(config: PretrainedConfig, refused: dict[str, str]) -> None:
    shapes = model_shapes(skeleton(config)).linears
    verdicts = engine_support(GPTQFormat(4, 64), shapes, model_type=config.model_type)
    found = {
        verdict.engine: verdict.reason for verdict in verdicts if "gptqmodel" in verdict.engine and not verdict.accepts
    }
    assert found.keys() == refused.keys()
    assert all(part in found[engine] for engine, part in refused.items())
