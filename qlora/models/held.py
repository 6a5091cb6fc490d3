"""What of a model training holds in which form: the recipe's quantization, skipped linears, experts of mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qlora.errors import Problem
from qlora.models.loading import fused_parameters
from qlora.models.packed_base import with_packed
from qlora.models.resources import BYTES
from qlora.models.shapes import ModelShapes, model_shapes
from qlora.models.skipped import skipped_modules
from qlora.models.training_memory import base_bytes
from qlora.recipe import Model, Recipe


def training_shapes(model: PreTrainedModel, section: Model, base: Path) -> ModelShapes:
    """`model_shapes` of a base as training holds it; `base` is the checkpoint as it was found, not dequantized.

    Raises UserError for skip patterns that find nothing, and as `model_shapes` and `with_packed` do.
    """
    shapes = model_shapes(model, skipped_modules(model, section.skip_modules))
    return with_packed(shapes, base) if section.quantization == "checkpoint" else shapes


def mixture_notes(model: Any, recipe: Recipe, shapes: ModelShapes) -> list[Problem]:
    """What `qlora check` says of a mixture of experts: which parts training quantizes, and which have an adapter.

    model: a skeleton, with the recipe's adapter on it where one could be attached. Nothing of other models.
    """
    from peft.tuners.lora import LoraLayer

    fused = fused_parameters(model)
    if not fused:
        return []
    itemsize, kind = BYTES[recipe.model.dtype], recipe.model.quantization
    quantizes = kind != "none"
    experts = itemsize * shapes.experts
    linears = base_bytes(recipe, shapes) - itemsize * shapes.unquantized if quantizes else 0
    rest = base_bytes(recipe, shapes) - experts - linears
    names = ", ".join(sorted({".".join(name.split(".")[-3:]) for name, _ in fused}))
    why = ": bitsandbytes quantizes linears, and they are tensors of three dimensions" if quantizes else ""
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    parts = [
        f"a mixture of experts: training holds the experts ({names}) in {8 * itemsize} bits ({_gib(experts)}{why}), "
        "without an adapter",
        f"its linears in {kind} ({_gib(linears)})" if quantizes else "",
        f"all else in {8 * itemsize} bits ({_gib(rest)})",
        f"an adapter is on {', '.join(sorted(adapted))}" if adapted else "no linear has an adapter",
        "GPTQ quantizes the experts after the merge",
    ]
    return [Problem("; ".join(part for part in parts if part), "model.quantization")]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
