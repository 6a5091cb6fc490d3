"""What quantization will calibrate on, looked at before it runs: how a mix turns out, and whether it suffices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from qlora.data.calibration import CalibrationRow, calibration_rows, refinement_rows
from qlora.data.store import Rows
from qlora.errors import Problem
from qlora.models.quantize_estimates import quantized_linears
from qlora.models.shapes import ModelShapes
from qlora.quantization.external import check_options, check_outputs
from qlora.quantization.settings import GPTQSettings
from qlora.recipe import Recipe


@dataclass(frozen=True)
class CalibrationPart:
    """Rows of one kind. `source` is as `quantize.calibration` names it."""

    source: str
    rows: int
    tokens: int


@dataclass(frozen=True)
class CalibrationPreview:
    """The rows that quantization will be given."""

    rows: list[CalibrationRow]
    refinement: list[CalibrationRow] | None
    """Rows to refine on and to judge it by; None where the recipe does not refine."""
    parts: list[CalibrationPart]
    """What `rows` consist of."""


def check_quantization(recipe: Recipe, shapes: ModelShapes) -> None:
    """Raise UserError for what the recipe's quantize section cannot do to a model of these shapes."""
    section = recipe.quantize
    settings = GPTQSettings.from_recipe(section)
    linears = {linear.name: (linear.out_features, linear.in_features) for linear in shapes.linears}
    settings.check_modules(list(linears))
    settings.check_shapes(linears)
    if section.method == "awq":
        check_outputs(linears)
    if section.engine == "gptqmodel":
        check_options(settings, section.method)


def preview_calibration(
    recipe: Recipe, train: Rows, tokenizer: PreTrainedTokenizerBase, held_out: Rows | None
) -> CalibrationPreview:
    """Draw the rows as `qlora quantize` will. Raises UserError as `calibration_rows` does."""
    section, refine = recipe.quantize.calibration, recipe.quantize.refine
    draw = partial(calibration_rows, train=train, tokenizer=tokenizer, seed=recipe.seed, exclude=held_out)
    rows = draw(section)
    if section.mix is None:
        parts = [_part(section.from_, rows)]
    else:
        # What is mixed in is drawn last: without it, an equal seed draws the same other rows.
        others = draw(section.model_copy(update={"mix": None}))
        parts = [_part(section.from_, others), _part(section.mix.from_, rows, others)]
    refinement = None
    if refine is not None:
        learnt, deciding = refinement_rows(
            recipe.quantize, train, tokenizer, seed=recipe.seed, exclude=held_out, calibration=rows
        )
        refinement = learnt + deciding
    return CalibrationPreview(rows, refinement, parts)


def starved_linears(recipe: Recipe, shapes: ModelShapes, rows: Sequence[CalibrationRow]) -> list[Problem]:
    """A warning if linears will see fewer tokens than they have inputs: their Hessians miss some directions.

    Raises UserError for rules of `quantize.modules` and `quantize.skip` that do not fit the model.
    """
    prompts_count = recipe.quantize.prompt_weight > 0
    tokens = sum(len(row.input_ids) if prompts_count or row.loss is None else sum(row.loss) for row in rows)
    linears = [linear for linear, _ in quantized_linears(recipe, shapes)]
    starved = [linear for linear in linears if tokens * linear.tokens_share < linear.in_features]
    if not starved:
        return []
    worst = min(starved, key=lambda linear: linear.tokens_share / linear.in_features)
    what = (
        f"{len(starved)} of {len(linears)} modules will see fewer calibration tokens than they have inputs "
        f"({worst.name}: about {tokens * worst.tokens_share:,.0f} for {worst.in_features:,})"
    )
    fix = "raise samples or max_length, or mix in general text; several times as many tokens are needed"
    return [Problem(what, "quantize.calibration", fix)]


def _part(
    source: str | list[str], rows: Sequence[CalibrationRow], without: Sequence[CalibrationRow] = ()
) -> CalibrationPart:
    name = source if isinstance(source, str) else f"{len(source)} strings"
    return CalibrationPart(name, len(rows) - len(without), _tokens(rows) - _tokens(without))


def _tokens(rows: Sequence[CalibrationRow]) -> int:
    return sum(len(row.input_ids) for row in rows)
