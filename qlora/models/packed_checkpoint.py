"""GPTQ and AWQ checkpoints as the numbers that they stand for: weights dequantized, or as one kind of packed codes.

No kernel of GPTQ or AWQ is involved in either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.errors import UserError
from qlora.kernels.packed_linear import PackedWeight
from qlora.models import awq_format
from qlora.models.awq_format import AWQTensors, check_readable
from qlora.models.awq_format import dequantize as dequantize_awq
from qlora.models.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec
from qlora.models.gptq_format import (
    TENSOR_NAMES as PACKED_NAMES,
)
from qlora.models.gptq_format import (
    WORD_BITS,
    GPTQFormat,
    GPTQTensors,
    check_tensors,
    dequantize,
    pack_rows,
    quantization_method,
    read_quantization_config,
    unpack_rows,
    unpack_zeros,
)
from qlora.models.preview import OLDER_CONFIGS
from qlora.models.provenance import dtype_name
from qlora.models.side_files import copy_side_files, edit_config

Parts = Mapping[str, torch.Tensor]
"""The packed tensors of one linear by their last name."""
# (full name of a linear, its packed tensors, dtype of the result) → its weight [N, K]
Unpack = Callable[[str, Parts, torch.dtype], torch.Tensor]


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
            weight = unpack(prefix, read_parts(reader, names, prefix, device), dtype)
            yield f"{prefix}.weight", weight.T.contiguous() if prefix in transposed else weight
        elif kind not in PACKED_NAMES:
            tensor = reader.read(name).to(device)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def read_parts(reader: CheckpointReader, names: Collection[str], prefix: str, device: str) -> dict[str, torch.Tensor]:
    """The packed tensors of the linear `prefix`, of a checkpoint with these names, on `device`."""
    packed = [part for part in PACKED_NAMES if f"{prefix}.{part}" in names]
    return {part: reader.read(f"{prefix}.{part}").to(device) for part in packed}


def packed_weights(directory: Path) -> Callable[[str, Parts], PackedWeight]:
    """(name, packed tensors) → the same codes, zero points and scales as the kernels here take them.

    Raises `UserError` as `dequantized_tensors` does, at once or where it is called; and for GPTQ groups of unequal
    size. Of AWQ, words are packed along inputs instead of outputs; of GPTQ with `desc_act`, in the order of groups.
    """
    if quantization_method(directory) == "awq":
        check_readable(directory)
        return _packed_awq
    settings = read_quantization_config(directory)

    def pack(name: str, parts: Parts) -> PackedWeight:
        own = _settings_of(settings, name)
        tensors = GPTQTensors(**parts)
        check_tensors(name, tensors, own)
        return _packed_gptq(name, tensors, own.bits)

    return pack


def _packed_awq(name: str, parts: Parts) -> PackedWeight:
    codes_KN = awq_format.unpack(parts["qweight"])
    return PackedWeight(
        pack_rows(codes_KN, awq_format.BITS),
        awq_format.unpack(parts["qzeros"]),
        parts["scales"].contiguous(),
        awq_format.BITS,
    )


def _packed_gptq(name: str, tensors: GPTQTensors, bits: int) -> PackedWeight:
    group_K = tensors.g_idx.long()
    inputs, groups = len(group_K), len(tensors.scales)
    rows_K = torch.argsort(group_K, stable=True)
    in_groups_K = torch.arange(inputs, device=rows_K.device) * groups // inputs
    if inputs % groups or not torch.equal(group_K[rows_K], in_groups_K):
        raise UserError(
            f"{inputs} inputs in {groups} groups of unequal size: training needs them equal",
            name,
            "use model.quantization: nf4 or none, which dequantize the checkpoint first",
        )
    qweight, ordered = tensors.qweight, torch.equal(group_K, in_groups_K)
    if not ordered:
        qweight = pack_rows(unpack_rows(qweight, bits)[rows_K], bits)
    zeros_GN = unpack_zeros(tensors.qzeros, bits).contiguous()
    rows = None if ordered else rows_K.to(torch.int32)
    return PackedWeight(qweight.contiguous(), zeros_GN, tensors.scales.contiguous(), bits, rows)


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

    def unpack(name: str, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        own = _settings_of(settings, name)
        tensors = GPTQTensors(**parts)
        check_tensors(name, tensors, own)
        return dequantize(tensors, own.bits, dtype)

    return unpack


def _settings_of(settings: GPTQFormat, name: str) -> GPTQFormat:
    own = settings.for_module(name)
    if own is None:
        raise UserError("packed, although quantization_config says it is not quantized", name, "quantize it again")
    return own


def _unpack_awq(directory: Path) -> Unpack:
    check_readable(directory)
    return lambda name, parts, dtype: dequantize_awq(AWQTensors(**parts), dtype)


class PackedLinears:
    """The packed linears of a GPTQ checkpoint, read one at a time.

    Raises UserError if the directory is no GPTQ v1 checkpoint, and on reading where tensors do not fit.
    """

    def __init__(self, directory: Path) -> None:
        self._settings = read_quantization_config(directory)
        self._reader = CheckpointReader(directory)
        self._present = set(self._reader.names())
        self.names = [name.removesuffix(".qweight") for name in self._reader.names() if name.endswith(".qweight")]
        """Of the linears, in the checkpoint."""

    def read(self, name: str, device: str) -> PackedRows:
        """All rows of a linear, on the device."""
        own = _settings_of(self._settings, name)
        tensors = GPTQTensors(**read_parts(self._reader, self._present, name, device))
        check_tensors(name, tensors, own)
        return PackedRows(tensors, own.bits)

    def bias(self, name: str, device: str) -> torch.Tensor | None:
        """The bias [N] of a linear, if it has one."""
        return self._reader.read(f"{name}.bias").to(device) if f"{name}.bias" in self._present else None


@dataclass(frozen=True)
class PackedRows:
    """Some outputs of a packed linear, n of N, and the grid that their weights lie on."""

    tensors: GPTQTensors
    bits: int

    @property
    def outputs(self) -> int:
        return self.tensors.scales.shape[1]

    @property
    def inputs(self) -> int:
        return self.tensors.g_idx.shape[0]

    @property
    def groups(self) -> int:
        return self.tensors.scales.shape[0]

    @property
    def grouped_in_order(self) -> bool:
        """Whether groups are of equal size and of neighbouring inputs, as `g_idx` has them here."""
        if self.inputs % self.groups:
            return False
        inputs = torch.arange(self.inputs, device=self.tensors.g_idx.device)
        return torch.equal(self.tensors.g_idx.long(), inputs // (self.inputs // self.groups))

    def rows(self, rows: slice) -> PackedRows:
        """Some of these; `rows` begins and ends where words do, at multiples of 32 or at the end."""
        words = slice(rows.start * self.bits // WORD_BITS, rows.stop * self.bits // WORD_BITS)
        tensors = self.tensors
        parts = (tensors.qweight[:, rows], tensors.qzeros[:, words], tensors.scales[:, rows], tensors.g_idx)
        return PackedRows(GPTQTensors(*parts), self.bits)

    def weight(self) -> torch.Tensor:
        """fp32 [n, K]: what the codes stand for."""
        return dequantize(self.tensors, self.bits)

    def nearest(self, *weights_nK: torch.Tensor) -> list[torch.Tensor]:
        """For each weight, the codes [n, K] of the grid's values nearest to it, as whole numbers in fp32."""
        group = self.tensors.g_idx.long()
        # A scale of zero has one value, that of the zero point.
        steps_nG = self.tensors.scales.float().T.contiguous()
        steps_nK = steps_nG.masked_fill_(steps_nG == 0, torch.inf).index_select(1, group)
        zeros_nK = unpack_zeros(self.tensors.qzeros, self.bits).float().T.contiguous().index_select(1, group)
        top = (1 << self.bits) - 1
        return [(weight_nK / steps_nK).round_().add_(zeros_nK).clamp_(0, top) for weight_nK in weights_nK]
