"""A training run: from a recipe and rendered rows to an adapter with `base.json`, which says what it was trained on.

It resumes from the last complete checkpoint with the same data order. The trainer is that of `train.method`.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from qlora.artifacts import file_digest, read_json, write_json
from qlora.data.store import Rows
from qlora.errors import UserError
from qlora.models.base import Base
from qlora.models.loading import DTYPES
from qlora.models.patches import write_no_model_cards
from qlora.models.principal import FILE as BEGINNING
from qlora.models.provenance import Provenance, QuantizationSettings, write_provenance
from qlora.models.sharding import sharding_of
from qlora.models.starting_adapter import require_base
from qlora.recipe import Recipe
from qlora.training import preference, sft
from qlora.training.arguments import PLAN, trainable
from qlora.training.best import BEST, KeepBest
from qlora.training.callbacks import COMPLETE, MarkComplete, Report, Reporter
from qlora.training.profile import ProfileStep
from qlora.training.saved import require_one_adapter, require_whole_adapter

log = logging.getLogger(__name__)


def train_adapter(
    recipe: Recipe,
    base: Base,
    tokenizer: Any,
    rows: Rows,
    eval_rows: Rows | None,
    *,
    device: str,
    checkpoints: Path,
    fingerprint: str,
    output: Path | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Train; the process that has `output` writes adapter, tokenizer and base.json there. Returns metrics."""
    set_seed(recipe.seed)
    last = _checkpoint_to_resume(checkpoints, fingerprint, keep=output is not None)
    build: Any = sft.build_trainer if recipe.train.method == "sft" else preference.build_trainer
    trainer = build(recipe, base, tokenizer, rows, eval_rows, device=device, checkpoints=checkpoints)
    write_no_model_cards(trainer)
    if output is not None:
        # Before the first step, so that a device that computes 4-bit layers wrongly is refused before it costs time.
        beginning = checkpoints / BEGINNING if recipe.lora.init == "pissa" else None
        provenance = write_base(trainer.accelerator.unwrap_model(trainer.model), recipe, base, output, beginning)
        if recipe.lora.start_from is not None:
            require_base(provenance, recipe.lora)
        write_json(checkpoints / PLAN, asdict(trainer.plan.division))
    elif (sharding := sharding_of(trainer.accelerator.unwrap_model(trainer.model))) is not None:
        sharding.walk()
    report = Report(reporter, device, trainer.plan, resumed_from=last.name if last else None)
    trainer.add_callback(report)
    trainer.add_callback(MarkComplete())
    if recipe.train.profile and output is not None:
        trainer.add_callback(ProfileStep(checkpoints.parent / "profile", on_gpu=device.startswith("cuda")))
    best = _keep_best(recipe, trainer, checkpoints, writes=output is not None)
    result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    if not all(torch.isfinite(parameter).all() for parameter in trainable(trainer)):
        raise UserError(
            "training diverged: the adapter holds NaN or infinite numbers", "train.learning_rate", "lower it"
        )
    require_one_adapter(trainable(trainer), trainer.args.world_size)
    totals = {"steps": result.global_step, "mean_loss": result.training_loss, "processes": trainer.args.world_size}
    if output is not None:
        if best is not None and recipe.train.keep_best:
            totals["best"] = best.restore()
        _write_adapter(trainer, tokenizer, base, output)
    trainer.accelerator.wait_for_everyone()
    return report.metrics() | totals


def _keep_best(recipe: Recipe, trainer: Any, checkpoints: Path, *, writes: bool) -> KeepBest | None:
    train = recipe.train
    if train.evaluate_every is None or not (train.keep_best or train.patience):
        return None
    if trainer.eval_dataset is None:
        raise UserError(
            "there are no held-out rows to evaluate on",
            "train.keep_best" if train.keep_best else "train.patience",
            "name some in data.eval, or set data.eval_share",
        )

    def parameters() -> dict[str, torch.nn.Parameter]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    best = KeepBest(checkpoints / BEST, parameters, train.evaluate_every, train.patience, writes)
    trainer.add_callback(best)
    return best


def _write_adapter(trainer: Any, tokenizer: Any, base: Base, output: Path) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if preference.REFERENCE in model.peft_config:
        model.delete_adapter(preference.REFERENCE)
    model.peft_config["default"].base_model_name_or_path = base.id
    if (output / BEGINNING).is_file():  # or PEFT would add the adapter to weights that it is a part of
        model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(output, save_embedding_layers=False)
    require_whole_adapter(model, output)
    tokenizer.save_pretrained(output)


def write_base(model: Any, recipe: Recipe, base: Base, output: Path, beginning: Path | None = None) -> Provenance:
    """base.json of a model that is loaded for training, in the adapter's directory.

    beginning: the file of what its weights were taken from, which goes there too.
    """
    if beginning is not None:
        shutil.copyfile(beginning, output / BEGINNING)
    return write_provenance(
        model,
        output / "base.json",
        base_id=base.id,
        revision=base.revision,
        settings=QuantizationSettings.of(recipe.model, DTYPES[recipe.model.dtype]),
        beginning=file_digest(beginning) if beginning is not None else None,
    )


def _checkpoint_to_resume(checkpoints: Path, fingerprint: str, keep: bool) -> Path | None:
    """The last complete checkpoint of this very training run; those of another are removed if `keep`.

    Processes start together, so one may look before another has removed: none resumes from what is not its run's.
    """
    owner = checkpoints / "fingerprint.json"
    if not owner.is_file() or read_json(owner)["fingerprint"] != fingerprint:
        if keep:
            log.info("checkpoints of another recipe removed: %s", checkpoints)
            shutil.rmtree(checkpoints, ignore_errors=True)
            write_json(owner, {"fingerprint": fingerprint})
        return None
    complete = [path for path in checkpoints.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
