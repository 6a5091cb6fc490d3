"""The merged model as a source of tensors, each computed from base and adapter when it is read.

Training computes dtype(dequant(quant(W)))·x + s·B(A·x), so the merged weight is
    W' = fp32(dtype(dequant(quant(W)))) + s·B·A,
the product and the sum exact to fp64 and rounded once to the dtype asked for, so that an update smaller than a step of
it is kept (`rounding`). Merging into W itself would add the quantization error W − dequant(quant(W)) that the adapter
never saw; merging inside the 4-bit layer would quantize the adapter away.

What bitsandbytes left alone and the adapter did not train (embeddings, output head, norms) keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from qlora.errors import Problem, UserError
from qlora.merging.adapter import Adapter
from qlora.merging.base_weights import TrainedOn, row_blocks, trained_on
from qlora.merging.delta import LowRankUpdate
from qlora.merging.plan import MergedTensor, plan_merge
from qlora.merging.rounding import stochastic
from qlora.models.checkpoint import CheckpointReader, TensorSpec
from qlora.models.principal import KeptParts
from qlora.models.provenance import ABSMAX_TOLERANCE, FILE_NAME, dtype_name, read_provenance

MergeBase = Literal["dequantized", "original"]
Rounding = Literal["stochastic", "nearest"]


@dataclass(frozen=True)
class LinearRows:
    """Rows [n, K] of a linear's weight, fp32 on the device that merges."""

    rows: slice
    before_nK: torch.Tensor
    """What training began with: the base that the merge adds to, and what was taken from it for the adapter to begin
    with (PiSSA)."""
    after_nK: torch.Tensor
    """The merged weight: `before_nK` and all that training did to it."""


