"""The walk from layer to layer against the model's own forward: hidden states, groups, Hessians, padding."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora.data.calibration import CalibrationRow
from qlora.errors import UserError
from qlora.models.checkpoint import CheckpointReader
from qlora.quantization.calibration import make_batches
from qlora.quantization.modules import layer_linears
from qlora.quantization.skeleton import Skeleton
from qlora.quantization.states import CalibrationStates, enter_model, select_real
from qlora.quantization.walk import Walk, collect_statistics, layer_order

KINDS = ["llama", "qwen2", "qwen3", "gemma3"]


def open_walk(directory, rows, attn_implementation="sdpa", prompt_weight=1.0):
    """(skeleton, states before the first layer) on the CPU; batches of up to 200 tokens."""
    skeleton = Skeleton(CheckpointReader(directory), attn_implementation=attn_implementation, trust_remote_code=False)
    batches = make_batches(rows, 200, 160, "cpu", prompt_weight)
    assert any(batch.real is not None for batch in batches) and len(batches) > 1
    return skeleton, enter_model(skeleton, batches, "cpu")


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_hidden_states_are_those_of_the_model_run_row_by_row(save_model, rows, kind, attn_implementation):
    directory = save_model(kind)
    skeleton, states = open_walk(directory, rows, attn_implementation)
    model = load(directory)
    ordered = sorted((row.input_ids for row in rows), key=len, reverse=True)
    expected = [model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in ordered]
    layers = len(skeleton.layers)
    for index in range(layers + 1):
        found = torch.cat([select_real(h, b) for h, b in zip(states.on_device(), states.batches, strict=True)])
        if index == layers:
            found = model.get_decoder().norm(found)
        torch.testing.assert_close(found, torch.cat([row[index][0] for row in expected]), atol=2e-4, rtol=2e-4)
        if index < layers:
            states.advance(skeleton.fill_layer(index, "cpu"), index)


@torch.no_grad()
def test_linears_are_grouped_by_input_in_the_order_of_the_forward(save_model, rows):
    skeleton, states = open_walk(save_model("gemma3"), rows)
    layer = skeleton.fill_layer(0, "cpu")
    expected = [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    walk = Walk(layer, 0, layer_linears(layer), states)
    order = layer_order(walk, sequential=True)
    assert [[group.names for group in stage] for stage in order.stages] == [[names] for names in expected]
    assert not order.unreached
    assert {name: ending.part for name, ending in order.endings.items()} == {"self_attn.o_proj": "self_attn"}
    order = layer_order(walk, sequential=False)
    assert [[group.names for group in stage] for stage in order.stages] == [expected]
    assert not order.endings


@torch.no_grad()
def test_a_linear_that_never_runs_is_an_error(save_model, rows):
    skeleton, states = open_walk(save_model("llama"), rows)
    layer = skeleton.fill_layer(0, "cpu")
    with pytest.raises(UserError, match="runs 0 times"):
        layer_order(Walk(layer, 0, {**layer_linears(layer), "idle": nn.Linear(64, 64)}, states), sequential=True)


@torch.no_grad()
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_statistics_are_those_of_real_tokens_at_their_weights(save_model, rows, kind, weighted):
    directory = save_model(kind)
    if weighted:
        rows = [replace(row, loss=tuple(place >= 4 for place in range(len(row.input_ids)))) for row in rows]
    skeleton, states = open_walk(directory, rows, prompt_weight=0.25)
    layer = skeleton.fill_layer(0, "cpu")
    linears = layer_linears(layer)
    walk = Walk(layer, 0, linears, states)
    stages = layer_order(walk, sequential=False).stages
    statistics = collect_statistics(stages[0], walk)

    model = load(directory)
    inputs: dict[str, list[torch.Tensor]] = {group.first: [] for group in stages[0]}
    for name, seen in inputs.items():
        module = model.get_submodule(f"{skeleton.layers_name}.0.{name}")
        module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].double()))
    for row in rows:
        model(torch.tensor([row.input_ids]))
    weight_T1 = torch.cat([torch.ones(len(row.input_ids), 1, dtype=torch.float64) for row in rows])
    if weighted:
        weight_T1 = torch.where(torch.cat([torch.tensor(row.loss) for row in rows])[:, None], 1.0, 0.25).double()
    for name, found in zip(inputs, statistics, strict=True):
        x_TK = torch.cat(inputs[name])
        assert len(x_TK) == sum(len(row.input_ids) for row in rows) == found.tokens
        expected = ((x_TK * weight_T1).T @ x_TK / weight_T1.sum()).float()
        torch.testing.assert_close(found.hessian(), expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_drift_is_the_way_from_the_quantized_inputs_to_those_of_the_full_model(save_model, rows):
    skeleton, states = open_walk(save_model("llama"), rows)
    full_states = states.some(10**9)
    assert full_states.numbers == list(range(len(states.batches)))
    layer = skeleton.fill_layer(0, "cpu")
    full_layer = copy.deepcopy(layer)
    layer.self_attn.v_proj.weight.mul_(0.9)
    linears, full_linears = layer_linears(layer), layer_linears(full_layer)
    walk, full = Walk(layer, 0, linears, states), Walk(full_layer, 0, full_linears, full_states)
    stages = layer_order(walk, sequential=True).stages
    (found,) = collect_statistics(stages[1], walk, full)

    def inputs_of_o_proj(module, linear, states: CalibrationStates) -> torch.Tensor:
        seen = []
        handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for batch, hidden in enumerate(states.on_device()):
            states.run(module, 0, batch, hidden)
        handle.remove()
        return torch.cat([select_real(x, batch) for x, batch in zip(seen, states.batches, strict=True)]).double()

    name = stages[1][0].first
    x_TK = inputs_of_o_proj(layer, linears[name], states)
    full_TK = inputs_of_o_proj(full_layer, full_linears[name], full_states)
    torch.testing.assert_close(x_TK, 0.9 * full_TK, atol=1e-5, rtol=1e-4)
    expected = ((full_TK - x_TK).T @ x_TK / len(x_TK)).float()
    torch.testing.assert_close(found.drift(), expected, atol=1e-5, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_replayed_part_is_what_its_forward_is(save_model, rows, kind):
    skeleton, states = open_walk(save_model(kind), rows)
    layer = skeleton.fill_layer(0, "cpu")
    walk = Walk(layer, 0, layer_linears(layer), states)
    order = layer_order(walk, sequential=True)

    def outputs() -> list[torch.Tensor]:
        return [walk.forward(batch, hidden) for batch, hidden in enumerate(states.on_device())]

    ran = []
    layer.self_attn.q_proj.register_forward_hook(lambda *_: ran.append(1))
    with states.replaying():
        walk.prepare_replays(order.endings)
        for stage in order.stages[:2]:
            collect_statistics(stage, walk)
        layer.self_attn.o_proj.weight.mul_(0.9)  # what follows the kept inputs may still change
        expected = outputs()
        walk.start_replays(order.stages[1])
        ran.clear()
        for again in (outputs(), outputs()):
            for found, wanted in zip(again, expected, strict=True):
                assert torch.equal(found, wanted)
        assert not ran
    outputs()
    assert len(ran) == len(states.batches)


@torch.no_grad()
def test_a_part_that_changes_what_its_last_linear_gave_is_not_replayed(save_model, rows):
    skeleton, states = open_walk(save_model("llama"), rows)
    layer = skeleton.fill_layer(0, "cpu")
    layer.self_attn.register_forward_hook(lambda _, args, output: (output[0].mul_(0.5), *output[1:]))
    assert not layer_order(Walk(layer, 0, layer_linears(layer), states), sequential=True).endings


@torch.no_grad()
def test_a_part_whose_output_the_layer_changes_is_not_replayed(save_model, rows):
    skeleton, states = open_walk(save_model("llama"), rows)
    layer = skeleton.fill_layer(0, "cpu")

    def adds_in_place(hidden, **kwargs):
        output, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)
        output += hidden
        return output + layer.mlp(layer.post_attention_layernorm(output))

    walk = Walk(layer, 0, layer_linears(layer), states)
    expected = walk.forward(0, states.hidden(0))
    layer.forward = adds_in_place
    torch.testing.assert_close(walk.forward(0, states.hidden(0)), expected)
    assert not layer_order(walk, sequential=True).endings


@torch.no_grad()
def test_forwards_that_end_early_leave_no_activations(save_model, rows):
    """Not even to the garbage collector, which would come late: memory would grow with every pass."""
    skeleton, states = open_walk(save_model("llama"), rows)
    layer = skeleton.fill_layer(0, "cpu")
    walk = Walk(layer, 0, layer_linears(layer), states)
    stages = layer_order(walk, sequential=True).stages
    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(3):
            collect_statistics(stages[-1], walk)
            counts.append(sum(type(item) is torch.Tensor for item in gc.get_objects()))
        assert counts[0] == counts[1] == counts[2]
    finally:
        gc.enable()


@torch.no_grad()
def test_overflow_is_an_error_that_names_the_layer(save_model, rows):
    def explode(model):
        model.model.layers[1].mlp.down_proj.weight.data.mul_(1e6)

    skeleton, states = open_walk(save_model("llama", torch.float16, explode), rows)
    states.advance(skeleton.fill_layer(0, "cpu"), 0)
    with pytest.raises(UserError, match="layer 1 is not finite"):
        states.advance(skeleton.fill_layer(1, "cpu"), 1)


def test_weights_have_no_data_until_they_are_read(save_model, rows):
    skeleton, _ = open_walk(save_model("llama"), rows)
    matrices = [parameter for parameter in skeleton.model.parameters() if parameter.ndim == 2]
    assert matrices and all(parameter.is_meta for parameter in matrices)


def test_models_that_work_between_layers_are_refused(save_model, rows):
    skeleton = Skeleton(CheckpointReader(save_model("llama")), attn_implementation="sdpa", trust_remote_code=False)
    # A model may do anything around its layers; a hook stands for code that scales what passes between two of them.
    skeleton.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    with pytest.raises(UserError, match="between its layers"):
        enter_model(skeleton, make_batches(rows, 200, 160, "cpu"), "cpu")


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "no rows"), ([[1], []], "calibration row 1: no tokens"), ([[1, 160]], "outside the vocabulary of 160")],
)
def test_rows_that_cannot_calibrate_are_refused(rows, message):
    with pytest.raises(UserError, match=message):
        make_batches([CalibrationRow(tuple(row)) for row in rows], 100, 160, "cpu")


def test_batches_hold_every_row_once_and_little_padding(rows):
    batches = make_batches(rows, 100, 160, "cpu")
    assert sum(batch.tokens for batch in batches) == sum(len(row.input_ids) for row in rows)
    found = []
    for batch in batches:
        flat = batch.input_ids_BT.reshape(-1)
        found += flat.tolist() if batch.real is None else flat[batch.real].tolist()
    assert found == [token for row in sorted((row.input_ids for row in rows), key=len, reverse=True) for token in row]
    assert all(batch.input_ids_BT.numel() <= 100 for batch in batches)


def test_a_row_longer_than_a_batch_makes_one_alone():
    batches = make_batches(
        [CalibrationRow((token,) * length) for token, length in ((1, 30), (2, 5), (3, 5))], 10, 160, "cpu"
    )
    assert [tuple(batch.input_ids_BT.shape) for batch in batches] == [(1, 30), (2, 5)]
