"""Quantized checkpoints of others as bases: every weight is the number that its codes stand for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.errors import UserError
from qlora.models.awq_format import CODE_ORDER
from qlora.models.base import resolve_base
from qlora.models.packed_checkpoint import write_dequantized

GROUP = 32


def words(codes_RN: torch.Tensor) -> torch.Tensor:
    """int32 [R, N/8]: eight codes of 4 bits a word, in AWQ's order."""
    eights = codes_RN.view(len(codes_RN), -1, 8).to(torch.int64)
    found = sum(eights[..., output] << (4 * position) for position, output in enumerate(CODE_ORDER))
    return (found & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


@pytest.fixture
def awq(tiny_model, tmp_path):
    """A checkpoint as AutoAWQ wrote them, and the weights that its codes stand for."""
    directory = shutil.copytree(tiny_model, tmp_path / "awq")
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor.to(torch.float16)
            expected[name] = tensors[name].to(torch.bfloat16)
            continue
        outputs, inputs = tensor.shape
        codes, zeros = (
            torch.randint(0, 16, (rows, outputs), generator=generator) for rows in (inputs, inputs // GROUP)
        )
        scales = (torch.rand(inputs // GROUP, outputs, generator=generator) / 16).to(torch.float16)
        prefix = name.removesuffix("weight")
        tensors |= {f"{prefix}qweight": words(codes), f"{prefix}qzeros": words(zeros), f"{prefix}scales": scales}
        spread = [each.repeat_interleave(GROUP, 0).double() for each in (zeros, scales)]
        expected[name] = ((codes.double() - spread[0]) * spread[1]).T.to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    written = json.loads((directory / "config.json").read_text()) | {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(written))
    (directory / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": GROUP, "version": "GEMM"}))
    return directory, expected


def test_an_awq_checkpoint_becomes_its_weights_in_bf16(awq, tmp_path):
    directory, expected = awq
    base = resolve_base(str(directory))
    assert (base.id, base.dequantized_from) == ("awq", "awq")
    found = load_file(base.directory / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    model = AutoModelForCausalLM.from_pretrained(base.directory)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected["model.layers.0.mlp.down_proj.weight"])
    assert not (base.directory / "quant_config.json").exists() and (base.directory / "tokenizer.json").is_file()
    assert resolve_base(str(directory)) == base, "once"
    shutil.rmtree(base.directory)


@pytest.mark.parametrize(("changes", "message"), [({"version": "gemv"}, "layout gemv"), ({"bits": 8}, "bits 8")])
def test_another_layout_is_refused(awq, tmp_path, changes, message):
    directory, _ = awq
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))
    output = tmp_path / "output"
    output.mkdir()
    with pytest.raises(UserError, match=message):
        write_dequantized(directory, output)
