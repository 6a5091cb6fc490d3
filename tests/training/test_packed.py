"""Packed rows against the same rows one by one: losses and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SIZES
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from qlora.training import packed
from qlora.training.packed import allow_packed, pack

KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}
LENGTHS = (5, 23, 1, 12)


def model_of(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()


def some_rows():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]
    return [(row, [-100] * (len(row) // 3) + row[len(row) // 3 :]) for row in ids]


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_rows_one_by_one(kind):
    model, rows = model_of(kind), some_rows()
    counted = sum(label != -100 for _, labels in rows for label in labels[1:])
    expected = 0.0
    for ids, labels in rows:
        if any(label != -100 for label in labels[1:]):
            one = model(
                input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), num_items_in_batch=torch.tensor(counted)
            ).loss
            one.backward()
            expected += one.item()
    wanted = gradients(model)
    model.zero_grad()
    allow_packed(model)
    loss = model(**pack(rows), num_items_in_batch=torch.tensor(counted)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-9, name


@pytest.mark.parametrize("kind", KINDS)
def test_other_batches_go_the_old_way(kind):
    model = model_of(kind).eval()
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    with torch.no_grad():
        expected = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits]
        allow_packed(model)
        model(**pack(some_rows()))
        found = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits]
        generated = model.generate(ids[:, :12], max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][mask.bool()], expected[1][mask.bool()])
    assert generated.shape == (2, 16)


def test_rows_do_not_see_each_other():
    model = model_of("llama")
    allow_packed(model)
    rows = some_rows()
    with torch.no_grad():
        before = model(**pack(rows)).logits
        after = model(**pack([([7] * LENGTHS[0], [7] * LENGTHS[0]), *rows[1:]])).logits
    torch.testing.assert_close(before[:, LENGTHS[0] :], after[:, LENGTHS[0] :])
    assert not torch.equal(before[:, : LENGTHS[0]], after[:, : LENGTHS[0]])


@pytest.mark.parametrize("lengths", [(256, 256), (512,), (4, 4, 4)])
def test_rows_of_one_length_are_a_batch_of_them(lengths):
    """What a GPU does with full rows, on this device: equal to attention row by row."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), 16, generator=generator) for heads in (4, 2, 2))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    expected, _ = packed._attention(None, query, key, value, None, cu_seq_lens_q=ends, max_length_q=max(lengths))
    torch.testing.assert_close(packed._like_rows(query, key, value, len(lengths), None), expected)
    assert expected.shape == (1, sum(lengths), 4, 16)


@pytest.mark.parametrize("adapted", [False, True])
def test_no_mask_is_made_of_packed_rows(monkeypatch, adapted):
    """Nor looked for, which would wait for a GPU. PEFT calls the forward of what it wraps, and not the module."""
    model = model_of("llama")
    assert allow_packed(model) is None
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    looked, masks = [], []
    find = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: looked.append(1) or find(ids))
    for module in model.modules():
        if type(module).__name__ == "LlamaAttention":
            module.register_forward_pre_hook(lambda _, args, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
    model(**pack(some_rows()))
    assert not looked and len(masks) == 2 and not any(mask.numel() for mask in masks)
    model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 1, 0]]))
    assert masks[-1].shape == (1, 1, 3, 3) and not masks[-1].all()
