"""Noise on embeddings: as large as a row's own length says, in training alone."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.training.neftune import add_noise, row_lengths
from qlora.training.packed import IGNORED, allow_packed, pack, pad

ALPHA, WIDTH = 5.0, 64
LENGTHS = (3, 40, 12)


@pytest.fixture
def noisy():
    """(model, what went into its decoder's layers)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").train()
    assert allow_packed(model) is None
    add_noise(model, ALPHA)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    return model, seen


def rows():
    return [(list(range(1, length + 1)), [IGNORED] * length) for length in LENGTHS]


def forward(model, batch):
    model(**{key: value for key, value in batch.items() if key not in ("labels", "targets", "predicting")})


@pytest.mark.parametrize("packed", [True, False])
def test_noise_is_as_large_as_a_rows_own_length_says(noisy, packed):
    model, seen = noisy
    batch = (pack if packed else pad)(rows())
    for _ in range(50):
        forward(model, batch)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    noise = torch.stack([each - embedded for each in seen]).detach()
    parts = noise[:, 0].split(LENGTHS, dim=1) if packed else [noise[:, i, :n] for i, n in enumerate(LENGTHS)]
    for part, length in zip(parts, LENGTHS, strict=True):
        size = ALPHA / (length * WIDTH) ** 0.5
        assert part.abs().max() <= size * 1.0001 and part.abs().max() > 0.98 * size
        assert part.std() == pytest.approx(size / 3**0.5, rel=0.02) and abs(part.mean()) < 0.02 * size


def test_there_is_none_in_evaluation_nor_without_gradients(noisy):
    model, seen = noisy
    batch = pack(rows())
    embedded = model.get_input_embeddings()(batch["input_ids"])
    forward(model.eval(), batch)
    with torch.no_grad():
        forward(model.train(), batch)
    assert all(torch.equal(each, embedded) for each in seen) and len(seen) == 2


def test_a_row_of_nothing_behind_packed_rows_does_no_harm():
    """Batches that are filled up for a recording end with rows without tokens."""
    ends = torch.tensor([0, 3, 7, 7, 7], dtype=torch.int32)
    lengths = row_lengths(torch.zeros(1, 7, dtype=torch.long), None, ends)
    assert lengths.tolist() == [[3.0] * 3 + [4.0] * 4]
