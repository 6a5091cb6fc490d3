"""A model with random weights in memory, held as a recipe says: no checkpoint is written.

Weights are drawn on the device and given to `from_pretrained`, which quantizes them as it does those of a file. What
bitsandbytes quantizes is drawn once for all layers, since each layer keeps its own 4-bit copy: of a 70B model one layer
in 16 bits is there at a time. All else, such as fused experts, is drawn for every layer.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from random_llama import STD
from transformers import PretrainedConfig, PreTrainedModel

from qlora.models.loading import DTYPES, bitsandbytes_config, disable_cpu_repacking
from qlora.models.shapes import skeleton
from qlora.recipe import Model


def load_random(config: PretrainedConfig, model: Model, device: str) -> PreTrainedModel:
    """The counterpart of `qlora.models.loading.load_base` for a configuration alone; `model` is a recipe's section."""
    bare = skeleton(config)
    quantized = model.quantization != "none"
    options: dict[str, Any] = {"quantization_config": bitsandbytes_config(model)} if quantized else {}
    loaded = type(bare).from_pretrained(
        None,
        config=config,
        state_dict=_draw(bare, DTYPES[model.dtype], device, shared=quantized),
        dtype=DTYPES[model.dtype],
        device_map={"": device},
        attn_implementation=model.attn_implementation,
        **options,
    )
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
