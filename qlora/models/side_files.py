"""What a checkpoint has beside its weights: configuration, tokenizer, chat templates, custom code, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
TEMPLATE_FOLDER = "additional_chat_templates"


def copy_side_files(source: Path, destination: Path, *, drop_quantization_config: bool = False) -> None:
    """Copy what a checkpoint needs beside its weights: configuration, tokenizer, chat templates, custom code, licence.

    Files of the same name are replaced. `drop_quantization_config` removes that key from config.json, for weights that
    are no longer quantized. Weights, indexes, the model card and subfolders other than chat templates stay behind.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and _is_side_file(path):
            shutil.copyfile(path, destination / path.name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, destination / TEMPLATE_FOLDER, dirs_exist_ok=True)
    if drop_quantization_config:
        edit_config(destination, {"quantization_config": None})


def edit_config(directory: Path, changes: Mapping[str, object]) -> None:
    """Set keys of config.json in place (None removes the key); every other key keeps its spelling and its order."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_side_file(path: Path) -> bool:
    if path.name.startswith(".") or path.name == "README.md":
        return False
    return path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(".index.json")
