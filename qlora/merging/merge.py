"""The exact merge: the model that training saw, as one 16-bit checkpoint, written tensor by tensor.

Training computes dtype(dequant(quant(W)))·x + s·B(A·x), so the merged weight is
    W' = fp32(dtype(dequant(quant(W)))) + s·B·A,
added in fp32 and rounded once (the compute dtype is usually bf16). Merging into W itself would add the quantization
error W − dequant(quant(W)) that the adapter never saw; merging inside the 4-bit layer would quantize the adapter away.

What bitsandbytes left alone and the adapter did not train (embeddings, output head, norms) keeps its bytes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qlora.errors import Problem, UserError
from qlora.merging.adapter import Adapter
from qlora.merging.base_weights import QuantizedWeight, row_blocks
from qlora.merging.plan import MergedTensor, plan_merge
from qlora.models.checkpoint import (
    DEFAULT_SHARD_BYTES,
    TEMPLATE_FOLDER,
    CheckpointReader,
    CheckpointWriter,
    copy_side_files,
    edit_config,
)
from qlora.models.provenance import ABSMAX_TOLERANCE, FILE_NAME, Provenance, dtype_name, read_provenance

MergeBase = Literal["dequantized", "original"]

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)
# Settings a newer tokenizer no longer writes; left over from the base they would override the trained ones.
STALE_WITH_NEW_TOKENIZER = ("special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    base: MergeBase
    dtype: str
    """Dtype of the merged weights."""
    tensors: int
    """Tensors written."""
    merged_modules: int
    """Modules with a low-rank update."""
    replaced_tensors: int
    """Tensors that training saved whole (modules_to_save, biases)."""
    untied: bool
    """Whether input embeddings and output head were one tensor in the base and are two now."""
    total_bytes: int
    digest: str
    """Digest of all 4-bit codes, equal to that of base.json."""
    absmax_deviation: float
    """Largest relative difference of a layer's block scales to those of training."""
    seconds: float


