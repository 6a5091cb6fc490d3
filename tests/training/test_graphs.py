"""Batches filled up to a few sizes, and passes recorded on them: the same losses and gradients."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.training.flat import Flat
from qlora.training.fused import fuse, fuse_head
from qlora.training.graphs import Graphs, Room
from qlora.training.packed import IGNORED, allow_packed, pack
from qlora.training.recompute import recompute_first
from qlora.training.schedule import Schedule

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
VOCABULARY = 256
SCHEDULE = Schedule([5, 90, 33, 60, 12, 77, 48, 20] * 8, rows_per_step=4, forwards=1, processes=1, seed=0)


def model_of(device, dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).to(device)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert allow_packed(model.get_base_model()) is None and fuse_head(model) is None
    fuse(model)
    return model.train()


def batch_of(rows):
    generator = torch.Generator().manual_seed(sum(rows))
    tokens = [torch.randint(1, VOCABULARY, (SCHEDULE.lengths[row],), generator=generator).tolist() for row in rows]
    batch = pack([(ids, [IGNORED] * (len(ids) // 2) + ids[len(ids) // 2 :]) for ids in tokens])
    return {key: value for key, value in batch.items() if key != "labels"} | {"num_items_in_batch": torch.tensor(200)}


def learned(model, run, batches):
    """Losses of all batches and the gradients of all together."""
    model.zero_grad(set_to_none=True)
    if isinstance(run, Graphs):
        run._flat.zero_grad()
    losses = torch.stack([run(batch) for batch in batches])
    return losses, [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def forward_and_backward(model):
    device = next(model.parameters()).device

    def run(batch):
        inputs = {key: each.to(device) if isinstance(each, torch.Tensor) else each for key, each in batch.items()}
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return run


@pytest.mark.parametrize("device", DEVICES)
def test_what_fills_a_batch_is_not_learned_from(device) -> None:
    model, room = model_of(device), Room.of(SCHEDULE)
    batches = [batch_of(rows) for step in SCHEDULE.steps(0) for rows in step][:4]
    losses, gradients = learned(model, forward_and_backward(model), batches)
    filled = [batch | room.filled(batch) for batch in batches]
    assert all(batch["input_ids"].shape[1] % room.tokens == 0 for batch in filled)
    found, same = learned(model, forward_and_backward(model), filled)
    torch.testing.assert_close(found, losses)
    for gradient, expected in zip(same, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_an_epoch_has_few_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 600, (7000,), generator=generator).tolist()
    schedule = Schedule(lengths, rows_per_step=16, forwards=1, processes=1, seed=0)
    room = Room.of(schedule)
    sizes = {
        -(-sum(lengths[row] for row in rows) // room.tokens) * room.tokens
        for step in schedule.steps(0)
        for rows in step
    }
    assert len(sizes) <= 12
    mean = sum(lengths) / len(lengths) * 16
    assert sum(sizes) / len(sizes) < 1.2 * mean and room.tokens < mean / 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("dtype", "recomputed", "recorded"),
    [(torch.float32, 0, False), (torch.bfloat16, 0, True), (torch.bfloat16, 1, True)],
)
def test_recorded_passes_learn_the_same(dtype, recomputed, recorded) -> None:
    """In fp32 attention goes row by row, which no graph can hold."""
    model, room = model_of("cuda", dtype), Room.of(SCHEDULE)
    recompute_first(model.get_base_model(), recomputed)
    steps = [batch_of(rows) for _ in range(3) for step in SCHEDULE.steps(0) for rows in step]
    filled = [batch | room.filled(batch) for batch in steps]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = Flat(parameters)
    graphs = Graphs(lambda inputs: model(**inputs, use_cache=False).loss, flat)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for start in range(0, len(filled), 3):  # three passes add up to a step
        losses, gradients = learned(model, forward_and_backward(model), filled[start : start + 3])
        found, same = learned(model, graphs, filled[start : start + 3])
        torch.testing.assert_close(found, losses, rtol=tolerance, atol=tolerance)
        for gradient, expected in zip(same, gradients, strict=True):
            assert (gradient - expected).norm() <= tolerance * expected.norm()
        with torch.no_grad():  # adapters change between steps
            for parameter in parameters:
                parameter += 0.01 * torch.randn_like(parameter)
    count = len(graphs._recorded)
    assert count >= 3 if recorded else count == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_a_graph_cannot_hold_runs_without(caplog) -> None:
    model, room = model_of("cuda"), Room.of(SCHEDULE)
    batch = batch_of([0, 1, 2])
    batch |= room.filled(batch)

    def waits(inputs):
        loss = model(**inputs, use_cache=False).loss
        return loss * (2 if loss.item() > 1e9 else 1)

    flat = Flat([each for each in model.parameters() if each.requires_grad])
    graphs = Graphs(waits, flat)
    losses, gradients = learned(model, forward_and_backward(model), [batch])
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            found, same = learned(model, graphs, [batch])
            torch.testing.assert_close(found, losses)
            torch.testing.assert_close(same, gradients, rtol=1e-4, atol=1e-6)
    assert caplog.text.count("without CUDA graphs") == 1
