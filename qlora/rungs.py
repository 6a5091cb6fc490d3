"""The models that the ladder measures: how each of a run is called, and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora.artifacts import Lineage
from qlora.data.rendering import RenderedRow
from qlora.evaluation.ladder import BASE, START, TRAINED, Rung
from qlora.measure import free_for_training
from qlora.models.estimates import model_budget, scoring_parts
from qlora.models.loading import DTYPES, load_base, load_for_training, load_gptq, load_plain, load_trained
from qlora.models.resources import BYTES
from qlora.models.shapes import model_shapes, read_config, skeleton
from qlora.models.tokens import trained_tokens
from qlora.reporting.outcome import quantized_label

if TYPE_CHECKING:
    from qlora.stages import Run


def rungs(run: Run, rows: Sequence[RenderedRow]) -> list[Rung]:
    """In order, each of what is there; `rows` are what they will be measured on."""
    model, device = run.recipe.model, run.device_of("evaluate")
    dtype, most = DTYPES[model.dtype], _memory_for_models(run, rows)
    tokens = trained_tokens(run.recipe.lora, run.base.directory, model.trust_remote_code)
    load = partial(load_for_training, run.base, model, device, tokens=tokens)
    plain = partial(load_base, run.base.directory, model, device, quantized=False, tokens=tokens, most=most)
    packed = run.base.dequantized_from or ""
    kind = (packed if model.quantization == "checkpoint" else model.quantization).upper()
    options: dict[str, Any] = {
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
        "most": most,
    }
    merged = partial(load_plain, run.dirs.merged, DTYPES[run.recipe.merge.dtype], device, **options)
    found = [
        Rung(
            BASE,
            f"base, {packed.upper()}" if packed in ("gptq", "awq") else "base, 16 bits",
            lambda: plain().eval(),
        ),
        Rung(START, f"base, {kind}", lambda: load().eval()),
        Rung(
            TRAINED,
            f"trained, {kind} + LoRA",
            lambda: load_trained(load(), run.dirs.adapter, run.base.directory),
        ),
        Rung("merged", "merged" if run.recipe.merge.base == "dequantized" else "merged, original base", merged),
        Rung(
            "gptq",
            quantized_label(run.recipe.quantize, Lineage(run.dirs.lineage).metrics("quantize")),
            partial(load_gptq, run.dirs.gptq, dtype, device, **options),
        ),
    ]
    # Where training quantizes nothing by itself, it begins with the base.
    left_out = {name for name, there in ((START, model.requantizes), ("merged", run.recipe.merge.write)) if not there}
    return [rung for rung in found if rung.name not in left_out]


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
