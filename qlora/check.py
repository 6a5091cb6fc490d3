"""`qlora check`: everything that can be known about a recipe before any GPU time, all problems at once.

Reads the base's config and tokenizer (never its weights), renders and lints every row, estimates memory, disk and time
of each stage, and says which serving engines will load the result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, ParamSpec, TypeVar

from qlora.data.calibration import general_rows
from qlora.data.index import ProgressCallback, read_index
from qlora.data.lint import Segment, SplitReport, coloured, lint
from qlora.data.methods import unfit_rows
from qlora.data.preparation import PreparedData, render_rows
from qlora.data.splits import read_splits
from qlora.errors import Problem, QloraError, UserError, WillNotFit
from qlora.evaluation.contract import EngineVerdict, engine_support
from qlora.evaluation.merges import check_compared
from qlora.evaluation.tasks import require_tasks
from qlora.fits import Free, free_now, shortfalls, slowed
from qlora.models.base import as_converted
from qlora.models.estimates import estimate_stages
from qlora.models.held import mixture_notes, training_shapes
from qlora.models.loading import load_tokenizer, pick_device
from qlora.models.packed_base import packed_notes, require_packed
from qlora.models.patches import parse_gguf_once
from qlora.models.preview import Preview, preview_base
from qlora.models.resources import Machine, StageEstimate, machine_of
from qlora.models.shapes import AdapterShapes, ModelShapes, read_config, skeleton
from qlora.models.tokens import TrainedTokens, add_tokens
from qlora.quantization.external import check_options
from qlora.quantization.preview import (
    CalibrationPart,
    check_quantization,
    preview_calibration,
    starved_linears,
)
from qlora.quantization.settings import GPTQSettings
from qlora.recipe import Recipe
from qlora.recipe_measuring import GENERAL_LENGTH
from qlora.training.arguments import training_arguments
from qlora.training.launch import require_processes
from qlora.training.plan import PASSES, rows_per_step
from qlora.workload import adapter_of, step_lengths, workload
from qlora.workload import plan as plan_of

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class BaseFacts:
    """The base model, and what the adapter adds. Counts are parameters; `weight_bytes` is None for a hub id."""

    id: str
    revision: str | None
    architecture: str
    weight_bytes: int | None
    parameters: int
    quantized_parameters: int
    quantization: str
    adapter_parameters: int | None


@dataclass
class CheckReport:
    """What was found. Parts that could not be looked at, because of a problem before them, are None or empty."""

    name: str
    machine: Machine
    free: Free
    base: BaseFacts | None = None
    splits: list[SplitReport] = field(default_factory=list)
    examples: list[tuple[int, list[Segment]]] = field(default_factory=list)
    """The first training row, the one in the middle and the last: number, and runs of learned and not learned text."""
    calibration: list[CalibrationPart] = field(default_factory=list)
    steps: int | None = None
    rows_per_step: int | None = None
    seen_tokens: int | None = None
    """Of all steps together, whatever a method computes with them."""
    training: str | None = None
    """How a step is divided, and what is computed again."""
    stages: list[StageEstimate] = field(default_factory=list)
    engines: list[EngineVerdict] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    """What is wrong with recipe, data or installation."""
    shortfalls: list[Problem] = field(default_factory=list)
    """What will not fit."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)

    def raise_for_problems(self) -> None:
        """Raises `UserError` (exit 2) with every problem, or else `WillNotFit` (exit 4) with every shortfall."""
        if self.problems:
            raise UserError(self.problems)
        if self.shortfalls:
            raise WillNotFit(self.shortfalls)


