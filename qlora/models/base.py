"""The base model on disk: a hub id, a local directory or a GGUF file, resolved to one safetensors directory."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.artifacts import atomic_directory, file_digest, quick_digest
from qlora.errors import UserError, missing_extra
from qlora.models.patches import parse_gguf_once
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
    """Find, download or convert the base. Raises `UserError` if it is not there or has no safetensors."""
    path = Path(name)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise UserError("no *.safetensors in this directory", name, "convert the checkpoint, or name a .gguf file")
        return Base(path.name, None, path)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError("this base model does not exist", name, "give a hub id, a directory or a .gguf file")
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Base:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is not in the local cache and the hub cannot be reached ({error.__class__.__name__})",
            "model.base",
            "check the network, or give a local directory",
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        hint = "accept the licence on the model's page and run `hf auth login`" if "401" in str(error) else ""
        raise UserError(f"{name} cannot be downloaded: {str(error).splitlines()[0]}", "model.base", hint) from None
    return Base(name, directory.name, directory)


def _from_gguf(path: Path) -> Base:
    """Convert once, into the cache: weights dequantized to bf16, config and tokenizer from the file's metadata."""
    if not path.is_file():
        raise UserError("this GGUF file does not exist", str(path), "check model.base")
    digest = file_digest(path)
    directory = cache_dir() / "models" / f"{path.stem}-{digest[:12]}"
    if not directory.is_dir():
        _convert_gguf(path, directory)
    return Base(path.name, f"sha256:{digest}", directory)


def _convert_gguf(path: Path, directory: Path) -> None:
    import torch
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf", "reading a .gguf base")
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
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    config["torch_dtype"] = config.get("dtype", "bfloat16")
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer_path = directory / "tokenizer_config.json"
    tokenizer = json.loads(tokenizer_path.read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        tokenizer.pop(key, None)
    tokenizer_path.write_text(json.dumps(tokenizer, indent=2, sort_keys=True) + "\n")