class MergedSource:
    """The tensors of the merged model: a `TensorSource` that needs no merged weights on disk.

    base_dir: the 16-bit base. adapter_dir: PEFT adapter with base.json. config_dir: becomes `directory`; nothing is
    read from it here. base: what the adapter is added to, the dequantized weights it was trained on (exact) or the
    16-bit ones. dtype: of all tensors that were trained or quantized; others keep their own. weight_dtype: in place of
    `dtype`, that of linear weights; in float32 nothing is rounded between training and what reads them. rounding: of
    weights with an update, to 16 bits.

    Every read of a quantized layer compares it with base.json, for either base. Reads may come from any thread; each
    needs a few copies of its tensor. The same inputs give the same bytes on the same kind of device. Raises UserError
    if the base is not the one trained on, if the adapter has something that cannot be merged, or, on reading, if merged
    values are not finite in their dtype.
    """

    def __init__(
        self,
        base_dir: Path,
        adapter_dir: Path,
        config_dir: Path,
        *,
        base: MergeBase,
        dtype: torch.dtype,
        weight_dtype: torch.dtype = torch.float32,
        rounding: Rounding = "stochastic",
        device: str,
    ) -> None:
        self.directory = Path(config_dir)
        self.provenance = read_provenance(Path(adapter_dir) / FILE_NAME)
        self.adapter = Adapter(adapter_dir)
        self._taken = KeptParts(Path(adapter_dir), self.provenance.beginning)
        self.absmax_deviation = 0.0
        """Largest relative difference of a layer's block scales to those of training, over all that were read."""
        self._base_reader = CheckpointReader(base_dir)
        self._base = base
        self._rounding = rounding
        self._device = device
        plan = plan_merge(self._base_reader, self.provenance, self.adapter, dtype)
        self.untied = plan.untied
        self.vocabulary = plan.vocabulary
        self._tensors = {tensor.name: self._in_weight_dtype(tensor, weight_dtype) for tensor in plan.tensors}

    def names(self) -> list[str]:
        """All tensor names, in the order of the base's bytes."""
        return list(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a merged tensor. Raises KeyError for an unknown name."""
        return self._tensors[name].spec

    def read(self, name: str) -> torch.Tensor:
        """The merged tensor, on the CPU. Raises KeyError for an unknown name; see the class for UserErrors."""
        tensor = self._tensors[name]
        parameter = tensor.parameter
        if parameter in self.adapter.replacements:
            value = self.adapter.replacement(parameter)
        else:
            value = self._base_reader.read(tensor.source)
        if parameter in self.adapter.rows:
            value = self.adapter.with_rows(parameter, value.to(tensor.spec.dtype), self.provenance.load_dtype)
        module, _, kind = parameter.rpartition(".")
        lora = self.adapter.lora.get(module, {})
        if kind == "bias" and "bias" in lora:
            value = value.float() + self.adapter.bias_update(module)
        if kind == "weight" and (lora or module in self.provenance.quantized):
            value = value.T.contiguous() if tensor.transposed else value
            merged = self._merged_weight(module, value, tensor.spec.dtype)
            return merged.T.contiguous() if tensor.transposed else merged
        return value.to(tensor.spec.dtype)

    def module(self, name: str) -> str:
        """The module of the trained model whose weight this tensor is. Raises KeyError for an unknown name."""
        return self._tensors[name].parameter.removesuffix(".weight")

    def linear(self, name: str) -> Iterator[LinearRows]:
        """The weight [N, K] of a linear before and after training, a block of rows at a time, rounded nowhere.

        Raises as `read` does.
        """
        tensor = self._tensors[name]
        module = self.module(name)
        weight = self._base_reader.read(tensor.source)
        replaced = tensor.parameter in self.adapter.replacements
        after = self.adapter.replacement(tensor.parameter) if replaced else None
        if tensor.transposed:
            weight, after = weight.T.contiguous(), None if after is None else after.T.contiguous()
        update = self._update(module, tuple(weight.shape))
        taken = self._taken[module] if module in self._taken.names else None
        for rows, base_nK in self._base_blocks(module, weight):
            before_nK = base_nK if update is None else base_nK.clone()
            if taken is not None:  # training began with both parts
                before_nK = (before_nK.double() + taken.of_rows(rows).part(self._device)).float()
            if after is not None:
                after_nK = after[rows].to(self._device).float()
            else:
                after_nK = base_nK if update is None else update.apply(base_nK, rows)
            yield LinearRows(rows, before_nK, after_nK)

    def _in_weight_dtype(self, tensor: MergedTensor, dtype: torch.dtype) -> MergedTensor:
        module, _, kind = tensor.parameter.rpartition(".")
        adapted = "A" in self.adapter.lora.get(module, {})  # an adapted embedding has embedding_A
        if kind == "weight" and (adapted or module in self.provenance.quantized):
            return replace(tensor, spec=TensorSpec(dtype, tensor.spec.shape))
        return tensor

    def _merged_weight(self, module: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        shape = tuple(weight.shape)
        update = self._update(module, shape)
        merged = torch.empty(shape, dtype=dtype)
        for rows, block in self._base_blocks(module, weight):
            if update is not None:
                block = update.apply(block, rows)
            if update is not None and self._rounding == "stochastic":
                block = stochastic(block, dtype, f"{module} {rows.start}")
            else:
                block = block.to(dtype)
            if not torch.isfinite(block).all():
                raise UserError(
                    f"{module}: merged weights are infinite or not a number in {dtype_name(dtype)}",
                    where="merge.dtype",
                    fix="use bfloat16, which has the range of float32; if that fails too, the adapter diverged",
                )
            merged[rows] = block
        return merged

    def _update(self, module: str, shape: tuple[int, ...]) -> LowRankUpdate | None:
        return self.adapter.weight_update(module, shape, self._device) if module in self.adapter.lora else None

    def _base_blocks(self, module: str, weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """What the adapter is added to, in fp32 on the device, a block of rows at a time; `weight` is the base's."""
        taken = self._taken[module] if module in self._taken.names else None
        trained_on = weight if taken is None else taken.rest(weight, self.provenance.load_dtype, self._device)
        quantized = self._quantize_again(module, trained_on) if module in self.provenance.quantized else None
        for rows in row_blocks(tuple(weight.shape), self.provenance.settings.blocksize):
            if self._base == "original" and taken is not None:
                yield rows, taken.of_rows(rows).rest_of_block(weight[rows], self._device).float()
            elif self._base == "original":
                yield rows, weight[rows].to(self._device).float()
            elif quantized is not None:
                yield rows, quantized.dequantize(rows)
            else:
                # A layer that stayed in 16 bits: training saw it in the dtype the base was loaded in.
                yield rows, trained_on[rows].to(self._device).to(self.provenance.load_dtype).float()

    def _quantize_again(self, module: str, weight: torch.Tensor) -> TrainedOn:
        """The quantized weight of a layer. Raises UserError if training had another one."""
        provenance = self.provenance
        quantized = trained_on(weight, provenance.settings, provenance.load_dtype, self._device)
        expected = provenance.quantized[module]
        deviation = quantized.fingerprint.absmax_deviation(expected)
        self.absmax_deviation = max(self.absmax_deviation, deviation)
        if quantized.fingerprint.sha256 == expected.sha256 and deviation <= ABSMAX_TOLERANCE:
            return quantized
        same = quantized.fingerprint.sha256 == expected.sha256
        what = f"block scales ({deviation:.1e})" if same else provenance.settings.compared
        revision = f" at revision {provenance.revision}" if provenance.revision else ""
        fix = f"merge into {provenance.base_id}{revision}, unchanged, with bitsandbytes {provenance.bitsandbytes}"
        depends = provenance.load_dtype == torch.float32 or provenance.settings.quant_type == "int8"
        if depends and provenance.device != torch.device(self._device).type:
            fix += f", on {provenance.device}: codes of int8, and of float32 weights, depend on the device"
        raise UserError(
            Problem(
                f"{module}: {what} differ from those the adapter was trained on",
                where=str(self._base_reader.directory),
                fix=fix,
            )
        )
