"""What a layer keeps, as the probe finds it, against what is known of a layer."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.training.fused import fuse
from qlora.training.packed import allow_packed
from qlora.training.probe import probe

HIDDEN, INNER, RANK = 64, 128, 4


def model_of(layers: int, targets="all-linear", dtype=torch.float32, dropout=0.0):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=256, max_position_embeddings=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=targets, lora_dropout=dropout))


def kept_bytes(model, layers, *, packed):
    return probe(model, layers, packed=packed).kept_bytes


def test_depth_and_packing_do_not_matter() -> None:
    found = [kept_bytes(model_of(layers), layers, packed=packed) for layers, packed in ((4, False), (12, False))]
    assert found[0] == pytest.approx(found[1], rel=0.1), "embeddings and the last norm are spread over the layers"
    model = model_of(4)
    assert allow_packed(model.get_base_model()) is None
    assert kept_bytes(model, 4, packed=True) == pytest.approx(found[0], rel=0.1)


def test_nothing_of_the_model_changes() -> None:
    model = model_of(2, dropout=0.1).eval()
    kept_bytes(model, 2, packed=False)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_stays_in_memory(fused) -> None:
    """The probe's graphs are gone with it, and with them what its layers kept."""
    model = model_of(2)
    if fused:
        fuse(model)
    alive = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, output: alive.append(weakref.ref(output)))
    kept_bytes(model, 2, packed=False)
    gc.collect()
    assert len(alive) == 4 and all(reference() is None for reference in alive)


def test_the_fused_path_is_found_to_keep_what_it_promises() -> None:
    """The layer's input and middle, q, k, v and what attention made of them, gate and up, ranks; a little per head."""
    model = model_of(8)
    plain = kept_bytes(model, 8, packed=False)
    fuse(model)
    fused = kept_bytes(model, 8, packed=False)
    promised = 4 * (2 * HIDDEN + 2 * HIDDEN + 2 * HIDDEN // 2 + 2 * INNER + 7 * RANK)
    assert promised <= fused < 1.05 * promised < 0.65 * plain, (promised, fused, plain)


def test_frozen_layers_keep_nothing() -> None:
    model = model_of(4)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert kept_bytes(model, 4, packed=False) == 0
