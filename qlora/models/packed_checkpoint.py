"""GPTQ and AWQ checkpoints as the numbers that they stand for: packed weights dequantized, no such kernel involved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.errors import UserError
from qlora.models.awq_format import AWQTensors, check_readable
from qlora.models.awq_format import dequantize as dequantize_awq
from qlora.models.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec
from qlora.models.gptq_format import (
    TENSOR_NAMES as PACKED_NAMES,
)
from qlora.models.gptq_format import (
    GPTQTensors,
    check_tensors,
    dequantize,
    quantization_method,
    read_quantization_config,
)
from qlora.models.preview import OLDER_CONFIGS
from qlora.models.provenance import dtype_name
from qlora.models.side_files import copy_side_files, edit_config

# (full name of a linear, its packed tensors by their last name, dtype of the result) → its weight [N, K]
Unpack = Callable[[str, Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]


def dequantized_tensors(
    directory: Path, transposed: Collection[str], dtype: torch.dtype, device: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on `device`) of a quantized checkpoint, packed linears as one `weight` each.

    transposed: names of the linears that hold their weight as [K, N].
    Raises `UserError` if the directory is not a GPTQ v1 or AWQ GEMM checkpoint, or tensors do not fit.
    """
    unpack = _unpack_awq(directory) if quantization_method(directory) == "awq" else _unpack_gptq(directory)
    reader = CheckpointReader(directory)
    names = set(reader.names())
    for name in reader.names():
        prefix, _, kind = name.rpartition(".")
        if kind == "qweight":
            packed = [part for part in PACKED_NAMES if f"{prefix}.{part}" in names]
            parts = {part: reader.read(f"{prefix}.{part}").to(device) for part in packed}
            weight = unpack(prefix, parts, dtype)
            yield f"{prefix}.weight", weight.T.contiguous() if prefix in transposed else weight
        elif kind not in PACKED_NAMES:
            tensor = reader.read(name).to(device)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def write_dequantized(directory: Path, output: Path, *, trust_remote_code: bool = False) -> None:
    """The checkpoint in bf16, with its configuration and tokenizer; raises as `dequantized_tensors` does."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    del config.quantization_config
    with torch.device("meta"):
        transposed = transposed_linears(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    dtype = torch.bfloat16
    with CheckpointWriter(output, _specs(directory, transposed, dtype)) as writer:
        for name, tensor in dequantized_tensors(directory, transposed, dtype, "cpu"):
            writer.write(name, tensor)
    copy_side_files(directory, output, drop_quantization_config=True)
    for name in OLDER_CONFIGS:
        (output / name).unlink(missing_ok=True)
    edit_config(output, {"torch_dtype": dtype_name(dtype), "dtype": dtype_name(dtype)})


def transposed_linears(model: PreTrainedModel) -> set[str]:
    """Names in a checkpoint of the linears that hold their weight as [K, N]: GPT-2's Conv1D.

    transformers loads GPT-2 with and without the prefix that its decoder has.
    """
    names = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    return names | {name.removeprefix(f"{model.base_model_prefix}.") for name in names}


def _specs(directory: Path, transposed: Collection[str], dtype: torch.dtype) -> dict[str, TensorSpec]:
    """What `dequantized_tensors` will give."""
    reader = CheckpointReader(directory)
    awq = quantization_method(directory) == "awq"
    found = {}
    for name in reader.names():
        prefix, _, kind = name.rpartition(".")
        spec = reader.spec(name)
        if kind == "qweight":
            outputs = reader.spec(f"{prefix}.scales").shape[1]
            inputs = spec.shape[0] if awq else reader.spec(f"{prefix}.g_idx").shape[0]
            shape = (inputs, outputs) if prefix in transposed else (outputs, inputs)
            found[f"{prefix}.weight"] = TensorSpec(dtype, shape)
        elif kind not in PACKED_NAMES:
            found[name] = TensorSpec(dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape)
    return found


def _unpack_gptq(directory: Path) -> Unpack:
    settings = read_quantization_config(directory)

    def unpack(name: str, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        own = settings.for_module(name)
        if own is None:
            raise UserError("packed, although quantization_config says it is not quantized", name, "quantize it again")
        tensors = GPTQTensors(**parts)
        check_tensors(name, tensors, own)
        return dequantize(tensors, own.bits, dtype)

    return unpack


def _unpack_awq(directory: Path) -> Unpack:
    check_readable(directory)
    return lambda name, parts, dtype: dequantize_awq(AWQTensors(**parts), dtype)