def merge_adapter(
    base_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    base: MergeBase,
    dtype: torch.dtype,
    device: str = "cpu",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int, str], None] | None = None,
) -> MergeReport:
    """Merge a trained adapter into its base and write a complete model directory.

    base_dir: the 16-bit base. adapter_dir: PEFT adapter with base.json; its tokenizer wins over the base's. output_dir:
    exists and is empty. base: what the adapter is added to, the dequantized weights it was trained on (exact) or the
    16-bit ones. dtype: of all linear layers that were quantized and all tensors that were trained; other tensors keep
    their own. progress: called with (tensors done, tensors in all, name).

    Every quantized layer is compared with base.json, for either base. Peak memory is a few copies of the largest tensor
    in 16 bits and a few hundred MB; the same inputs give the same bytes on the same kind of device.

    Raises UserError if the base is not the one trained on, if the adapter has something that cannot be merged, or if
    merged values do not fit `dtype`; WillNotFit if the disk is too small.
    """
    started = time.monotonic()
    provenance = read_provenance(adapter_dir / FILE_NAME)
    reader = CheckpointReader(base_dir)
    adapter = Adapter(adapter_dir)
    plan = plan_merge(reader, provenance, adapter, dtype)
    merger = _Merger(reader, provenance, adapter, base=base, dtype=dtype, device=device)
    specs = {tensor.name: tensor.spec for tensor in plan.tensors}
    with exact_float32_products(), CheckpointWriter(output_dir, specs, max_shard_bytes) as writer:
        for done, tensor in enumerate(plan.tensors, start=1):
            writer.write(tensor.name, merger.merged(tensor))
            if progress:
                progress(done, len(plan.tensors), tensor.name)
    adapter.check_all_taken()
    _copy_configuration(base_dir, adapter_dir, output_dir, dtype=dtype, untie=plan.untied)
    return MergeReport(
        base=base,
        dtype=dtype_name(dtype),
        tensors=len(plan.tensors),
        merged_modules=len(adapter.lora),
        replaced_tensors=len(adapter.replacements),
        untied=plan.untied,
        total_bytes=sum(spec.nbytes for spec in specs.values()),
        digest=provenance.digest,
        absmax_deviation=merger.absmax_deviation,
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def exact_float32_products() -> Iterator[None]:
    """Matrix products of fp32 tensors in fp32, whatever training chose (TF32 keeps 10 bits of mantissa)."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class _Merger:
    """Computes the merged tensors one at a time, and checks the base on the way."""

    def __init__(
        self,
        reader: CheckpointReader,
        provenance: Provenance,
        adapter: Adapter,
        *,
        base: MergeBase,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self._reader = reader
        self._provenance = provenance
        self._adapter = adapter
        self._base = base
        self._dtype = dtype
        self._device = device
        self.absmax_deviation = 0.0

    def merged(self, tensor: MergedTensor) -> torch.Tensor:
        """The tensor as it is written, on the CPU."""
        parameter = tensor.parameter
        if parameter in self._adapter.replacements:
            value = self._adapter.replacement(parameter)
        else:
            value = self._reader.read(tensor.source)
        module, _, kind = parameter.rpartition(".")
        lora = self._adapter.lora.get(module, {})
        if kind == "bias" and "bias" in lora:
            value = value.float() + self._adapter.bias_update(module)
        if kind == "weight" and (lora or module in self._provenance.quantized):
            return self._merged_weight(module, value, adapted=bool(lora))
        return value.to(tensor.spec.dtype)

    def _merged_weight(self, module: str, weight: torch.Tensor, *, adapted: bool) -> torch.Tensor:
        shape = tuple(weight.shape)
        quantized = self._quantize_again(module, weight) if module in self._provenance.quantized else None
        update = self._adapter.weight_update(module, shape, self._device) if adapted else None
        merged = torch.empty(shape, dtype=self._dtype)
        for rows in row_blocks(shape, self._provenance.settings.blocksize):
            if self._base == "original":
                block = weight[rows].to(self._device).float()
            elif quantized is not None:
                block = quantized.dequantize(rows)
            else:
                # A layer that stayed in 16 bits: training saw it in the dtype the base was loaded in.
                block = weight[rows].to(self._device).to(self._provenance.load_dtype).float()
            if update is not None:
                block = update.apply(block, rows)
            block = block.to(self._dtype)
            if not torch.isfinite(block).all():
                raise UserError(
                    f"{module}: merged weights are infinite or not a number in {dtype_name(self._dtype)}",
                    where="merge.dtype",
                    fix="use bfloat16, which has the range of float32; if that fails too, the adapter diverged",
                )
            merged[rows] = block
        return merged

    def _quantize_again(self, module: str, weight: torch.Tensor) -> QuantizedWeight:
        """The 4-bit weight of a layer. Raises UserError if training had another one."""
        provenance = self._provenance
        quantized = QuantizedWeight(weight, provenance.settings, provenance.load_dtype, self._device)
        expected = provenance.quantized[module]
        deviation = quantized.fingerprint.absmax_deviation(expected)
        self.absmax_deviation = max(self.absmax_deviation, deviation)
        if quantized.fingerprint.sha256 == expected.sha256 and deviation <= ABSMAX_TOLERANCE:
            return quantized
        what = "4-bit codes" if quantized.fingerprint.sha256 != expected.sha256 else f"block scales ({deviation:.1e})"
        revision = f" at revision {provenance.revision}" if provenance.revision else ""
        fix = f"merge into {provenance.base_id}{revision}, unchanged, with bitsandbytes {provenance.bitsandbytes}"
        if provenance.load_dtype == torch.float32 and provenance.device != torch.device(self._device).type:
            fix += f", on {provenance.device}: codes of float32 weights depend on the device"
        raise UserError(
            Problem(
                f"{module}: {what} differ from those the adapter was trained on",
                where=str(self._reader.directory),
                fix=fix,
            )
        )


def _copy_configuration(
    base_dir: Path, adapter_dir: Path, output_dir: Path, *, dtype: torch.dtype, untie: bool
) -> None:
    """All but the weights: the base's own files, the tokenizer as trained, and a config.json that is still true."""
    copy_side_files(base_dir, output_dir, drop_quantization_config=True)
    if (adapter_dir / "tokenizer_config.json").is_file():
        for name in STALE_WITH_NEW_TOKENIZER:
            (output_dir / name).unlink(missing_ok=True)
        shutil.rmtree(output_dir / TEMPLATE_FOLDER, ignore_errors=True)
        for path in sorted(adapter_dir.iterdir()):
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES):
                shutil.copyfile(path, output_dir / path.name)
        if (adapter_dir / TEMPLATE_FOLDER).is_dir():
            shutil.copytree(adapter_dir / TEMPLATE_FOLDER, output_dir / TEMPLATE_FOLDER)
    config = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    edit_config(output_dir, _config_changes(config, dtype, untie))


def _config_changes(config: dict[str, Any], dtype: torch.dtype, untie: bool) -> dict[str, Any]:
    """Keys of config.json that the merge makes untrue, with their new values; those of nested configs too."""
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changes[key] = dtype_name(dtype)
        elif key == "tie_word_embeddings" and untie:
            changes[key] = False
        elif key.endswith("_config") and isinstance(value, dict):
            changes[key] = value | _config_changes(value, dtype, untie)
    if untie:
        changes.setdefault("tie_word_embeddings", False)
    return changes
