"""Training on the codes of a GPTQ or AWQ checkpoint as they are (`model.quantization: checkpoint`).

Its linears become `PackedLinear`, all else of it is read in 16 bits. ExLlama's and Marlin's kernels have no backward
pass; what a checkpoint's config says of them is for serving, and changes nothing here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.errors import Problem, UserError
from qlora.merging.names import tensor_names
from qlora.models import awq_format
from qlora.models.checkpoint import CheckpointReader
from qlora.models.gptq_format import TENSOR_NAMES, GPTQFormat, find_config, read_quantization_config
from qlora.models.packed_checkpoint import packed_weights, read_parts
from qlora.models.packed_module import PackedLinear
from qlora.models.preview import Preview
from qlora.models.shapes import ModelShapes
from qlora.models.stored_names import stored_names
from qlora.recipe import Model

log = logging.getLogger(__name__)

WHERE = "model.quantization"
KERNEL_KEYS = ("use_exllama", "disable_exllama", "exllama_config", "use_marlin", "backend", "use_cuda_fp16", "do_fuse")
"""Keys of a quantization_config that choose kernels for inference."""
GROUP_BYTES = 2 + 1
"""Per group and output: a scale in 16 bits, and a zero point."""


def require_packed(name: str, method: str | None, model: Model) -> None:
    """Raise UserError where the recipe wants a checkpoint's own codes, and the base `name` has none."""
    if model.quantization == "checkpoint" and method not in ("gptq", "awq"):
        what = f"checkpoint trains on the codes of a GPTQ or AWQ base, and {name} is neither"
        raise UserError(what, WHERE, "use nf4, fp4 or int8, or none for 16 bits")


def packed_notes(found: Preview, model: Model, shapes: ModelShapes) -> list[Problem]:
    """What `qlora check` says of a quantized base: what training multiplies with, and by which kernel."""
    if found.quantized is None:
        return []
    name, cached = found.quantized.upper(), f"dequantized to bf16 once, into the cache ({2 * shapes.total / 2**30:.1f}"
    if model.quantization == "checkpoint":
        what = (
            f"{found.id} is a {name} checkpoint: training multiplies with its own codes, dequantized for each product "
            f"by qlora's Triton kernel on a GPU, by torch on a CPU; the merge adds to the same numbers, {cached} GiB)"
        )
    else:
        held = "16 bits" if model.quantization == "none" else model.quantization
        what = f"{found.id} is a {name} checkpoint: its weights are {cached} GiB), and held in {held} for training"
        if not shapes.experts:
            what += "; model.quantization: checkpoint trains on its own codes instead"
    notes = [Problem(what, "model.base")]
    _, config = find_config(found.directory)
    asked = [f"{key}: {str(config[key]).lower()}" for key in KERNEL_KEYS if key in config]
    if asked:
        what = (
            f"its config chooses kernels ({', '.join(asked)}), which are for serving: ExLlama and Marlin have no "
            "backward pass, and neither they nor any other kernel of GPTQ or AWQ runs in training, merge or evaluation"
        )
        notes.append(Problem(what, "model.base"))
    return notes


def with_packed(shapes: ModelShapes, directory: Path) -> ModelShapes:
    """The shapes with what of the model is packed in this checkpoint, by its config, and in how many bytes.

    Raises UserError where that config is not one that is read here, and for mixtures of experts.
    """
    if shapes.experts:
        raise _experts()
    settings = packed_settings(directory)
    quantized, size = 0, 0.0
    for linear in shapes.linears:
        own = settings.for_module(linear.name)
        if own is not None and linear.experts == 1:
            group = own.group_size if own.group_size > 0 else linear.in_features
            quantized += linear.parameters
            size += linear.parameters * (own.bits / 8 + GROUP_BYTES / group)
    left = shapes.quantized + shapes.left_alone - quantized
    return replace(shapes, quantized=quantized, left_alone=left, packed_bytes=round(size))


def packed_settings(directory: Path) -> GPTQFormat:
    """Bits and group sizes of a GPTQ or AWQ checkpoint. Raises UserError where they are not read here."""
    _, config = find_config(directory)
    if config.get("quant_method", "gptq") != "awq":
        return read_quantization_config(directory)
    awq_format.check_readable(directory)
    return GPTQFormat(awq_format.BITS, config.get("group_size", config.get("q_group_size", -1)), sym=False)


