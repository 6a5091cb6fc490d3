"""Attention of one token against fp32: on a GPU, or on a CPU in Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/kernels/test_one_token.py

runs the kernels where there is no GPU but a Triton package.
"""

import importlib.util
import os

import pytest
import torch

from qlora.kernels.one_token import TILES, Tiles, append, attend, reference, takes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=ON_GPU),
]
SHAPES = {
    "a head of keys each": (1, 4, 4, 128, 64),
    "heads that share": (2, 6, 2, 200, 80),
    "all share": (3, 4, 1, 70, 16),
    "a 7B model": (2, 32, 32, 1152, 128),
}
"""Rows, heads, heads of keys, slots, width."""


def inputs(shape, device, dtype=torch.float16):
    rows, heads, groups, slots, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(slots)
    # As models make them: tokens before heads in memory.
    query = torch.randn(rows, 1, heads, width, generator=generator).transpose(1, 2)
    keys, values = (torch.randn(rows, groups, slots, width, generator=generator) for _ in range(2))
    return [x.to(device, dtype) for x in (query, keys, values)]


def mask_of(kind, rows, slots, device, dtype):
    if kind is None:
        return None
    seen = torch.arange(slots)[None] < (slots // 3 + 1 + torch.arange(rows)[:, None])
    if kind == "sliding window":
        seen &= torch.arange(slots)[None] > slots // 6
    if kind == "holes":
        seen &= (torch.arange(slots)[None] < 3) | (torch.arange(slots)[None] > slots // 4)
    if kind == "numbers":
        return torch.zeros(1, 1, 1, slots).masked_fill(~seen[:1, None, None], -torch.inf).to(device, dtype)
    return seen[:, None, None].to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", [None, "booleans", "sliding window", "holes", "numbers"])
@pytest.mark.parametrize("tiles", [TILES, Tiles(slots=16, stages=2, per_processor=100)])
def test_attention_is_that_of_fp32(device, shape, mask, tiles):
    if device == "cpu" and shape == "a 7B model":
        pytest.skip("too much for the interpreter")
    query, keys, values = inputs(shape, device)
    given = mask_of(mask, len(query), keys.shape[2], device, query.dtype)
    found = attend(query, keys, values, given, 0.1, tiles)
    expected = reference(query.float(), keys.float(), values.float(), given, 0.1)
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(found, attend(query, keys, values, given, 0.1, tiles))


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_mask_hides_is_not_read(device):
    query, keys, values = inputs("a head of keys each", device)
    given = mask_of("booleans", 1, keys.shape[2], device, query.dtype)
    expected = attend(query, keys, values, given, 0.1)
    keys[:, :, TILES.slots :] = torch.nan
    values[:, :, TILES.slots :] = torch.nan
    assert torch.equal(attend(query, keys, values, given, 0.1), expected)


@pytest.mark.parametrize("mask", [None, "booleans", "numbers"])
def test_the_plain_version_is_torchs(mask):
    query, keys, values = (x.float() for x in inputs("heads that share", "cpu"))
    given = mask_of(mask, 2, keys.shape[2], "cpu", torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=given, scale=0.1, enable_gqa=True
    )
    torch.testing.assert_close(reference(query, keys, values, given, 0.1), expected.transpose(1, 2))
    assert not takes(query, keys, given)


@pytest.mark.parametrize("device", ["cpu", DEVICES[1]])
@pytest.mark.parametrize("slots", [[7], [2, 3, 4]])
def test_tokens_are_put_into_their_slots(device, slots):
    keys, values = (torch.randn(2, 3, 10, 20, device=device) for _ in range(2))
    # Parts of one merged linear's output, as a model with heads that share keys has them.
    merged = torch.randn(2, len(slots), 2 * 60, device=device)
    key, value = (part.unflatten(-1, (3, 20)).transpose(1, 2) for part in merged.split(60, dim=-1))
    expected = keys.clone(), values.clone()
    expected[0][:, :, slots], expected[1][:, :, slots] = key, value
    append(keys, values, torch.tensor(slots, device=device), key, value)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
