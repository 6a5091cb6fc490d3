"""The parts of the merge: low-rank updates against float64, PEFT's pattern rule, bitsandbytes' codes, names."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from qlora.errors import UserError
from qlora.merging import base_weights
from qlora.merging.base_weights import QuantizedWeight, row_blocks
from qlora.merging.delta import LowRankUpdate, lora_scaling, matching_pattern
from qlora.merging.names import tensor_names
from qlora.models.provenance import QuantizationSettings, decompressed_absmax, one_block_per_row


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16)),
    alpha=st.floats(0.1, 100),
    rslora=st.booleans(),
    dora=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_update_is_the_float64_formula_rounded_to_float32(
    sizes: tuple[int, int, int], alpha: float, rslora: bool, dora: bool, seed: int
) -> None:
    rows, columns, rank = sizes
    torch.manual_seed(seed)
    w, b, a = torch.randn(rows, columns), torch.randn(rows, rank), torch.randn(rank, columns)
    magnitude = torch.rand(rows) + 0.5
    scaling = lora_scaling(alpha, rank, rslora=rslora)

    exact = w.double() + scaling * (b.double() @ a.double())
    cancelled = 1e-12 * (w.double().abs() + scaling * (b.double().abs() @ a.double().abs()))
    if dora:
        factor = (magnitude.double() / exact.norm(dim=1)).unsqueeze(1)
        exact, cancelled = factor * exact, factor * cancelled
    update = LowRankUpdate(b.double(), a.double(), scaling, magnitude.double() if dora else None)
    cut = rows // 2
    merged = torch.cat([update.apply(w[part].clone(), part) for part in (slice(0, cut), slice(cut, rows))])
    # DoRA rounds twice: the sum, and the sum with its norm replaced.
    tolerance = torch.finfo(torch.float32).eps * (2 if dora else 0.5)
    assert ((merged.double() - exact).abs() <= tolerance * exact.abs() + cancelled).all()


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["self_attn.q_proj", "q_proj"],
        ["layers.1.self_attn.q_proj"],
        ["^model.layers.0.self_attn.q_proj"],
        ["(q|k)_proj", "layers.[01].mlp.*"],
        ["proj"],
        ["layers.1", "mlp.down_proj"],
        [],
    ],
)
def test_patterns_match_as_in_peft(patterns: list[str]) -> None:
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.gate_up_proj"]
    for module in [*(f"model.layers.{layer}.{leaf}" for layer in (0, 1, 11) for leaf in leaves), "lm_head", "q_proj"]:
        key = get_pattern_key(patterns, module)
        assert matching_pattern(patterns, module) == (key if key in patterns else None)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(256, 128), (130, 96), (3, 50), (7, 34), (512, 32), (129, 70)])
def test_quantizing_by_rows_is_quantizing_the_whole(
    shape: tuple[int, int], double_quant: bool, quant_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_weights, "ROW_BLOCK_ELEMENTS", 64 * 96)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double_quant)
    for compute_dtype in (torch.bfloat16, torch.float32):
        settings = QuantizationSettings(quant_type, double_quant, compute_dtype)
        quantized = QuantizedWeight(weight, settings, torch.bfloat16, "cpu")
        state.dtype, state.shape = compute_dtype, one_block_per_row(weight.numel(), 64)
        whole = bnb.dequantize_4bit(packed, state).float().reshape(shape)
        assert torch.allclose(whole, weight.float(), atol=0.2 * weight.abs().max().item())
        blocks = [quantized.dequantize(rows) for rows in row_blocks(shape)]
        assert torch.equal(torch.cat(blocks), whole)
        assert quantized.fingerprint.absmax_mean == decompressed_absmax(state).double().mean().item()


@given(rows=st.integers(1, 5000), columns=st.integers(1, 10**6))
def test_row_blocks_cover_all_rows_in_whole_quantization_blocks(rows: int, columns: int) -> None:
    blocks = list(row_blocks((rows, columns)))
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == rows
    assert all((block.stop - block.start) * columns % 64 == 0 for block in blocks[:-1])


CHECKPOINT = Path("checkpoint")
LANGUAGE = [f"layers.{layer}.{leaf}.weight" for layer in range(2) for leaf in ("self_attn.q_proj", "mlp.up_proj")]
VISION = [f"layers.{layer}.{leaf}.weight" for layer in range(2) for leaf in ("self_attn.q_proj", "mlp.fc1")]


def test_equal_names_are_taken_as_they_are() -> None:
    assert tensor_names(["a.weight"], ["a.weight", "b.a.weight"], CHECKPOINT) == {"a.weight": "a.weight"}


def test_one_prefix_explains_all_names_that_share_another() -> None:
    """As Gemma 3 is stored, with a vision tower whose layers have partly the same names."""
    stored = [f"language_model.model.{name}" for name in LANGUAGE] + [f"vision_tower.{name}" for name in VISION]
    wanted = [f"model.language_model.{name}" for name in LANGUAGE] + [f"model.vision_tower.{name}" for name in VISION]
    assert tensor_names(wanted, stored, CHECKPOINT) == dict(zip(wanted, stored, strict=True))


@pytest.mark.parametrize(
    ("wanted", "stored"),
    [
        (["model.a.q.weight"], ["x.a.q.weight", "y.a.q.weight"]),
        (["model.a.q.weight"], ["model.a.k.weight"]),
        (["model.a.q.weight", "model.a.q.bias"], ["model.a.q.weight", "x.a.q.bias"]),
        (["q.weight"], ["weight"]),
    ],
    ids=["ambiguous", "absent", "prefix_not_renamed", "bare_weight"],
)
def test_names_that_stay_unclear_are_listed(wanted: list[str], stored: list[str]) -> None:
    with pytest.raises(UserError, match=wanted[-1]):
        tensor_names(wanted, stored, CHECKPOINT)
