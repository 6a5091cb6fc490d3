"""The plan of training: what of a step is packed and computed again in so much memory."""

import random
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from qlora.errors import UserError
from qlora.models.resources import Pass, assumed_machine
from qlora.models.shapes import AdapterShapes, model_shapes, skeleton
from qlora.models.training_memory import DOUBLE_QUANT_BYTES, Probe, Trained
from qlora.recipe import Recipe
from qlora.training.plan import plan_training

GIB = 2**30
H100 = assumed_machine("cuda:0", "NVIDIA H100 80GB HBM3", 16)
ROWS = random.Random(0).choices(range(100, 600), k=400)
LONG_ROWS = [4096] * 64


@pytest.fixture(scope="module")
def llama_8b():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    return model_shapes(skeleton(config))


def planned(shapes, lengths, free_gib, processes=1, padded=False, **train):
    recipe = Recipe.model_validate(
        {"name": "t", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}, "train": train}
    )
    adapter = AdapterShapes(41_943_040)
    return plan_training(recipe, lengths, processes, shapes, adapter, H100, round(free_gib * GIB), padded=padded)


def test_more_memory_is_never_slower_and_never_exceeded(llama_8b) -> None:
    plans = [planned(llama_8b, LONG_ROWS, free, batch_size=16) for free in (7, 12, 16, 24, 48, 80)]
    recipe = Recipe.model_validate({"name": "t", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}})
    trained = Trained(recipe, llama_8b, AdapterShapes(41_943_040), H100, 4096)
    seconds = [
        plan.memory.forwards * trained.seconds(replace(plan.memory.largest, tokens=16 * 4096 // plan.memory.forwards))
        for plan in plans
    ]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > 1.2 * seconds[-1]
    for plan in plans[1:]:
        assert plan.memory.peak <= plan.budget
    assert (
        plans[0].memory.largest == Pass(4096, 32, offloaded=True, accumulated=True)
        and plans[-1].memory.largest.recomputed == 0
    )


def test_what_does_not_fit_is_the_smallest_there_is_and_says_so(llama_8b) -> None:
    plan = planned(llama_8b, LONG_ROWS, 2, batch_size=4)
    assert plan.memory.largest == Pass(4096, 32, offloaded=True, accumulated=True) and plan.memory.peak > plan.budget
    assert "32 of 32 layers recomputed from inputs in host memory" in plan.text and "of 1.8" in plan.text


def test_memory_that_is_left_holds_weights_in_16_bits(llama_8b) -> None:
    """Of so many layers as there is room for, which costs no time and saves dequantizing them."""
    rows = {"batch_size": 2, "micro_batch_tokens": 8192, "gradient_checkpointing": False}
    largest = [planned(llama_8b, LONG_ROWS, 80, memory=gib, **rows).memory for gib in (33, 36, 39, 60)]
    dense = [each.largest.dense for each in largest]
    assert dense == sorted(dense) and 0 < dense[1] < dense[2] < 32 == dense[3]
    assert all(each.peak <= gib * GIB for each, gib in zip(largest, (33, 36, 39, 60), strict=True))


def test_short_rows_are_packed_until_nothing_is_won(llama_8b) -> None:
    plan = planned(llama_8b, ROWS, 80, batch_size=32)
    assert plan.memory.largest.recomputed == 0
    assert plan.memory.largest.tokens == plan.schedule.longest(1) > 4000
    assert planned(llama_8b, ROWS, 80, batch_size=32, padded=True).schedule.padded


def test_what_the_recipe_fixes_stays_fixed(llama_8b) -> None:
    fixed = planned(llama_8b, ROWS, 80, batch_size=32, micro_batch_tokens=2000, gradient_checkpointing=True)
    assert fixed.schedule.longest(1) <= 2000 and fixed.memory.largest.recomputed == 32
    assert planned(llama_8b, ROWS, 3, batch_size=32, gradient_checkpointing=False).memory.largest.recomputed == 0
    given = planned(llama_8b, ROWS, 80, batch_size=32, memory=10)
    assert given.budget == 10 * GIB and given.memory.peak <= given.budget


def test_the_rows_of_a_step_do_not_depend_on_the_memory(llama_8b) -> None:
    def rows(plan):
        return [sorted(row for rows in step for row in rows) for step in plan.schedule.steps(0)]

    small, large = (planned(llama_8b, ROWS, free, batch_size=32) for free in (8, 80))
    assert small.schedule.forwards > large.schedule.forwards
    assert rows(small) == rows(large)


def test_processes_divide_the_rows_of_a_step(llama_8b) -> None:
    plan = planned(llama_8b, LONG_ROWS, 80, processes=4, batch_size=16)
    assert len(next(iter(plan.schedule.steps(0)))) == 4 * plan.memory.forwards <= 16
    with pytest.raises(UserError, match="without a row"):
        planned(llama_8b, LONG_ROWS, 80, processes=4, batch_size=3)


def test_a_shared_base_takes_its_part_and_two_layers(llama_8b) -> None:
    def parts(**train) -> dict[str, int]:
        return planned(llama_8b, LONG_ROWS, 80, processes=4, batch_size=16, **train).parts

    whole, shared = parts(), parts(shard=True)
    packed = DOUBLE_QUANT_BYTES * llama_8b.quantized
    assert whole["base"] - shared["base"] == pytest.approx(3 / 4 * packed, abs=4)
    assert shared["two layers that are gathered"] == pytest.approx(packed / 16, abs=4)
    assert whole["two layers that are gathered"] == shared["weights in 16 bits too"] == 0
    assert whole["weights in 16 bits too"] > 0
    assert "the base shared by 4 processes" in planned(llama_8b, LONG_ROWS, 80, processes=4, shard=True).text


def test_70b_in_4_bits_trains_on_two_cards_of_24_gb_that_share_it() -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    shapes = model_shapes(skeleton(config))
    options = {"processes": 2, "memory": 22.5}
    alone, shared = (planned(shapes, [1024] * 64, 24, shard=shard, **options) for shard in (False, True))
    assert alone.memory.peak > 35 * GIB and shared.memory.peak <= shared.budget


def test_what_is_computed_again_saves_memory_until_a_single_layer_is_left(llama_8b) -> None:
    recipe = Recipe.model_validate({"name": "t", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}})
    trained = Trained(recipe, llama_8b, AdapterShapes(41_943_040), H100, 4096)
    peaks = [trained.peak(Pass(8192, recomputed)) for recomputed in range(33)]
    assert all(more <= less for less, more in zip(peaks, peaks[1:-1], strict=False))
    # 47,104 numbers of 16 bits per token and layer, 112 of ranks, and of attention's 32 heads one of 32.
    kept = 8192 * (2 * (47104 + 7 * 16) + 4 * 32)
    assert peaks[0] - peaks[1] == pytest.approx(1.05 * (kept - 8192 * 2 * 4096), rel=1e-6)


def test_gradients_take_the_place_of_activations_unless_forwards_came_before(llama_8b) -> None:
    recipe = Recipe.model_validate({"name": "t", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}})
    trained = Trained(recipe, llama_8b, AdapterShapes(335_544_320), H100, 4096)
    gradients = 4 * 335_544_320
    alone, later = (trained.parts(Pass(8192, 32, accumulated=accumulated)) for accumulated in (False, True))
    assert alone["gradients"] == 0 and alone["inputs of recomputed layers"] == 32 * 8192 * 2 * 4096
    assert later == alone | {"gradients": gradients}
    # Inputs in host memory take less than gradients: the most is there at the end of the backward.
    offloaded = trained.parts(Pass(8192, 32, offloaded=True))
    assert offloaded["gradients"] == gradients * 31 // 32
    assert offloaded["inputs of recomputed layers"] == 8192 * 2 * 4096