def load_packed(directory: Path, model: Model, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The frozen base with its packed linears as they are, and the rest of it in `dtype`.

    Raises UserError where the checkpoint is not one that is read here, or packs what this model has no linear for.
    """
    from qlora.quantization.skeleton import ParametersWithoutData

    config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with ParametersWithoutData():
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
        )
    reader = CheckpointReader(directory)
    source = _sources(empty, reader)
    packed = _place(empty, reader, source, dtype, device)
    state = {}
    for name, stored in source.items():
        owner = name.rpartition(".")[0]
        if owner not in packed:
            state[name] = _as_dequantized(reader.read(stored), dtype).to(device)
    empty.load_state_dict(state, strict=False, assign=True)
    empty.tie_weights()
    missing = [name for name, tensor in empty.named_parameters() if tensor.is_meta]
    if missing:
        raise UserError(f"{len(missing)} tensors are not in the checkpoint, such as {missing[0]}", str(directory))
    with contextlib.suppress(OSError):
        empty.generation_config = GenerationConfig.from_pretrained(directory)
    how = "qlora's Triton kernel" if device.startswith("cuda") else "torch"
    log.info("%d linears stay packed as in the checkpoint, dequantized for each product by %s", len(packed), how)
    return empty.to(device).requires_grad_(False).eval()  # type: ignore[no-any-return, arg-type]


def _sources(empty: PreTrainedModel, reader: CheckpointReader) -> dict[str, str]:
    """Parameter or buffer → its tensor in the checkpoint, where a packed linear counts as its `weight`."""
    if any(tensor.ndim > 2 for tensor in empty.state_dict().values()):
        raise _experts()
    renamed = stored_names(empty, {})
    present = {name for name in reader.names() if name.rpartition(".")[2] not in TENSOR_NAMES}
    present |= {_weight_of(name) for name in reader.names() if name.endswith(".qweight")}
    tied = set(empty.state_dict()) - {name for name, _ in empty.named_parameters()} - _buffers(empty)
    wanted = {name: name if name in present else renamed[name] for name in empty.state_dict() if name not in tied}
    found = tensor_names(sorted(wanted.values()), present, reader.directory)
    return {name: found[stored] for name, stored in wanted.items()}


def _place(
    empty: PreTrainedModel, reader: CheckpointReader, source: dict[str, str], dtype: torch.dtype, device: str
) -> set[str]:
    """Put packed linears in the place of those that the checkpoint packs; returns their names in the model."""
    names = set(reader.names())
    left = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
    pack, placed = packed_weights(reader.directory), set()
    linears = {name: module for name, module in empty.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    for name, linear in linears.items():
        prefix = source.get(f"{name}.weight", "").removesuffix(".weight")
        if prefix not in left:
            continue
        left.remove(prefix)
        weight = pack(prefix, read_parts(reader, names, prefix, device))
        bias = _bias(reader, names, prefix, expected=linear.bias is not None)
        bias = None if bias is None else _as_dequantized(bias, dtype).to(device)
        kind = Conv1D if isinstance(linear, Conv1D) else nn.Linear
        empty.set_submodule(name, PackedLinear(weight, bias, dtype, kind))
        placed.add(name)
    if left:
        raise UserError(
            f"{len(left)} packed linears have no place in {type(empty).__name__}, such as {min(left)}",
            str(reader.directory),
            "use model.quantization: none, nf4, fp4 or int8",
        )
    return placed


def _bias(reader: CheckpointReader, names: Collection[str], prefix: str, *, expected: bool) -> torch.Tensor | None:
    """Of a packed linear; AutoGPTQ wrote one of zeros for linears that have none."""
    if f"{prefix}.bias" not in names:
        return None
    bias = reader.read(f"{prefix}.bias")
    if not expected and bool(bias.any()):
        raise UserError("the checkpoint has a bias for a linear without", prefix, "name the checkpoint's own config")
    return bias if expected else None


def _experts() -> UserError:
    return UserError(
        "a mixture's experts are one tensor in training, and one packed linear each in the checkpoint",
        WHERE,
        "use none, nf4, fp4 or int8: experts are then dequantized to 16 bits",
    )


def _as_dequantized(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is not packed, in `dtype`, as the merge reads it: the dequantized checkpoint is in bf16 throughout."""
    return tensor.to(torch.bfloat16).to(dtype) if tensor.is_floating_point() else tensor


def _weight_of(name: str) -> str:
    return f"{name.removesuffix('.qweight')}.weight"


def _buffers(model: Any) -> set[str]:
    return {name for name, _ in model.named_buffers()}
