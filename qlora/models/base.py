"""The base model on disk: a hub id, a local directory or a GGUF file, resolved to one safetensors directory."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora.artifacts import atomic_directory, file_digest, quick_digest
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

    @property
    def digest(self) -> str:
        return quick_digest(self.directory)


def resolve_base(name: str, revision: str | None = None) -> Base:
    """Find, download or convert the base. Raises `UserError` as `preview_base` does."""
    found = preview_base(name, revision)
    if found.gguf_file is not None:
        return _from_gguf(Path(name))
    if found.weight_bytes is not None:
        return Base(found.id, found.revision, found.directory)
    directory = download(name, revision, HUB_PATTERNS)
    return Base(name, directory.name, directory)


def _from_gguf(path: Path) -> Base:
    """Convert once, into the cache: weights dequantized to bf16, config and tokenizer from the file's metadata."""
    digest = file_digest(path)
    directory = _converted(path, digest)
    if not directory.is_dir():
        _convert_gguf(path, directory)
    return Base(path.name, f"sha256:{digest}", directory)


def as_converted(found: Preview) -> Preview:
    """A GGUF file as the directory that it was converted to, which takes a moment to read; else what was found."""
    if found.gguf_file is None:
        return found
    path = found.directory / found.gguf_file
    directory = _converted(path, file_digest(path))
    return replace(found, directory=directory, gguf_file=None) if directory.is_dir() else found


def _converted(path: Path, digest: str) -> Path:
    return cache_dir() / "models" / f"{path.stem}-{digest[:12]}"


def _convert_gguf(path: Path, directory: Path) -> None:
    import torch
    import transformers

    # Newer transformers keep GGUF blocks packed unless told otherwise.
    packed: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        packed["quantization_config"] = transformers.GgufConfig(dequantize=True)
    console().print(f"  converting {path.name} to safetensors, once: {directory}")
    with parse_gguf_once(), contextlib.redirect_stderr(io.StringIO()):  # hides the readers' own progress bars
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, **packed
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        with atomic_directory(directory) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            _spell_for_older_engines(partial)


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