def test_a_run_that_goes_on_keeps_its_division(llama_8b) -> None:
    recipe = Recipe.model_validate({"name": "t", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}})
    asked = recipe, ROWS, 1, llama_8b, AdapterShapes(41_943_040), H100
    first = plan_training(*asked, 8 * GIB, padded=False)
    again = plan_training(*asked, 80 * GIB, padded=False, before=first.division)
    assert again.division == first.division != plan_training(*asked, 80 * GIB, padded=False).division
    assert again.memory.largest == first.memory.largest and again.schedule == first.schedule


def test_passes_that_can_be_recorded_are_short_and_keep_all_gradients(llama_8b) -> None:
    """A host that launches slowly is no bound where passes are recorded, and one where they are not."""
    recipe = Recipe.model_validate({"name": "t", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}})
    slow = Probe(kept_bytes=95_000, launch_seconds=0.01)
    alone, recorded = (
        Trained(recipe, llama_8b, AdapterShapes(41_943_040), H100, 400, slow, records) for records in (False, True)
    )
    short, long = Pass(1024, 0), Pass(16384, 0)
    assert recorded.recorded(short) and not recorded.recorded(long) and not alone.recorded(short)
    assert not recorded.recorded(replace(short, offloaded=True, recomputed=32))
    assert alone.seconds(short) == pytest.approx(0.32)
    assert recorded.seconds(short) < 0.1
    assert alone.seconds(long) == recorded.seconds(long)
    parts = recorded.parts(short)
    gradients = parts["gradients"] - alone.parts(short)["gradients"]
    assert parts["gradients"] == 4 * 41_943_040
    assert recorded.peak(short) - alone.peak(short) == pytest.approx(1.05 * gradients, abs=2)
