"""Decoding with a static cache says what `generate` says, for every form of a model and kind of layer."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, MambaConfig, MambaForCausalLM

from qlora.errors import UserError
from qlora.evaluation.bench_models import Subject, load
from qlora.evaluation.decoding import Decoder
from qlora.models.packed_base import load_packed
from qlora.models.packed_decoding import DecodingLinear, speed_up
from qlora.recipe import Model

PROMPT, NEW = 11, 24


def prompts(rows: int) -> torch.Tensor:
    return torch.randint(3, 150, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))


def generated(model, ids: torch.Tensor) -> torch.Tensor:
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return found[:, ids.shape[1] :]


def check(model) -> None:
    for rows in (1, 3):
        ids = prompts(rows)
        expected = generated(model, ids)
        decoder = Decoder(model, rows, PROMPT + NEW)
        assert torch.equal(decoder.greedy(ids, NEW), expected)
        assert torch.equal(decoder.greedy(ids.flip(0), NEW), generated(model, ids.flip(0)))  # nothing is left of before
        assert not decoder.has_graph


@pytest.mark.parametrize("form", ["16bit", "nf4", "nf4-double", "int8"])
def test_every_form_of_a_16_bit_model_says_what_generate_says(form, tiny_model):
    loaded = load(Subject(str(tiny_model), form), "float32", "cpu")
    assert loaded.seconds > 0
    check(loaded.model)


@pytest.mark.parametrize(("method", "desc_act"), [("gptq", False), ("gptq", True), ("awq", False)])
def test_packed_codes_say_what_they_say_without_fusion(method, desc_act, save_packed):
    directory = save_packed(method, desc_act=desc_act)
    plain = load_packed(directory, Model(base=str(directory), quantization="checkpoint"), torch.float32, "cpu")
    ids = prompts(2)
    expected = generated(plain, ids)
    fast = load(Subject(str(directory), method, "qlora"), "float32", "cpu").model
    layer = fast.model.layers[0]
    assert isinstance(layer.mlp.down_proj, DecodingLinear)
    # Without an order of their own, inputs are shared: both block and layer are fused.
    assert ("forward" in vars(layer)) == ("forward" in vars(layer.mlp)) == (not desc_act)
    assert torch.equal(generated(fast, ids), expected)
    check(fast)


def test_biases_are_merged_too(save_packed):
    directory = save_packed("gptq")
    plain, fast = (
        load_packed(directory, Model(base=str(directory), quantization="checkpoint"), torch.float32, "cpu")
        for _ in range(2)
    )
    for model in (plain, fast):
        generator = torch.Generator().manual_seed(0)
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                linear = getattr(layer.self_attn, name)
                linear.bias = torch.nn.Parameter(torch.randn(linear.out_features, generator=generator), False)
    assert speed_up(fast) == 4 * 2
    ids = prompts(2)
    found, expected = (
        fast(ids).logits,
        plain(ids).logits,
    )  # of weights in fp32, and rounded to bf16 as training has them
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_layers_with_a_window_hide_what_is_behind_it():
    torch.manual_seed(0)
    sizes = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "sliding_window": 8}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    check(Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=kinds)).eval())


def test_recurrent_states_are_refused():
    config = MambaConfig(vocab_size=160, hidden_size=32, state_size=4, num_hidden_layers=2)
    with pytest.raises(UserError, match="state of another kind"):
        Decoder(MambaForCausalLM(config), 1, 8)


def test_without_a_gpu_a_graph_is_not_made_and_it_says_so(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    decoder = Decoder(model, 1, PROMPT + NEW, graphs=True)
    decoder.greedy(prompts(1), 4)
    assert not decoder.has_graph and decoder.eager_because == "no CUDA graphs on cpu"
