"""The base model on disk: a hub id, a directory or a GGUF file, resolved to one directory of 16-bit safetensors."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qlora.artifacts import atomic_directory, file_digest, one_at_a_time, quick_digest
from qlora.models.patches import parse_gguf_once
from qlora.models.preview import Preview, download, preview_base
from qlora.models.side_files import older_spellings
from qlora.paths import cache_dir
from qlora.reporting.console import console

# What a checkpoint may bring besides weights; other formats of the same weights are not downloaded.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "merges*", "vocab*"]


@dataclass(frozen=True)
class Base:
    """A base model: the id to show, the commit of a hub id, and the directory with config, tokenizer and weights."""

    id: str
    revision: str | None
    directory: Path
    dequantized_from: str | None = None
    """gguf, gptq or awq, where that is what was found."""
    packed: Path | None = None
    """The directory that was found, where its weights are packed codes of GPTQ or AWQ."""

    @property
    def digest(self) -> str:
        return quick_digest(self.directory)


def resolve_base(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Base:
    """Find, download or convert the base. Raises `UserError` as `preview_base` does, and for packed weights that are
    not what their checkpoint says."""
    found = preview_base(name, revision)
    if found.gguf_file is not None:
        path = Path(name)
        digest = file_digest(path)
        return Base(path.name, f"sha256:{digest}", _converted(path.stem, digest, partial(_convert_gguf, path)), "gguf")
    base = Base(found.id, found.revision, found.directory)
    if found.weight_bytes is None:
        directory = download(name, revision, HUB_PATTERNS)
        base = Base(name, directory.name, directory)
    if found.quantized is None:
        return base
    convert = partial(_convert_packed, base.directory, trust_remote_code=trust_remote_code)
    directory = _converted(Path(base.id).name, base.digest, convert)
    return Base(base.id, base.revision, directory, found.quantized, base.directory)


def as_converted(found: Preview) -> Preview:
    """A GGUF file as the directory that it was converted to, which takes a moment to read; else what was found."""
    if found.gguf_file is None:
        return found
    path = found.directory / found.gguf_file
    directory = _place(path.stem, file_digest(path))
    return replace(found, directory=directory, gguf_file=None) if directory.is_dir() else found


def _place(name: str, digest: str) -> Path:
    return cache_dir() / "models" / f"{name}-{digest[:12]}"


def _converted(name: str, digest: str, convert: Callable[[Path], None]) -> Path:
    """Convert once, into the cache: weights dequantized to bf16. Processes of one launch come here together."""
    directory = _place(name, digest)
    if directory.is_dir():
        return directory
    with one_at_a_time(directory):
        if not directory.is_dir():
            console().print(f"  converting {name} to bf16 safetensors, once: {directory}")
            with atomic_directory(directory) as partial_directory:
                convert(partial_directory)
    return directory


def _convert_packed(source: Path, output: Path, *, trust_remote_code: bool) -> None:
    from qlora.models.packed_checkpoint import write_dequantized

    write_dequantized(source, output, trust_remote_code=trust_remote_code)


def _convert_gguf(path: Path, output: Path) -> None:
    """Weights, and config and tokenizer from the file's metadata."""
    import torch
    import transformers

    # Newer transformers keep GGUF blocks packed unless told otherwise.
    packed: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        packed["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with parse_gguf_once(), contextlib.redirect_stderr(io.StringIO()):  # hides the readers' own progress bars
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, **packed
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    _spell_for_older_engines(output)


def _spell_for_older_engines(directory: Path) -> None:
    """Add the key spellings of transformers 4 that serving engines still read."""
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("_model_name_or_path", None)
    config.pop("quantization_config", None)
    config |= older_spellings(config)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer_path = directory / "tokenizer_config.json"
    tokenizer = json.loads(tokenizer_path.read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        tokenizer.pop(key, None)
    tokenizer_path.write_text(json.dumps(tokenizer, indent=2, sort_keys=True) + "\n")
