"""LLM.int8: the merge adds to the weights that bitsandbytes multiplies with, and refuses a base of other codes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from qlora.errors import UserError
from qlora.merging import MergeReport, merge_adapter
from qlora.models.frozen import eight_bit_codes

TOKENS = torch.arange(48).reshape(2, 24) * 7 % 80
Q_PROJ = "model.layers.1.self_attn.q_proj"


def merge(trained: Any, output: Path, **options: Any) -> MergeReport:
    output.mkdir()
    return merge_adapter(
        trained.base, trained.adapter, output, **{"base": "dequantized", "dtype": torch.float32} | options
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.mark.parametrize(
    "lora",
    [{}, {"target_modules": ["q_proj", "lm_head"]}, {"lora_bias": True, "target_modules": ["q_proj"]}],
    ids=["plain", "head", "bias"],
)
def test_merged_logits_are_those_of_training_in_fp32(train: Callable[..., Any], tmp_path: Path, lora: dict) -> None:
    trained = train(quant_type="int8", **lora)
    expected = trained.logits(TOKENS)
    assert torch.equal(expected, logits(trained.model.train())), "evaluation on a CPU is what training was"
    report = merge(trained, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (logits(merged) - expected).abs().max() < 2e-5 * expected.abs().max().clamp(min=1)
    assert report.absmax_deviation == 0


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_weight_is_what_bitsandbytes_multiplies_with_and_the_update(
    train: Callable[..., Any], tmp_path: Path, compute_dtype: torch.dtype, base_dtype: torch.dtype
) -> None:
    """Read off its own product: of the identity, forwards; of a gradient, backwards."""
    trained = train(quant_type="int8", compute_dtype=compute_dtype, base_dtype=base_dtype, target_modules=["q_proj"])
    merge(trained, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    seen = 0
    for name, module in trained.model.get_base_model().named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear8bitLt):
            continue
        codes_NK, scales_N = eight_bit_codes(module)
        bias, module.bias = module.bias, None
        identity = torch.eye(module.in_features, dtype=compute_dtype).requires_grad_()
        weight_KN = module(identity)
        (backwards_KN,) = torch.autograd.grad(weight_KN, identity, torch.ones_like(weight_KN))
        module.bias = bias
        weight_NK = weight_KN.detach().T.float()
        torch.testing.assert_close(backwards_KN[0].float(), weight_NK.sum(0), rtol=1e-2, atol=1e-2)
        assert torch.equal(weight_NK, (codes_NK.float() * (scales_N * (1 / 127))[:, None]).to(compute_dtype).float())
        parent = trained.model.get_base_model().get_submodule(name.removesuffix(".base_layer"))
        if hasattr(parent, "lora_A"):
            a, b = (part["default"].weight.detach().double() for part in (parent.lora_A, parent.lora_B))
            weight_NK = (weight_NK + parent.scaling["default"] * (b @ a)).float()
        assert torch.equal(merged[f"{name.removesuffix('.base_layer')}.weight"], weight_NK), name
        seen += 1
    assert seen == 14


def test_weights_that_are_stored_transposed(train: Callable[..., Any], tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=80, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    trained = train(config, quant_type="int8")
    expected = trained.logits(TOKENS)
    merge(trained, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_base_that_differs_in_one_code_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(quant_type="int8")
    for name, change, message in (
        ("code", lambda weight: weight[3, 5].neg_(), f"{Q_PROJ}: 8-bit codes differ"),
        ("scale", lambda weight: weight.mul_(2), f"{Q_PROJ}: block scales"),
    ):
        base = shutil.copytree(trained.base, tmp_path / f"base-{name}")
        tensors = load_file(base / "model.safetensors")
        change(tensors[f"{Q_PROJ}.weight"])
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            output = tmp_path / name
            output.mkdir()
            merge_adapter(base, trained.adapter, output, base="dequantized", dtype=torch.bfloat16)