def check(recipe: Recipe, progress: ProgressCallback | None = None) -> CheckReport:
    """Look at everything the recipe names. Problems are collected in the report, not raised. progress: of rows."""
    problems: list[Problem] = []
    attempt = _Attempts(problems)
    device = attempt(pick_device, recipe.device) or "cpu"
    report = CheckReport(recipe.name, machine_of(device), free_now(recipe, device), problems=problems)
    base = attempt(preview_base, recipe.model.base, recipe.model.revision)
    base = as_converted(base) if base else None
    with parse_gguf_once() if base and base.gguf_file else nullcontext():
        tokenizer, tokens = (attempt(_tokenizer, base, recipe) if base else None) or (None, None)
        shapes, adapter = _look_at_model(recipe, base, tokens, report, attempt) if base else (None, None)
    train, evaluation = _look_at_data(recipe, tokenizer, report, attempt, progress)
    problems += _missing_packages(recipe)
    attempt(require_tasks, recipe.evaluate)
    attempt(check_compared, recipe)
    report.warnings += _notes(recipe)
    if train is None or not train.rows:
        return report
    unfit = [
        problem
        for split in (train, evaluation)
        if split is not None
        for problem in unfit_rows(recipe.train.method, split).problems
    ]
    if unfit:
        report.problems += unfit
        return report
    lengths = step_lengths(recipe, train.rows)
    attempt(rows_per_step, recipe, lengths, recipe.train.processes)
    attempt(require_processes, recipe, recipe.train.processes)
    attempt(training_arguments, recipe, device, recipe.run_dir / "checkpoints", has_eval=evaluation is not None)
    plan = None
    if shapes is not None and adapter is not None:
        free = report.free.host if report.free.device is None else report.free.device
        plan = attempt(plan_of, recipe, train.rows, shapes, adapter, report.machine, free)
    held_out = evaluation.rows if evaluation else None
    assert tokenizer is not None, "rows were rendered with it"
    if recipe.evaluate.general is not None:
        attempt(general_rows, recipe.evaluate.general, tokenizer, recipe.evaluate.general_tokens, GENERAL_LENGTH)
    calibration = attempt(preview_calibration, recipe, train.rows, tokenizer, held_out)
    if calibration is not None:
        report.calibration = calibration.parts
        if shapes is not None:
            report.warnings += attempt(starved_linears, recipe, shapes, calibration.rows) or []
    if plan is None or calibration is None or shapes is None or adapter is None:
        return report
    work, report.steps = workload(recipe, plan, lengths, calibration, held_out)
    report.rows_per_step = plan.schedule.rows_per_step
    report.seen_tokens = round(work.train_tokens / PASSES[recipe.train.method])
    report.training = plan.text
    report.stages = attempt(estimate_stages, recipe, shapes, adapter, work, report.machine) or []
    if recipe.lora.combine:
        report.steps, report.seen_tokens, report.training = (
            0,
            None,
            f"no training: the sum of {len(recipe.lora.combine)} adapters",
        )
        report.stages = [stage for stage in report.stages if stage.stage != "train"]
    report.warnings += slowed(report.stages, report.free)
    report.shortfalls = shortfalls(report.stages, report.free)
    return report


