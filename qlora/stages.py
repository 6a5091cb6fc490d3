"""What each stage does with a recipe: hands the run's recipe, data and directories to the module that does the work.

Every stage function writes into the folder it is given and returns metrics for the lineage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.artifacts import file_digest, read_json, write_json
from qlora.errors import UserError
from qlora.paths import RunDir
from qlora.recipe import Calibration, Quantize, Recipe

if TYPE_CHECKING:
    from qlora.data.calibration import CalibrationRow
    from qlora.data.rendering import RenderedRow
    from qlora.evaluation.merges import MergeBase
    from qlora.merging import MergedSource
    from qlora.models.checkpoint import TensorSource
    from qlora.quantization import QuantizeReport

Progress = Callable[[int, int, str], None]
UNKNOWN = object()  # the digest of what was not read


class Run:
    """A recipe being executed: its directories, device, base, tokenizer and rendered rows, each found once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dirs = RunDir(recipe.run_dir)
        self.log: Callable[[str, dict[str, Any], int | None], None] = lambda stage, metrics, step: None
        self.progress: Progress = lambda done, total, text: None

    @cached_property
    def device(self) -> str:
        from qlora.models.loading import pick_device

        return pick_device(self.recipe.device)

    def device_of(self, stage: str) -> str:
        """Where a stage after training computes."""
        from qlora.models.loading import pick_device

        own = getattr(self.recipe, stage).device
        return self.device if own is None else pick_device(own)

    @cached_property
    def base(self) -> Any:
        from qlora.models.base import resolve_base

        model = self.recipe.model
        return resolve_base(model.base, model.revision, trust_remote_code=model.trust_remote_code)

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer with new tokens and the chat template that the rows are rendered with."""
        from qlora.models.loading import load_tokenizer
        from qlora.models.tokens import add_tokens

        tokenizer = load_tokenizer(self.base.directory, self.recipe.model.trust_remote_code)
        add_tokens(tokenizer, self.recipe.lora)
        return tokenizer

    @cached_property
    def train_rows(self) -> Any:
        """`PreparedData` of the training split."""
        return self._prepare(self.splits.train, "train")

    @cached_property
    def eval_rows(self) -> Any:
        """`PreparedData` of the held-out split; None if there is none."""
        return self._prepare(self.splits.evaluation, "eval") if self.splits.evaluation is not None else None

    @property
    def held_out_rows(self) -> Any:
        """`Rows` of the held-out split; None if there is none."""
        return self.eval_rows.rows if self.eval_rows is not None else None

    @cached_property
    def splits(self) -> Any:
        """`Splits`: what is trained on, and what is held out."""
        from qlora.data.splits import read_splits

        return read_splits(self.recipe.data, lambda done, total: self.progress(done, total, "reading rows"))

    def _prepare(self, selection: Any, split: str) -> Any:
        from qlora.data.methods import unfit_rows
        from qlora.data.preparation import prepare

        def progress(done: int, total: int) -> None:
            self.progress(done, total, f"rendering {split} rows")

        prepared = prepare(selection, self.tokenizer, self.recipe.data, split_name=split, progress=progress)
        if prepared.chat_template is not None:
            self.tokenizer.chat_template = prepared.chat_template
        unfit_rows(self.recipe.train.method, prepared).raise_any(len(prepared.rows))
        return prepared

    def digests(self, *, fetch: bool = True) -> dict[str, Any]:
        """Digests of what the recipe reads, by key, for fingerprints: content, not paths.

        Without `fetch`, what is on the hub or takes long to read is UNKNOWN, and so are files that are gone.
        """
        found = {}
        for key, (is_here, content) in self._inputs().items():
            try:
                found[key] = content() if fetch or is_here else UNKNOWN
            except (UserError, OSError):
                if fetch:
                    raise
                found[key] = UNKNOWN
        return found

    def _inputs(self) -> dict[str, tuple[bool, Callable[[], Any]]]:
        """Key → whether it is files of this machine that are quickly read, and how its digest is found."""
        from qlora.data.corpora import corpus_digest
        from qlora.data.sources import is_local, source_digest
        from qlora.evaluation.tasks import task_digest
        from qlora.merging.combination import combined_digests
        from qlora.models.preview import is_plain_directory
        from qlora.models.starting_adapter import starting_digest

        model, data, measured = self.recipe.model, self.recipe.data, self.recipe.evaluate
        calibration = self.recipe.quantize.calibration
        template = Path(data.chat_template) if data.chat_template else None
        mix = calibration.mix.from_ if calibration.mix else None
        return {
            "base": (is_plain_directory(model.base), lambda: self.base.digest),
            "data.train": (
                all(is_local(source.path) for source in data.train),
                lambda: [source_digest(source) for source in data.train],
            ),
            "data.eval": (
                data.eval is None or is_local(data.eval.path),
                lambda: source_digest(data.eval) if data.eval is not None else None,
            ),
            # By what it holds out, or data.eval takes out: data decide it, and are compared themselves.
            "data.eval_share": (False, lambda: self.splits.digest),
            "data.chat_template": (
                True,
                lambda: file_digest(template) if template and template.is_file() else data.chat_template,
            ),
            "lora.start_from": (True, lambda: starting_digest(self.recipe.lora)),
            "lora.combine": (True, lambda: combined_digests(self.recipe.lora.combine)),
            "quantize.calibration.from": (True, lambda: corpus_digest(calibration.from_)),
            "quantize.calibration.mix.from": (True, lambda: corpus_digest(mix) if mix else None),
            "evaluate.general": (True, lambda: corpus_digest(measured.general) if measured.general else None),
            "evaluate.tasks": (True, lambda: [task_digest(task) for task in measured.tasks]),
        }


def check_quantization(run: Run) -> None:
    """Raise UserError for what will not be held as the recipe says, or not quantize, before anything is trained."""
    from qlora.models.held import training_shapes
    from qlora.models.packed_base import require_packed
    from qlora.models.shapes import read_config, skeleton
    from qlora.quantization import preview

    model, base = run.recipe.model, run.base
    require_packed(base.id, base.dequantized_from, model)
    config = read_config(base.directory, trust_remote_code=model.trust_remote_code)
    bare = skeleton(config, trust_remote_code=model.trust_remote_code)
    preview.check_quantization(run.recipe, training_shapes(bare, model, base.packed or base.directory))


def train(run: Run, fingerprint: str, output: Path | None, progress: Progress) -> dict[str, Any]:
    from qlora.training.callbacks import Reporter
    from qlora.training.launch import require_plain_launch
    from qlora.training.run import train_adapter

    require_plain_launch(run.recipe)
    if run.recipe.lora.combine:
        return combine(run, output) if output is not None else {}  # a launch's first process does it alone
    rows = run.train_rows
    metrics = train_adapter(
        run.recipe,
        run.base,
        run.tokenizer,
        rows.rows,
        run.held_out_rows,
        device=run.device,
        checkpoints=run.dirs.checkpoints,
        fingerprint=fingerprint,
        output=output,
        reporter=Reporter(progress, lambda values, step: run.log("train", values, step)),
    )
    _release_memory()
    apart = {"held_out": run.splits.held_out, "removed": run.splits.removed}
    return metrics | {"data": asdict(rows.statistics) | apart}


def combine(run: Run, output: Path) -> dict[str, Any]:
    """The adapter as a sum of others, with the base that it belongs to."""
    from qlora.merging.combination import combine, require_same_base
    from qlora.models.loading import load_for_training
    from qlora.training.run import write_base

    recipe, base = run.recipe, run.base
    model = load_for_training(base, recipe.model, run.device)
    require_same_base(recipe.lora.combine, write_base(model, recipe, base, output))
    parameters = combine(recipe.lora.combine, output, base_id=base.id)
    run.tokenizer.save_pretrained(output)
    del model
    _release_memory()
    return {"combined": len(recipe.lora.combine), "parameters": parameters, "processes": 1}


def merge(run: Run, fingerprint: str, output: Path | None, progress: Progress) -> dict[str, Any]:
    from qlora.merging import merge_adapter
    from qlora.models.loading import DTYPES

    assert output is not None
    section = run.recipe.merge
    report = merge_adapter(
        run.base.directory,
        run.dirs.adapter,
        output,
        base=section.base,
        dtype=DTYPES[section.dtype],
        rounding=section.rounding,
        device=run.device_of("merge"),
        write_weights=section.write,
        max_shard_bytes=int(section.max_shard_gb * 1e9),
        progress=progress,
    )
    return asdict(report)


def merged_source(run: Run) -> TensorSource:
    """The merged model as a `TensorSource`: from its weights on disk, or computed where the recipe writes none."""
    from qlora.models.checkpoint import CheckpointReader

    if run.recipe.merge.write:
        return CheckpointReader(run.dirs.merged)
    return computed_source(run, run.recipe.merge.base, run.dirs.merged, run.device_of("quantize"))


def computed_source(run: Run, base: MergeBase, directory: Path, device: str) -> MergedSource:
    """The merged model as it is computed from base and adapter. directory: has its configuration."""
    from qlora.merging import MergedSource
    from qlora.models.loading import DTYPES

    dtype = DTYPES[run.recipe.merge.dtype]
    return MergedSource(run.base.directory, run.dirs.adapter, directory, base=base, dtype=dtype, device=device)


QUANTIZED_NAME = "quantized.json"
REFINEMENT_DOES_NOT_FIT = (
    "refinement was left out, it does not fit in the GPU's memory: lower quantize.refine.tokens_per_step, or set "
    "quantize.refine: null"
)


def quantize(run: Run, fingerprint: str, output: Path | None, progress: Progress) -> dict[str, Any]:
    assert output is not None
    return quantize_source(run, merged_source(run), output, progress)


def quantize_source(run: Run, source: TensorSource, output: Path, progress: Progress) -> dict[str, Any]:
    """A merged model through the recipe's quantization, into `output`."""
    import torch

    from qlora.quantization import GPTQSettings

    section = run.recipe.quantize
    rows = _calibration_rows(run, section.calibration)
    options: dict[str, Any] = {
        "device": run.device_of("quantize"),
        "progress": progress,
        "attn_implementation": run.recipe.model.attn_implementation,
        "trust_remote_code": run.recipe.model.trust_remote_code,
    }
    # There while the checkpoint is what GPTQ made of it: an interrupted refinement begins again behind GPTQ.
    quantized = output / QUANTIZED_NAME
    if quantized.is_file():
        metrics = read_json(quantized)
    else:
        report = _quantizer(section)(source, output, rows, GPTQSettings.from_recipe(section), **options)
        _release_memory()
        metrics = asdict(report) | {"calibration_rows": report.rows, "calibration_tokens": report.tokens}
    if section.refine is not None:
        write_json(quantized, metrics)
        try:
            metrics["refine"] = _refine(run, source, output, rows, options | {"before_writing": quantized.unlink})
        except torch.OutOfMemoryError:
            # The checkpoint is complete, and refinement writes only at its end: hours of work need not be lost.
            metrics["warnings"] = [*metrics["warnings"], REFINEMENT_DOES_NOT_FIT]
            _release_memory()
        quantized.unlink(missing_ok=True)
    return metrics


