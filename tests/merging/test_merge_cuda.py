"""A model trained on a GPU, merged on the GPU and on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file
from transformers import Qwen2Config

from qlora.merging import MergedSource, merge_adapter
from qlora.models.provenance import ABSMAX_TOLERANCE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_merging_on_either_device_gives_the_model_trained_on_the_gpu(train: Callable[..., Any], tmp_path: Path) -> None:
    # Rows of 96 and 1120: quantization blocks cross rows, and double quantization has many scales.
    config = Qwen2Config(
        vocab_size=80,
        hidden_size=1120,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    trained = train(config, compute_dtype=torch.bfloat16, device="cuda", use_dora=True)
    merged, reports = {}, {}
    for device in ("cuda", "cpu"):
        output = tmp_path / device
        output.mkdir()
        reports[device] = merge_adapter(
            trained.base, trained.adapter, output, base="dequantized", dtype=torch.float32, device=device
        )
        merged[device] = load_file(output / "model.safetensors")
    assert reports["cuda"].absmax_deviation < 1e-6
    assert reports["cpu"].absmax_deviation < ABSMAX_TOLERANCE

    adapted = 0
    for name, module in trained.model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            adapted += 1
            weight = module.base_layer.weight
            base = dequantize_4bit(weight.data, weight.quant_state).float()
            delta = module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()
            expected = base + module.scaling["default"] * delta
            magnitude = module.lora_magnitude_vector["default"].weight.detach()
            expected = (magnitude / expected.norm(dim=1)).unsqueeze(1) * expected
            difference = (merged["cuda"][f"{name}.weight"].cuda() - expected).abs().max() / expected.abs().max()
            assert difference < 1e-6
            # One step of bf16, where a block's scale differs between CPU and GPU.
            between = (merged["cuda"][f"{name}.weight"] - merged["cpu"][f"{name}.weight"]).abs().max()
            assert between < 2**-7 * expected.abs().max()
    assert adapted == 14


def test_reading_in_a_thread_with_tf32_allowed_gives_the_same_values(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(compute_dtype=torch.bfloat16, device="cuda")
    merge_adapter(trained.base, trained.adapter, tmp_path, base="dequantized", dtype=torch.float32, device="cuda")
    merged = load_file(tmp_path / "model.safetensors")
    source = MergedSource(
        trained.base, trained.adapter, tmp_path, base="dequantized", dtype=torch.bfloat16, device="cuda"
    )
    names = [name for name in source.names() if "_proj.weight" in name]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with ThreadPoolExecutor(1) as pool:
            tensors = list(pool.map(source.read, names))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(names) == 14
    assert all(torch.equal(tensor, merged[name]) for name, tensor in zip(names, tensors, strict=True))


def test_logits(train: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trained = train(device="cuda", compute_dtype=torch.float32)
    (tmp_path / "merged").mkdir()
    merge_adapter(
        trained.base, trained.adapter, tmp_path / "merged", base="dequantized", dtype=torch.float32, device="cuda"
    )
    tokens = torch.arange(48, device="cuda").reshape(2, 24)
    expected = trained.logits(tokens)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval().cuda()
    with torch.no_grad():
        assert (model(tokens).logits - expected).abs().max() < 1e-4 * expected.abs().max()
