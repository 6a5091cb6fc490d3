"""Formulas for GPTQ and refinement against what was measured, and against each other."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig

from qlora.errors import UserError
from qlora.models.estimates import estimate_stages
from qlora.models.quantize_estimates import gptq_disk_bytes, quantized_linears, solved_together
from qlora.models.resources import Machine, Pass, Rows, StageEstimate, Workload, assumed_machine
from qlora.models.shapes import AdapterShapes, ModelShapes, model_shapes, skeleton
from qlora.recipe import Recipe

GIB = 2**30
H100 = assumed_machine("cuda:0", "NVIDIA H100 80GB HBM3", 16)
TWO_CORES = assumed_machine("cpu", "CPU", 2)
SMOLLM2 = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip


def recipe(**quantize: Any) -> Recipe:
    """Plain GPTQ, but for what is asked for."""
    sections: dict[str, Any] = {"name": "t", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}}
    return Recipe.model_validate(sections | {"quantize": {"asymmetric_calibration": 0, "refine": None} | quantize})


def estimate(
    shapes: ModelShapes, rows: int, length: int, machine: Machine = H100, merge: dict | None = None, **quantize: Any
) -> dict[str, StageEstimate]:
    """Stage → estimate, with as many rows of one length for GPTQ and for refinement."""
    given = Rows(rows * length, length)
    work = Workload(1000, 100, Pass(100, 0), given, given if "refine" in quantize else None, Rows(0, 0), 0, 0)
    asked = Recipe.model_validate(recipe(**quantize).model_dump() | {"merge": merge or {}})
    return {stage.stage: stage for stage in estimate_stages(asked, shapes, AdapterShapes(1000), work, machine)}


@pytest.fixture(scope="module")
def llama_7b() -> ModelShapes:
    return model_shapes(
        skeleton(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000))
    )


@pytest.fixture(scope="module")
def smollm2() -> ModelShapes:
    return model_shapes(skeleton(SMOLLM2))


@pytest.mark.parametrize(("asymmetric_calibration", "measured"), [(0.0, 24.6), (0.5, 25.5)])
def test_time_of_a_7b_shape_is_what_was_measured(llama_7b, asymmetric_calibration, measured) -> None:
    """On an H100, by scripts/bench/gptq.py: scripts/bench/results/gptq-llama-2-7b-h100*.json."""
    found = estimate(llama_7b, 128, 2048, asymmetric_calibration=asymmetric_calibration)["quantize"]
    assert found.seconds == pytest.approx(measured, rel=0.1)


def test_time_of_smollm2_on_two_cores_is_that_of_its_solving_and_more(smollm2) -> None:
    """0.45 s per layer of solving; the whole in 75 s."""
    seconds = estimate(smollm2, 64, 256, TWO_CORES, group_size=64)["quantize"].seconds
    assert 30 * 0.45 < seconds < 75
    almost_no_rows = estimate(smollm2, 1, 1, TWO_CORES, group_size=64)["quantize"].seconds
    assert almost_no_rows == pytest.approx(30 * 0.45, rel=0.05)


def test_gpu_memory_does_not_grow_with_the_rows_and_host_memory_does(llama_7b) -> None:
    few, many = (estimate(llama_7b, rows, 2048)["quantize"] for rows in (128, 1024))
    assert few.device == many.device < 8 * GIB
    # The hidden states, and what a layer's attention made of them.
    assert many.host - few.host == 2 * 896 * 2048 * 4096 * 2


def test_the_widest_input_decides_the_memory_of_a_70b_shape() -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64, num_key_value_heads=8
    )
    quantize = estimate(model_shapes(skeleton(config)), 128, 2048)["quantize"]
    hessians = quantize.parts["statistics of inputs"] + quantize.parts["Hessian and its factors"]
    assert hessians == 4 * 2 * 28672**2
    assert quantize.parts["weights being solved"] == 4 * 4 * 8192 * 28672, "down_proj alone; gate and up are narrower"
    assert quantize.device < 24e9


def test_without_stages_all_statistics_of_a_layer_exist_at_once(llama_7b) -> None:
    parts = estimate(llama_7b, 128, 2048, true_sequential=False)["quantize"].parts
    assert parts["statistics of inputs"] == 4 * (3 * 4096**2 + 11008**2)


def test_asymmetric_calibration_costs_a_second_model(llama_7b) -> None:
    plain, asymmetric = (estimate(llama_7b, 128, 2048, asymmetric_calibration=a)["quantize"] for a in (0.0, 0.5))
    # The full model sees a quarter of these rows.
    assert 1.1 * plain.seconds < asymmetric.seconds < 1.5 * plain.seconds
    for part in ("one layer", "statistics of inputs"):
        assert asymmetric.parts[part] == 2 * plain.parts[part]
    assert asymmetric.parts["hidden states"] - plain.parts["hidden states"] == 2 * 2**16 * 4096 * 2


def test_linears_of_one_input_are_solved_as_one_where_their_settings_agree(llama_7b) -> None:
    def kinds(**quantize: Any) -> list[list[str]]:
        groups = solved_together(quantized_linears(recipe(**quantize), llama_7b))
        return [
            [linear.name.rpartition(".")[2] for linear in group.linears]
            for group in groups
            if group.layer == "model.layers.31."
        ]

    assert kinds() == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert kinds(skip=["mlp"], modules={r"layers\.31\.self_attn\.o": {"bits": 8}}) == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"],
    ]  # fmt: skip


def test_statistics_of_all_experts_of_a_layer_are_gathered_together() -> None:
    shapes = model_shapes(skeleton(MixtralConfig(num_hidden_layers=2)))
    for asymmetric in (0, 0.5):  # which leaves experts out
        quantize = estimate(shapes, 128, 2048, asymmetric_calibration=asymmetric)["quantize"]
        assert quantize.parts["statistics of inputs"] == 4 * 8 * 14336**2


def test_disk_follows_the_settings_of_each_module(llama_7b) -> None:
    down = 32 * 4096 * 11008
    plain = gptq_disk_bytes(recipe(), llama_7b)
    longer = gptq_disk_bytes(recipe(modules={"down_proj": {"bits": 8}}), llama_7b)
    assert longer - plain == down // 2 + down // 128 // 2, "codes and zero points"
    skipped = gptq_disk_bytes(recipe(skip=["down_proj"]), llama_7b)
    assert skipped - plain == 2 * down - down // 2 - down // 128 * 5 // 2 - 32 * 4 * 11008
    with pytest.raises(UserError, match="every module is skipped"):
        gptq_disk_bytes(recipe(skip=["layers"]), llama_7b)


def test_refinement_is_estimated_by_itself(llama_7b, smollm2) -> None:
    assert "refine" not in estimate(llama_7b, 128, 2048)
    refine = estimate(llama_7b, 128, 2048, refine={})["refine"]
    eight_flops = 8 * (llama_7b.active + llama_7b.head) * 50 * 8192 / (0.6 * 989e12)
    assert eight_flops < refine.seconds < 1.5 * eight_flops
    assert refine.parts["scales in training"] == 16 * llama_7b.active // 128
    assert refine.host > 128 * 2048 * 4096 * 2, "what the teacher said"
    half = estimate(llama_7b, 128, 2048, refine={"steps": 25})["refine"]
    assert half.seconds < 0.7 * refine.seconds and half.device == refine.device
    on_cpu = estimate(smollm2, 64, 256, TWO_CORES, group_size=64, refine={})["refine"]
    assert on_cpu.seconds == pytest.approx(50 * 8192 * 7.5e-3 / 2, rel=0.05)
    assert on_cpu.parts["scales in training"] == 16 * smollm2.active // 64


def test_steps_are_not_longer_than_the_rows(smollm2) -> None:
    few = estimate(smollm2, 10, 20, refine={})["refine"]
    assert few.parts["saved activations"] < estimate(smollm2, 100, 20, refine={})["refine"].parts["saved activations"]


def test_a_merge_on_the_way_reads_in_fp32_and_takes_its_time(llama_7b) -> None:
    written, direct = (estimate(llama_7b, 128, 2048, merge={"write": write})["quantize"] for write in (True, False))
    assert direct.seconds > written.seconds and direct.host > written.host


def test_no_time_is_known_for_another_engine_or_gpu(llama_7b) -> None:
    assert estimate(llama_7b, 128, 2048, engine="gptqmodel")["quantize"].seconds is None
    unknown = assumed_machine("cuda:0", "NVIDIA GeForce GTX 1050", 8)
    stages = estimate(llama_7b, 128, 2048, unknown, refine={})
    assert stages["quantize"].seconds is stages["refine"].seconds is None


def test_general_text_is_counted_in_what_evaluation_takes(llama_7b: ModelShapes) -> None:
    work = Workload(1000, 100, Pass(100, 0), Rows(100, 10), None, Rows(1000, 100), 500, 50)
    found = [
        estimate_stages(asked, llama_7b, AdapterShapes(1000), work, H100)[-1]
        for general in (None, "wikitext2")
        for asked in [
            Recipe.model_validate(recipe().model_dump() | {"evaluate": {"general": general, "survival": False}})
        ]
    ]
    assert found[1].disk - found[0].disk == 2 * 16384 * 32000
    assert found[1].parts["logits"] == 2 * 8 * 512 * 32000 * 2 > found[0].parts["logits"]
    of_five_models = 5 * 16384 * 2 * llama_7b.active / (0.35 * 989e12)
    assert of_five_models < found[1].seconds - found[0].seconds < 1.2 * of_five_models