def _calibration_rows(run: Run, calibration: Calibration) -> list[CalibrationRow]:
    from qlora.data.calibration import calibration_rows

    return calibration_rows(
        calibration, run.train_rows.rows, run.tokenizer, seed=run.recipe.seed, exclude=run.held_out_rows
    )


def _refine(
    run: Run, source: TensorSource, output: Path, rows: list[CalibrationRow], options: dict[str, Any]
) -> dict[str, Any]:
    from qlora.data.calibration import refinement_rows
    from qlora.quantization.refine import RefineSettings, refine_checkpoint

    quantize = run.recipe.quantize
    section = quantize.refine
    assert section is not None
    learnt, deciding = refinement_rows(
        quantize,
        run.train_rows.rows,
        run.tokenizer,
        seed=run.recipe.seed,
        exclude=run.held_out_rows,
        calibration=rows,
    )
    settings = RefineSettings(
        **section.model_dump(exclude={"samples"}), prompt_weight=quantize.prompt_weight, seed=run.recipe.seed
    )
    report = refine_checkpoint(source, output, learnt, settings, held_back=deciding, **options)
    _release_memory()
    return asdict(report)


def _quantizer(section: Quantize) -> Callable[..., QuantizeReport]:
    """The engine that the recipe names; all are called alike."""
    from qlora.quantization import quantize_checkpoint

    if section.engine == "native":
        return quantize_checkpoint
    from qlora.quantization.external import quantize_with_gptqmodel

    return partial(quantize_with_gptqmodel, method=section.method)


def check_evaluation(run: Run) -> None:
    """Raise UserError for what nothing could be measured on, and merges that are one, before anything is trained."""
    from qlora.evaluation.merges import check_compared
    from qlora.evaluation.tasks import require_tasks

    check_compared(run.recipe)
    require_tasks(run.recipe.evaluate)
    general_rows(run)


def general_rows(run: Run) -> list[RenderedRow]:
    """What evaluate.general names; empty if it names nothing."""
    from qlora.data.calibration import general_rows as drawn
    from qlora.recipe_measuring import GENERAL_LENGTH

    section = run.recipe.evaluate
    if section.general is None:
        return []
    return drawn(section.general, run.tokenizer, section.general_tokens, GENERAL_LENGTH)


def evaluate(run: Run, fingerprint: str, output: Path | None, progress: Progress) -> dict[str, Any]:
    from qlora import measuring

    return measuring.evaluate(run, fingerprint, output, progress)


def _release_memory() -> None:
    from qlora.evaluation.ladder import release_memory

    release_memory()
