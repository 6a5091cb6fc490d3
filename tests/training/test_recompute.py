"""Layers that run again in the backward: the same losses and gradients, and less that is kept."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.kernels import lora_linears
from qlora.kernels.rotary import learns
from qlora.training.fused import fuse
from qlora.training.recompute import recompute_first

KINDS = ["llama", "qwen3", "gemma3_text", "gpt_neox"]
LAYERS = 3
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


def model_of(kind: str, device: str = "cpu", **lora):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=256, max_position_embeddings=128, hidden_dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **lora))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.to(device).train()


def learned(model, dtype=None) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and bytes of distinct tensors kept for the backward."""
    device = next(model.parameters()).device
    ids = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(1)).to(device)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad()
    torch.manual_seed(2)
    autocast = torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return (
        loss.detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad},
        sum(kept.values()),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("layers", [1, LAYERS])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_stay_the_same_and_less_is_kept(kind, layers, offload, device):
    model = model_of(kind, device)
    loss, gradients, kept = learned(model)
    recompute_first(model.get_base_model(), layers, offload=offload)
    again, same, less = learned(model)
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-6)
    assert less < (1 - 0.8 * layers / LAYERS) * kept + 3e5


def test_autocast_is_that_of_the_forward():
    model = model_of("llama")
    loss, gradients, _ = learned(model, torch.bfloat16)
    recompute_first(model.get_base_model(), LAYERS)
    again, same, _ = learned(model, torch.bfloat16)
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert torch.equal(same[name], gradient), name


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_forward_takes_the_path_of_the_second(device):
    """To the bit: what the loss is computed from is what the gradients are computed from."""
    model = model_of("llama", device).bfloat16()
    fuse(model)
    loss, gradients, _ = learned(model)
    recompute_first(model.get_base_model(), LAYERS)
    again, same, _ = learned(model)
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert torch.equal(same[name], gradient), name


def test_rotary_embeddings_of_a_first_forward_know_that_a_backward_comes(monkeypatch):
    model, found = model_of("llama"), []
    recompute_first(model.get_base_model(), 2)
    learned(model)  # the first backward finds out what it can do without
    module = sys.modules["transformers.models.llama.modeling_llama"]
    plain = module.apply_rotary_pos_emb

    def noting(q, k, *others, **named):
        found.append(learns(q, k))
        return plain(q, k, *others, **named)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", noting)
    learned(model)
    assert found == [True] * (LAYERS + 2)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert found[LAYERS + 2 :] == [False] * LAYERS


def test_dropout_drops_the_same_again():
    model = model_of("llama", lora_dropout=0.5)
    loss, gradients, _ = learned(model)
    recompute_first(model.get_base_model(), LAYERS)
    again, same, _ = learned(model)
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-6)


def test_what_was_asked_last_counts():
    model = model_of("llama")
    kept = learned(model)[2]
    recompute_first(model.get_base_model(), LAYERS)
    assert learned(model)[2] < kept
    recompute_first(model.get_base_model(), 0)
    assert learned(model)[2] == kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "goes_without"), [("llama", True), ("qwen3", True), ("gemma3_text", False)])
def test_the_last_product_is_left_out_where_nothing_reads_it(kind, goes_without, device, monkeypatch):
    model = model_of(kind, device)
    fuse(model)
    loss, gradients, _ = learned(model)
    recompute_first(model.get_base_model(), LAYERS)
    learned(model)
    down = 0
    plain = lora_linears.products

    def counting(x, linears):
        nonlocal down
        down += len(linears) == 1 and x.shape[1] == 128
        return plain(x, linears)

    monkeypatch.setattr(lora_linears, "products", counting)
    again, same, _ = learned(model)
    assert down == (LAYERS if goes_without else 2 * LAYERS)
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-6)
