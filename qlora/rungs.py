"""The models that the ladder measures: how each of a run is called, and loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.artifacts import Lineage
from qlora.data.rendering import RenderedRow
from qlora.evaluation.ladder import BASE, START, TRAINED, Rung
from qlora.evaluation.merges import MergeBase
from qlora.measure import free_for_training
from qlora.models.estimates import model_budget, scoring_parts
from qlora.models.loading import DTYPES, load_base, load_for_training, load_gptq, load_plain, load_trained
from qlora.models.resources import BYTES
from qlora.models.shapes import model_shapes, read_config, skeleton
from qlora.models.tokens import TrainedTokens, trained_tokens
from qlora.paths import RunDir
from qlora.recipe import Model, Recipe
from qlora.reporting.outcome import quantized_label

if TYPE_CHECKING:
    from qlora.models.base import Base
    from qlora.stages import Run

MERGED = "merged"
GPTQ = "gptq"


@dataclass(frozen=True)
class OtherMerge:
    """The merge into the base that the recipe does not name, and what GPTQ makes of it."""

    base: MergeBase
    merged: Path
    gptq: Path


def rungs(run: Run, rows: Sequence[RenderedRow], other: OtherMerge | None = None) -> list[Rung]:
    """In order, each of what is there; `rows` are what they will be measured on. other: the last ones are of it."""
    model, device, most = run.recipe.model, run.device_of("evaluate"), _memory_for_models(run, rows)
    tokens = trained_tokens(run.recipe.lora, run.base.directory, model.trust_remote_code)
    return [
        *learning_rungs(run.base, model, run.dirs.adapter, tokens, device, most),
        *shipped_rungs(run.recipe, run.dirs, device, most),
        *(_other_rungs(run.recipe, other, device, most) if other is not None else []),
    ]


def learning_rungs(
    base: Base, model: Model, adapter: Path, tokens: TrainedTokens | None, device: str, most: int | None = None
) -> list[Rung]:
    """The base in 16 bits, as training held it where that is another, and with the trained adapter on it.

    most: bytes of each GPU that a model in 16 bits may take, as `place` has it.
    """
    load = partial(load_for_training, base, model, device, tokens=tokens)
    plain = partial(load_base, base.directory, model, device, quantized=False, tokens=tokens, most=most)
    packed = base.dequantized_from or ""
    kind = (packed if model.quantization == "checkpoint" else model.quantization).upper()
    found = [
        Rung(
            BASE,
            f"base, {packed.upper()}" if packed in ("gptq", "awq") else "base, 16 bits",
            lambda: plain().eval(),
        ),
        Rung(START, f"base, {kind}", lambda: load().eval()),
        Rung(TRAINED, f"trained, {kind} + LoRA", lambda: load_trained(load(), adapter, base.directory)),
    ]
    # Where training quantizes nothing by itself, it begins with the base.
    return [rung for rung in found if rung.name != START or model.requantizes]


def shipped_rungs(recipe: Recipe, dirs: RunDir, device: str, most: int | None = None) -> list[Rung]:
    """What a run writes to be served, which needs no base: merged, where the recipe writes it, and quantized.

    most: as `learning_rungs` has it.
    """
    label = quantized_label(recipe.quantize, Lineage(dirs.lineage).metrics("quantize"))
    merged = "merged" if recipe.merge.base == "dequantized" else "merged, original base"
    load_merged, load_quantized = _loaders(recipe, device, most)
    found = [
        Rung(MERGED, merged, partial(load_merged, dirs.merged)),
        Rung(GPTQ, label, partial(load_quantized, dirs.gptq)),
    ]
    return found if recipe.merge.write else found[1:]


def _other_rungs(recipe: Recipe, other: OtherMerge, device: str, most: int | None) -> list[Rung]:
    """The same of the other merge."""
    method = recipe.quantize.method.upper()
    load_merged, load_quantized = _loaders(recipe, device, most)
    found = [
        Rung("merged_other", f"merged, {other.base} base", partial(load_merged, other.merged)),
        Rung("gptq_other", f"{method}, {other.base} base", partial(load_quantized, other.gptq)),
    ]
    return found if recipe.merge.write else found[1:]


def _loaders(recipe: Recipe, device: str, most: int | None) -> tuple[Callable[[Path], Any], Callable[[Path], Any]]:
    """Of a merged directory, and of a quantized one."""
    options: dict[str, Any] = {
        "device": device,
        "attn_implementation": recipe.model.attn_implementation,
        "trust_remote_code": recipe.model.trust_remote_code,
        "most": most,
    }
    return (
        partial(load_plain, dtype=DTYPES[recipe.merge.dtype], **options),
        partial(load_gptq, dtype=DTYPES[recipe.model.dtype], **options),
    )


def _memory_for_models(run: Run, rows: Sequence[RenderedRow]) -> int | None:
    """Bytes of each GPU that a model may take, where models in 16 bits are larger than what its rows leave of one."""
    device, model = run.device_of("evaluate"), run.recipe.model
    if device == "cpu":
        return None
    config = read_config(run.base.directory, trust_remote_code=model.trust_remote_code)
    shapes = model_shapes(skeleton(config, trust_remote_code=model.trust_remote_code))
    longest, answer = max(row.tokens for row in rows), max(row.supervised_tokens for row in rows)
    beside = sum(scoring_parts(run.recipe, shapes, longest, answer).values())
    most = max(0, model_budget(run.recipe, free_for_training(device)) - beside)
    return most if BYTES[model.dtype] * shapes.total > most else None
