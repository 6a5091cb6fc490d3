"""A base model without its weights: config and tokenizer, from a hub id, a directory or a GGUF file."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from qlora.errors import UserError, missing_extra

# Config, tokenizer and model code of a hub repository, in kilobytes to a few megabytes.
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py"]
# Files beside config.json that alone say how older tools quantized a checkpoint.
OLDER_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass(frozen=True)
class Preview:
    """A base model that was found. `weight_bytes` is None where only the hub has the weights.

    quantized: gptq or awq, where its weights are such, and are dequantized before anything else.
    """

    id: str
    revision: str | None
    directory: Path
    gguf_file: str | None = None
    weight_bytes: int | None = None
    quantized: str | None = None


def preview_base(name: str, revision: str | None = None) -> Preview:
    """Find the base; of a hub id, fetch the small files only.

    Raises `UserError` when it does not exist, has no safetensors, or is quantized in a way that is not read, and when a
    .gguf base needs the extra `gguf`.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.is_dir():
        return _directory(path)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError("this base model does not exist", name, "give a hub id, a directory or a .gguf file")
    return _hub(name, revision)


def is_plain_directory(name: str) -> bool:
    """Whether this is a directory with weights that are read as they are, not converted first."""
    path = Path(name)
    return (path / "config.json").is_file() and _quantization_method(path) is None


def _gguf(path: Path) -> Preview:
    if not path.is_file():
        raise UserError("this GGUF file does not exist", str(path), "check model.base")
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf", "reading a .gguf base")
    return Preview(path.name, None, path.parent, gguf_file=path.name, weight_bytes=path.stat().st_size)


def _directory(path: Path) -> Preview:
    weights = list(path.glob("*.safetensors"))
    if not weights:
        raise UserError("no *.safetensors in this directory", str(path), "convert the checkpoint, or name a .gguf file")
    size = sum(file.stat().st_size for file in weights)
    return Preview(path.name, None, path, weight_bytes=size, quantized=_quantized(str(path), path))


def _hub(name: str, revision: str | None) -> Preview:
    directory = download(name, revision, SMALL_FILES)
    return Preview(name, directory.name, directory, quantized=_quantized(name, directory))


def download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The files of a hub repository that match, in the hub's own cache. Raises `UserError` if they cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    # A hub that cannot be reached ends in LocalEntryNotFoundError, which is an OSError.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{name} cannot be read from the hub: {str(error).splitlines()[0]}",
            "model.base",
            "check the id, the network, and for gated models that you accepted the licence and ran `hf auth login`",
        ) from None


def _quantized(name: str, directory: Path) -> str | None:
    """gptq, awq or None; raises UserError for other methods."""
    config = directory / "config.json"
    if not config.is_file():
        raise UserError("there is no config.json", str(directory), "check model.base")
    method = _quantization_method(directory)
    if method not in (None, "gptq", "awq"):
        raise UserError(
            f"this base is quantized already ({method}), in a way that is not read here",
            name,
            "name the 16-bit model it was made from: training quantizes it by itself (model.quantization)",
        )
    return method


def _quantization_method(directory: Path) -> str | None:
    """What a checkpoint says it was quantized with, in config.json or in the file of older AutoGPTQ and AutoAWQ."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if config is not None:
        return str(config.get("quant_method", "unknown method"))
    return next((method for file, method in OLDER_CONFIGS.items() if (directory / file).is_file()), None)
