"""What a checkpoint has beside its weights: configuration, tokenizer, chat templates, custom code, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
TEMPLATE_FOLDER = "additional_chat_templates"


def copy_side_files(source: Path, destination: Path, *, drop_quantization_config: bool = False) -> None:
    """Copy what a checkpoint needs beside its weights: configuration, tokenizer, chat templates, custom code, licence.

    Files of the same name are replaced. `drop_quantization_config` removes that key from config.json, for weights that
    are no longer quantized, and config.json gains `older_spellings`. Weights, indexes, the model card and subfolders
    other than chat templates stay behind.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and _is_side_file(path):
            shutil.copyfile(path, destination / path.name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, destination / TEMPLATE_FOLDER, dirs_exist_ok=True)
    changes: dict[str, Any] = older_spellings(json.loads((source / "config.json").read_text(encoding="utf-8")))
    if drop_quantization_config:
        changes["quantization_config"] = None
    edit_config(destination, changes)


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


def older_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.json as transformers 4 spelled them, where a config says them in transformers 5's way alone.

    Engines that read the older keys (ExLlamaV2 0.3, AutoGPTQ) find no rotary base in `rope_parameters` and take 10,000
    without a word. transformers 5 reads both and comes to the same configuration. Nested configs are spelled out too.
    """
    rope = config.get("rope_parameters")
    spelled = _older_rope(rope) if isinstance(rope, dict) else {}
    if "dtype" in config:
        spelled["torch_dtype"] = config["dtype"]
    found = {key: value for key, value in spelled.items() if key not in config}
    for key, value in config.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            inner = older_spellings(value)
            if inner:
                found[key] = value | inner
    return found


def _older_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(rope.get("full_attention"), dict):  # one for each kind of layer, as Gemma 3 has them
        local = rope.get("sliding_attention") or {}
        found = {"rope_local_base_freq": local.get("rope_theta")}
        rope = rope["full_attention"]
    else:
        found = {"partial_rotary_factor": rope.get("partial_rotary_factor")}
    found["rope_theta"] = rope.get("rope_theta")
    if rope.get("rope_type", "default") != "default":
        moved = ("rope_theta", "partial_rotary_factor")
        found["rope_scaling"] = {key: value for key, value in rope.items() if key not in moved}
    return {key: value for key, value in found.items() if value is not None}
