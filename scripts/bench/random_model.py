"""A model with random weights in memory, held as a recipe says: no checkpoint is written.

Weights are drawn on the device and given to `from_pretrained`, which quantizes them as it does those of a file. What
bitsandbytes quantizes is drawn once for all layers, since each layer keeps its own 4-bit copy: of a 70B model one layer
in 16 bits is there at a time. All else, such as fused experts, is drawn for every layer.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gptq_engines import limit_gpu
from random_llama import STD, write_byte_tokenizer
from train import GIB, peak_memory, run_steps
from transformers import PretrainedConfig, PreTrainedModel

from qlora.data.store import Rows
from qlora.models.base import Base
from qlora.models.loading import DTYPES, bitsandbytes_config, disable_cpu_repacking, load_tokenizer
from qlora.models.patches import each_quantized_weight
from qlora.models.shapes import skeleton
from qlora.models.sharding import Sharding
from qlora.recipe import Model, Recipe
from qlora.training import preference, sft


def train_random(
    recipe: Recipe, config: PretrainedConfig, rows: Sequence[Any], device: str, usable: float
) -> dict[str, Any]:
    """Train a recipe on such a model and rendered rows as `qlora train` would: seconds of each step, GiB, the plan.

    device: cpu or cuda. usable: GiB that torch is held to on a GPU, once the weights are there: what they are drawn
    into is not training's. Each process of a launch calls it with the same.
    """
    on_gpu = device != "cpu"
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    before = torch.cuda.memory_allocated() / GIB if on_gpu else 0.0

    def load(*_: Any, sharding: Any = None, **__: Any) -> Any:
        """In place of reading a checkpoint."""
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
        model = load_random(config, recipe.model, device, sharding)
        if on_gpu:
            torch.cuda.empty_cache()
            limit_gpu(usable + before)
        return model

    sft.load_for_training = preference.load_for_training = load
    build: Any = sft.build_trainer if recipe.train.method == "sft" else preference.build_trainer
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder))
        base = Base(recipe.model.base, None, Path(folder))
        checkpoints = Path(folder) / "checkpoints"
        tokenizer, kept = load_tokenizer(base.directory), Rows.of(rows)
        trainer = build(recipe, base, tokenizer, kept, None, device=device, checkpoints=checkpoints)
        times, logs = run_steps(trainer, on_gpu=on_gpu)
    memory = peak_memory(on_gpu=on_gpu)
    return {
        "allocated": memory["allocated"] - before,
        "reserved": memory["reserved"] - before,
        "expected": sum(trainer.plan.parts.values()) / GIB,
        "plan": trainer.plan.text,
        "parts": trainer.plan.parts,
        "step_seconds": times,
        "loss": logs[-1]["loss"],
        "grad_norm": float(logs[-1]["grad_norm"]),
    }


def load_random(
    config: PretrainedConfig, model: Model, device: str, sharding: Sharding | None = None
) -> PreTrainedModel:
    """The counterpart of `qlora.models.loading.load_base` for a configuration alone; `model` is a recipe's section."""
    bare = skeleton(config)
    quantized = model.quantization != "none"
    options: dict[str, Any] = {"quantization_config": bitsandbytes_config(model)} if quantized else {}
    taking = contextlib.nullcontext() if sharding is None else each_quantized_weight(sharding.take)
    with taking:
        loaded = type(bare).from_pretrained(
            None,
            config=config,
            state_dict=_draw(bare, DTYPES[model.dtype], device, shared=quantized),
            dtype=DTYPES[model.dtype],
            device_map={"": device},
            attn_implementation=model.attn_implementation,
            **options,
        )
    if sharding is not None:
        sharding.install(loaded)
    disable_cpu_repacking(loaded)
    loaded.config.use_cache = False
    return loaded


def _draw(bare: PreTrainedModel, dtype: torch.dtype, device: str, *, shared: bool) -> dict[str, torch.Tensor]:
    """Name → weight: matrices normal, norms one. shared: matrices of layers are one tensor for all layers."""
    generator = torch.Generator(device).manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    once: dict[str, torch.Tensor] = {}
    for name, parameter in bare.named_parameters():  # tied ones come once
        key = re.sub(r"\.\d+\.", ".*.", name) if shared and parameter.ndim == 2 else name
        if key not in once:
            drawn = torch.empty(parameter.shape, dtype=dtype, device=device)
            norm = parameter.ndim == 1 and name.endswith("weight")
            once[key] = drawn.fill_(1) if norm else drawn.normal_(std=STD, generator=generator)
        state[name] = once[key]
    return state