class _Attempts:
    """Calls a function and turns what it raises for the user into entries of one list."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return function(*args, **kwargs)
        except QloraError as error:
            # Two steps can stumble over the same thing, such as a batch size.
            self.problems += [problem for problem in error.problems if problem not in self.problems]
            return None


def _look_at_model(
    recipe: Recipe, base: Preview, tokens: TrainedTokens | None, report: CheckReport, attempt: _Attempts
) -> tuple[ModelShapes | None, AdapterShapes | None]:
    trust = recipe.model.trust_remote_code
    config = attempt(read_config, base.directory, trust_remote_code=trust, gguf_file=base.gguf_file)
    model = attempt(skeleton, config, trust_remote_code=trust) if config is not None else None
    shapes = attempt(_shapes, model, recipe, base) if model is not None else None
    if shapes is None or model is None:
        return None, None
    attempt(_look_at_quantization, recipe, shapes, model.config.model_type, report, attempt)
    architecture = type(model).__name__
    adapter = attempt(adapter_of, recipe, model, tokens)
    report.warnings += [*packed_notes(base, recipe.model, shapes), *mixture_notes(model, recipe, shapes)]
    report.base = BaseFacts(
        base.id,
        base.revision,
        architecture,
        base.weight_bytes,
        shapes.total,
        shapes.quantized,
        recipe.model.quantization,
        adapter.trainable if adapter else None,
    )
    return shapes, adapter


def _shapes(model: Any, recipe: Recipe, base: Preview) -> ModelShapes:
    require_packed(base.id, base.quantized, recipe.model)
    return training_shapes(model, recipe.model, base.directory)


def _look_at_quantization(
    recipe: Recipe, shapes: ModelShapes, model_type: str, report: CheckReport, attempt: _Attempts
) -> None:
    section = recipe.quantize
    settings = GPTQSettings.from_recipe(section)
    report.engines = engine_support(
        settings.format,
        shapes.linears,
        method=section.method,
        attention_heads=shapes.attention_heads,
        model_type=model_type,
    )
    attempt(check_quantization, recipe, shapes)
    if section.engine == "gptqmodel":
        unused = attempt(check_options, settings, section.method)
        if unused:
            what = f"gptqmodel has no counterpart for {', '.join(unused)}"
            report.warnings.append(Problem(what, "quantize.engine"))


def _tokenizer(base: Preview, recipe: Recipe) -> tuple[Any, TrainedTokens | None]:
    from transformers import AutoTokenizer

    try:
        if base.gguf_file:
            tokenizer = AutoTokenizer.from_pretrained(base.directory, gguf_file=base.gguf_file)
        else:
            tokenizer = load_tokenizer(base.directory, recipe.model.trust_remote_code)
        return tokenizer, add_tokens(tokenizer, recipe.lora)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the tokenizer cannot be read: {str(error).splitlines()[0]}", str(base.directory), "check model.base"
        ) from None


def _look_at_data(
    recipe: Recipe, tokenizer: Any, report: CheckReport, attempt: _Attempts, progress: ProgressCallback | None
) -> tuple[PreparedData | None, PreparedData | None]:
    data = recipe.data
    if tokenizer is None:  # rows that cannot be rendered can still be read
        for source in [*data.train, *([data.eval] if data.eval else [])]:
            attempt(read_index, source, progress)
        return None, None
    if data.eval is not None and attempt(read_index, data.eval, progress) is None:
        data = data.model_copy(update={"eval": None, "eval_share": 0.0})  # the training rows are looked at all the same
    splits = attempt(read_splits, data, progress)
    if splits is None:
        return None, None
    train = attempt(render_rows, splits.train, tokenizer, data, split_name="train", progress=progress)
    evaluation = None
    if splits.evaluation is not None:
        evaluation = attempt(render_rows, splits.evaluation, tokenizer, data, split_name="eval", progress=progress)
    if splits.removed:
        what = f"{splits.removed} training rows are rows of data.eval too, and are not trained on"
        report.warnings.append(Problem(what, "data.train"))
    if splits.evaluation is None:
        report.warnings.append(
            Problem("there are no held-out rows, so nothing will be measured", "data.eval", "name a file of rows")
        )
    if train is None:
        return None, evaluation
    found = lint(train, evaluation, tokenizer)
    report.splits = found.splits
    report.problems += found.problems
    report.warnings += found.warnings
    shown = sorted({0, len(train.rows) // 2, len(train.rows) - 1}) if train.rows else []
    report.examples = [(number + 1, coloured(train.rows[number], tokenizer)) for number in shown]
    return train, evaluation


def _missing_packages(recipe: Recipe) -> list[Problem]:
    needed = {
        "flash_attn": (recipe.model.attn_implementation == "flash_attention_2", "model.attn_implementation"),
        "tensorboard": ("tensorboard" in recipe.track.to, "track.to"),
        "wandb": ("wandb" in recipe.track.to, "track.to"),
        "gptqmodel": (recipe.quantize.engine == "gptqmodel", "quantize.engine"),
    }
    return [
        Problem(
            f"needs the package {name.replace('_', '-')}, which is not installed", key, "install it, or change this"
        )
        for name, (asked, key) in needed.items()
        if asked and importlib.util.find_spec(name) is None
    ]


def _notes(recipe: Recipe) -> list[Problem]:
    notes = []
    if recipe.quantize.engine == "native" and importlib.util.find_spec("gptqmodel") is None:
        notes.append(
            Problem(
                "gptqmodel is not installed: qlora needs it for nothing, transformers needs it to run the checkpoint",
                fix='pip install "qlora[gptq]" where you will serve with transformers',
            )
        )
    if recipe.quantize.engine == "gptqmodel":
        what = "the memory shown is that of qlora's own engine; how long gptqmodel takes is not known"
        notes.append(Problem(what, "quantize.engine"))
    if recipe.evaluate.generate:
        notes.append(Problem("times leave out generating answers", "evaluate.generate"))
    if recipe.evaluate.tasks:
        notes.append(Problem("memory and times leave out the tasks of lm-eval", "evaluate.tasks"))
    return notes
