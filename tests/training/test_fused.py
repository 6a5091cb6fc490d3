"""The fused path against PEFT's own: outputs and gradients, and which layers keep PEFT's."""

import copy
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from tiny_models import SIZES
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from qlora.training.fused import fuse, fuse_rotary

KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"hidden_activation": "gelu_pytorch_tanh"},
    "mistral": {},
}


def model_of(kind, dtype=torch.float32, quantized=True, config=None, **lora):
    """A tiny model with 4-bit linears and an adapter whose B is not zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **KINDS.get(kind, config or {}))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantized:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear and name != "lm_head":
                    four_bit = Linear4bit(
                        child.in_features, child.out_features, child.bias is not None, dtype, quant_type="nf4"
                    )
                    four_bit.load_state_dict(child.state_dict())
                    four_bit.support_avx512bf16_for_cpu = False
                    setattr(module, name, four_bit.to("cpu"))
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    adapted = get_peft_model(model, LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def loss_and_gradients(model, **options):
    ids = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model.train()
    loss = model(input_ids=ids, labels=ids, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model, fused_linears, blocks, tolerance=1e-4):
    expected, gradients = loss_and_gradients(model)
    done = fuse(model)
    assert (done.linears, done.blocks) == (fused_linears, blocks)
    found, own = loss_and_gradients(model)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    assert own.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name
    return done


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_peft(kind, quantized):
    assert not compare(model_of(kind, quantized=quantized), 14, 2).plain


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_weights_that_are_kept_dequantized_give_the_same_bits(kind):
    model, dense = model_of(kind, torch.bfloat16), model_of(kind, torch.bfloat16)
    fuse(model)
    fuse(dense).keep_dense()
    (loss, gradients), (same, others) = loss_and_gradients(model), loss_and_gradients(dense)
    assert torch.equal(loss, same)
    assert gradients.keys() == others.keys() and all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert dense.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_products_in_8_bits_take_the_same_path(kind):
    """Near what they round, with the same blocks and layers fused; the same bits from weights kept in 8 bits."""
    plain, eight, kept = (model_of(kind, torch.bfloat16) for _ in range(3))
    done = fuse(plain), fuse(eight, float8=True), fuse(kept, float8=True)
    done[2].keep_dense()
    counts = {(each.linears, each.blocks, each.norms, each.residuals) for each in done}
    assert len(counts) == 1
    (loss, gradients), (found, own), (same, others) = (loss_and_gradients(model) for model in (plain, eight, kept))
    torch.testing.assert_close(found, loss, rtol=0.02, atol=0)
    assert not torch.equal(found, loss) and torch.equal(found, same)
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() < 0.25 * gradient.norm(), name
        assert torch.equal(own[name], others[name])


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 8}, "alpha_pattern": {"up_proj": 32}},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["k_proj", "down_proj"]},
    ],
)
def test_ranks_scalings_and_targets_of_every_kind(lora):
    targets = lora.get("target_modules")
    compare(model_of("llama", **lora), 14 if targets is None else 4, 2 if targets is None else 0)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"lora_dropout": 0.1}, "dropout"),
        ({"use_dora": True}, "a variant of LoRA"),
        ({"lora_bias": True}, "a bias in the adapter"),
    ],
)
def test_what_is_not_covered_keeps_its_forward_and_is_named(lora, reason):
    model = model_of("llama", **lora)
    before = {name: module.forward for name, module in model.named_modules() if name.endswith("_proj")}
    done = fuse(model)
    assert (done.linears, done.blocks) == (0, 0)
    assert [(key.startswith(reason), count) for key, count in done.plain.items()] == [(True, 14)]
    assert all(model.get_submodule(name).forward == forward for name, forward in before.items())


def test_a_block_of_another_formula_is_not_fused():
    model = model_of("llama")
    for layer in model.base_model.model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: 2 * mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    compare(model, 14, 0)
    model = model_of("llama")
    for layer in model.base_model.model.model.layers:
        layer.mlp.act_fn = ACT2FN["relu"]
    compare(model, 14, 0)


@pytest.mark.parametrize(
    ("kind", "options", "layers"),
    [
        *(("llama", {}, 2), ("qwen2", {}, 2), ("qwen3", {}, 2), ("mistral", {}, 2)),
        *(("gemma3_text", {}, 0), ("olmo2", {}, 0), ("granite", {"residual_multiplier": 0.5}, 0)),
    ],
)
def test_layers_of_another_formula_keep_their_residual_stream(kind, options, layers):
    assert fuse(model_of(kind, config=options)).residuals == layers


def test_a_norm_that_learns_keeps_its_own_forward():
    model = model_of("llama", modules_to_save=["post_attention_layernorm"])
    assert fuse(model).residuals == 0


def test_a_layer_keeps_nothing_twice():
    """Of each layer: both norms' inputs and scales, q, k, v, attention's output, what gate and up gave, ranks."""
    model = model_of("llama")
    fuse(model)
    tokens = 17 * 2
    kept: dict[int, int] = {}

    def note(tensor):
        if tensor.numel() >= tokens and tensor.dtype.is_floating_point and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4 // tokens
        return tensor

    layer = model.base_model.model.model.layers[0]
    x = torch.randn(2, 17, 64, requires_grad=True)
    places = model.base_model.model.model.rotary_emb(x, torch.arange(17)[None])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x, position_embeddings=places)
    widths = sum(width for width in kept.values())
    hidden, keys, inner, ranks = 64, 32, 128, 7 * 4
    # Rotary embeddings of transformers keep nothing but cos and sin; SDPA on a CPU keeps q, k, v and its output.
    # Beside these, numbers per token: cos and sin, the norms' scales, the normalisers of attention.
    assert widths <= 3 * hidden + (hidden + 2 * keys) + 2 * inner + ranks + 24


def test_with_checkpointing_gradients_stay():
    model = model_of("llama")
    _, expected = loss_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fuse(model)
    _, found = loss_and_gradients(model)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def test_an_adapter_that_is_off_stays_off():
    model = model_of("llama")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        with model.disable_adapter():
            expected = model(input_ids=ids).logits
            fuse(model)
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-4)


def test_parameters_and_files_stay_those_of_peft(tmp_path):
    model = model_of("llama")
    names = [name for name, _ in model.named_parameters()]
    state = copy.deepcopy(model.state_dict())
    fuse(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_rotary_embedding_is_replaced_where_it_is_the_same_and_only_for_training_on_a_gpu(monkeypatch):
    module = sys.modules[type(model_of("llama").get_base_model()).__module__]
    plain = getattr(module.apply_rotary_pos_emb, "plain", module.apply_rotary_pos_emb)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", plain)  # put back afterwards
    assert fuse_rotary(model_of("llama")) == 1
    replaced = module.apply_rotary_pos_emb
    assert replaced is not plain and replaced.plain is plain
    assert fuse_rotary(model_of("llama")) == 0, "once is enough"
    query, angles = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 3, 8)
    assert all(map(torch.equal, replaced(query, query, angles, angles), plain(query, query, angles, angles)))
    module.apply_rotary_pos_emb = lambda q, k, cos, sin: (q, k)
    assert fuse_rotary(model_of("llama")) == 0, "another embedding"


@pytest.mark.parametrize("through", ["the adapter model", "the model inside"])
def test_adapters_that_change_count_from_the_next_forward_on(through):
    model = model_of("llama")
    fuse(model)
    ids = torch.arange(9)[None]
    called = model if through == "the adapter model" else model.get_base_model()
    before = called(input_ids=ids).logits
    fresh = model_of("llama")
    for each in (model, fresh):
        for parameter in each.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(1.5)
    after = called(input_ids=ids).logits
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
