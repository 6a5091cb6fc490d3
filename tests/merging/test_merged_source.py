"""The merged model read tensor by tensor from base and adapter: the values of the written one, without the rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.data.calibration import CalibrationRow
from qlora.errors import UserError
from qlora.merging import MergedSource, merge_adapter
from qlora.models.checkpoint import CheckpointReader, TensorSource
from qlora.models.side_files import edit_config
from qlora.quantization import GPTQSettings, quantize_checkpoint


def merge(trained: Any, output: Path, **options: Any) -> Path:
    output.mkdir()
    merge_adapter(trained.base, trained.adapter, output, **{"base": "dequantized", "dtype": torch.bfloat16} | options)
    return output


def open_source(trained: Any, directory: Path, **options: Any) -> MergedSource:
    defaults = {"base": "dequantized", "dtype": torch.bfloat16, "device": "cpu"}
    return MergedSource(trained.base, trained.adapter, directory, **defaults | options)


def _linear(source: MergedSource, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(block.before_nK, block.after_nK) for block in source.linear(name)]


@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize(
    "lora",
    [{}, {"use_dora": True}, {"bias": "all", "modules_to_save": ["norm"]}, {"target_modules": ["q_proj", "lm_head"]}],
    ids=["plain", "dora", "norms_and_biases", "head"],
)
def test_linear_weights_are_those_of_a_float32_merge_and_the_rest_those_of_a_bfloat16_merge(
    train: Callable[..., Any], tmp_path: Path, lora: dict[str, Any], base: str
) -> None:
    trained = train(compute_dtype=torch.bfloat16, **lora)
    whole, rounded = (
        load_file(merge(trained, tmp_path / str(dtype), dtype=dtype, base=base) / "model.safetensors")
        for dtype in (torch.float32, torch.bfloat16)
    )
    source = open_source(trained, tmp_path, base=base)
    assert sorted(source.names()) == sorted(whole)
    for name in source.names():
        tensor, spec = source.read(name), source.spec(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
        is_weight = "proj.weight" in name or (name == "lm_head.weight" and "lm_head" in lora.get("target_modules", []))
        expected = whole[name] if is_weight else rounded[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
        if "proj.weight" in name:
            before, after = (torch.cat(parts) for parts in zip(*_linear(source, name), strict=True))
            assert torch.equal(after, expected) and after.dtype == torch.float32
            assert torch.equal(before, after) == (source.module(name) not in source.adapter.lora)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(whole[name], rounded[name].float())


def test_reads_repeat_and_may_come_from_several_threads(train: Callable[..., Any], tmp_path: Path) -> None:
    source = open_source(train(use_dora=True), tmp_path)
    names = source.names() * 2
    alone = [source.read(name) for name in names]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(source.read, names))
    assert all(torch.equal(left, right) for left, right in zip(alone, together, strict=True))


def test_a_merge_without_weights_writes_the_rest_and_checks_the_same(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(tied=True, modules_to_save=["lm_head"])
    (trained.adapter / "tokenizer_config.json").write_text("as trained")
    written = merge(trained, tmp_path / "written")
    direct = tmp_path / "direct"
    direct.mkdir()
    report = merge_adapter(
        trained.base, trained.adapter, direct, base="dequantized", dtype=torch.bfloat16, write_weights=False
    )
    kept = {path.name: path.read_bytes() for path in written.iterdir() if path.suffix != ".safetensors"}
    assert {path.name: path.read_bytes() for path in direct.iterdir()} == kept and "tokenizer_config.json" in kept
    assert (report.weights_written, report.total_bytes, report.untied) == (False, 0, True)
    assert report.digest == json.loads((trained.adapter / "base.json").read_text())["digest"]


@pytest.mark.parametrize("read", [False, True], ids=["in the merge", "when read"])
def test_another_base_is_refused_by_the_layer_that_differs(
    train: Callable[..., Any], tmp_path: Path, read: bool
) -> None:
    trained = train()
    name = "model.layers.1.self_attn.q_proj"
    trained.base = Path(shutil.copytree(trained.base, tmp_path / "tampered"))
    tensors = load_file(trained.base / "model.safetensors")
    tensors[f"{name}.weight"][3, 5].neg_()
    save_file(tensors, trained.base / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}: 4-bit codes differ"):
        if read:
            open_source(trained, tmp_path).read(f"{name}.weight")
        else:
            merge(trained, tmp_path / "merged", write_weights=False)


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_gptq_straight_from_the_adapter_is_gptq_of_a_float32_merge(
    train: Callable[..., Any], tmp_path: Path, quant_type: str
) -> None:
    """The walk computes in bf16 either way; the weights it solves for are not rounded."""
    trained = train(compute_dtype=torch.bfloat16, quant_type=quant_type)
    whole = merge(trained, tmp_path / "whole", dtype=torch.float32)
    edit_config(whole, {"dtype": "bfloat16", "torch_dtype": "bfloat16"})
    direct = merge(trained, tmp_path / "direct", write_weights=False)
    rounded = merge(trained, tmp_path / "rounded")
    sources: dict[str, TensorSource] = {
        "of_whole": CheckpointReader(whole),
        "of_direct": open_source(trained, direct),
        "of_rounded": CheckpointReader(rounded),
    }
    tokens = torch.randint(0, 80, (16, 24), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [CalibrationRow(tuple(row), None) for row in tokens]
    files = {}
    for name, source in sources.items():
        output = tmp_path / name
        output.mkdir()
        quantize_checkpoint(source, output, rows, GPTQSettings(group_size=32), device="cpu")
        files[name] = {path.name: path.read_bytes() for path in output.iterdir()}
    assert files["of_direct"] == files["of_whole"]
    assert files["of_direct"]["model.safetensors"] != files["of_rounded"]["model.safetensors"]
    assert not list(direct.glob("*.safetensors"))
