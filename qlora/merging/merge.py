"""The merge stage: the model that training saw, as one 16-bit checkpoint, written tensor by tensor.

The arithmetic is that of `qlora.merging.source`, which computes each tensor when it is read.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.merging.source import MergeBase, MergedSource, Rounding
from qlora.models.checkpoint import DEFAULT_SHARD_BYTES, CheckpointWriter, total_bytes
from qlora.models.provenance import dtype_name
from qlora.models.side_files import TEMPLATE_FOLDER, copy_side_files, edit_config

Progress = Callable[[int, int, str], None]

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
    """Dtype of merged weights on disk, and that in which the merged model computes."""
    rounding: Rounding
    weights_written: bool
    """False: the weights were computed and checked, and exist nowhere."""
    tensors: int
    """Tensors of the merged model."""
    merged_modules: int
    """Modules with a low-rank update."""
    replaced_tensors: int
    """Tensors that training saved whole (modules_to_save, biases)."""
    trained_tokens: int
    """Tokens whose rows of embeddings and output head were trained."""
    untied: bool
    """Whether input embeddings and output head were one tensor in the base and are two now."""
    total_bytes: int
    """Bytes of weights on disk."""
    digest: str
    """Digest of all codes of the base, equal to that of base.json."""
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
    rounding: Rounding = "stochastic",
    device: str = "cpu",
    write_weights: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge a trained adapter into its base and write a complete model directory.

    base_dir: the 16-bit base. adapter_dir: PEFT adapter with base.json; its tokenizer wins over the base's. output_dir:
    exists and is empty. base: what the adapter is added to, the dequantized weights it was trained on (exact) or the
    16-bit ones. dtype: of all linear layers that were quantized and all tensors that were trained; other tensors keep
    their own. rounding: of weights with an update, to 16 bits. write_weights: False leaves them out of the directory,
    for `MergedSource` to compute again in float32; every tensor is computed and checked all the same. progress: called
    with (tensors done, tensors in all, name).

    Peak memory is a few copies of the largest tensor and a few hundred MB; the same inputs give the same bytes on the
    same kind of device. Raises UserError as `MergedSource` does; WillNotFit if the disk is too small.
    """
    started = time.monotonic()
    weight_dtype = dtype if write_weights else torch.float32
    source = MergedSource(
        base_dir,
        adapter_dir,
        output_dir,
        base=base,
        dtype=dtype,
        weight_dtype=weight_dtype,
        rounding=rounding,
        device=device,
    )
    written = {name: source.spec(name) for name in source.names()} if write_weights else {}
    if write_weights:
        with CheckpointWriter(output_dir, written, max_shard_bytes) as writer:
            for name, tensor in _merged_tensors(source, progress):
                writer.write(name, tensor)
    else:
        for _ in _merged_tensors(source, progress):
            pass  # reading is what checks base and adapter
    source.adapter.check_all_taken()
    _copy_configuration(base_dir, adapter_dir, output_dir, source, dtype)
    return MergeReport(
        base=base,
        dtype=dtype_name(dtype),
        rounding=rounding,
        weights_written=write_weights,
        tensors=len(source.names()),
        merged_modules=len(source.adapter.lora),
        replaced_tensors=len(source.adapter.replacements),
        trained_tokens=max((len(rows.tokens) for rows in source.adapter.rows.values()), default=0),
        untied=source.untied,
        total_bytes=total_bytes(written),
        digest=source.provenance.digest,
        absmax_deviation=source.absmax_deviation,
        seconds=time.monotonic() - started,
    )


def _merged_tensors(source: MergedSource, progress: Progress | None) -> Iterator[tuple[str, torch.Tensor]]:
    names = source.names()
    for done, name in enumerate(names, start=1):
        yield name, source.read(name)
        if progress:
            progress(done, len(names), name)


def _copy_configuration(
    base_dir: Path, adapter_dir: Path, output_dir: Path, source: MergedSource, dtype: torch.dtype
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
    edit_config(output_dir, _config_changes(config, dtype, source.untied, source.vocabulary))


def _config_changes(
    config: dict[str, Any], dtype: torch.dtype, untie: bool, vocabulary: tuple[int, int] | None
) -> dict[str, Any]:
    """Keys of config.json that the merge makes untrue, with their new values; those of nested configs too.

    vocabulary: rows before and after.
    """
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changes[key] = dtype_name(dtype)
        elif key == "tie_word_embeddings" and untie:
            changes[key] = False
        elif key == "vocab_size" and vocabulary is not None and value == vocabulary[0]:
            changes[key] = vocabulary[1]
        elif key.endswith("_config") and isinstance(value, dict):
            changes[key] = value | _config_changes(value, dtype, untie, vocabulary)
    if untie:
        changes.setdefault("tie_word_embeddings", False)
    return changes
