"""Supervised fine-tuning: the 4-bit base with a LoRA adapter through TRL's SFTTrainer.

Rows arrive as tokens and labels (qlora.data.rendering), so TRL neither templates nor masks. Training resumes from the
last complete checkpoint with the same data order, and writes the adapter with `base.json`: what it was trained on.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, set_seed
from trl import SFTConfig

from qlora.artifacts import read_json, write_json
from qlora.data.rendering import RenderedRow
from qlora.errors import UserError
from qlora.models.base import Base
from qlora.models.loading import DTYPES, attach_adapter, load_base
from qlora.models.provenance import QuantizationSettings, write_provenance
from qlora.recipe import Recipe
from qlora.training.callbacks import COMPLETE, MarkComplete, Report, Reporter
from qlora.training.fused import fuse, fuse_head
from qlora.training.packed import allow_packed
from qlora.training.schedule import Schedule, plan_schedule
from qlora.training.trainer import Trainer

log = logging.getLogger(__name__)


# Positions of one forward pass, where the recipe leaves it open.
FORWARD_TOKENS = {"cpu": 2048, "cuda": 8192}


def rows_per_step(recipe: Recipe, row_tokens: Sequence[int], processes: int) -> int:
    """Rows of an optimizer step, from batch_size or tokens_per_step; a UserError if processes would go without."""
    train = recipe.train
    if train.tokens_per_step is not None:
        return max(processes, round(train.tokens_per_step * len(row_tokens) / sum(row_tokens)))
    batch_size = train.batch_size or 16
    if batch_size < processes:
        raise UserError(
            f"{batch_size} rows per step leave some of {processes} processes without a row",
            "train.batch_size",
            f"make it {processes} or more",
        )
    return batch_size


def make_schedule(recipe: Recipe, row_tokens: Sequence[int], processes: int, device: str, *, padded: bool) -> Schedule:
    """The whole run's forwards, of at most `train.micro_batch_tokens` positions."""
    rows = rows_per_step(recipe, row_tokens, processes)
    steps_per_epoch = -(-len(row_tokens) // rows)
    steps = recipe.train.max_steps
    epochs = math.ceil(recipe.train.epochs if steps is None else steps / steps_per_epoch)
    return plan_schedule(
        row_tokens,
        rows_per_step=rows,
        processes=processes,
        seed=recipe.seed,
        epochs=epochs,
        most_tokens=recipe.train.micro_batch_tokens or FORWARD_TOKENS[torch.device(device).type],
        padded=padded,
    )


def train_adapter(
    recipe: Recipe,
    base: Base,
    tokenizer: Any,
    rows: Sequence[RenderedRow],
    eval_rows: Sequence[RenderedRow],
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
    trainer = build_trainer(recipe, base, tokenizer, rows, eval_rows, device=device, checkpoints=checkpoints)
    if output is not None:
        _write_provenance(trainer, recipe, base, output)
    report = Report(reporter, device, resumed_from=last.name if last else None)
    trainer.add_callback(report)
    trainer.add_callback(MarkComplete())
    result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    if not all(torch.isfinite(parameter).all() for parameter in trainable(trainer)):
        raise UserError(
            "training diverged: the adapter holds NaN or infinite numbers", "train.learning_rate", "lower it"
        )
    if output is not None:
        _write_adapter(trainer, tokenizer, base, output)
    trainer.accelerator.wait_for_everyone()
    totals = {"steps": result.global_step, "mean_loss": result.training_loss, "processes": trainer.args.world_size}
    return report.metrics() | totals


def build_trainer(
    recipe: Recipe,
    base: Base,
    tokenizer: Any,
    rows: Sequence[RenderedRow],
    eval_rows: Sequence[RenderedRow],
    *,
    device: str,
    checkpoints: Path,
) -> Trainer:
    """The 4-bit base with a fresh adapter, and the rows, in a trainer."""
    model = attach_adapter(load_base(base.directory, recipe.model, device, quantized=True), recipe.lora)
    fast = recipe.train.kernels == "auto"
    cannot_pack = allow_packed(model.get_base_model()) if fast else "train.kernels: plain"
    plain_head = fuse_head(model) if fast else "train.kernels: plain"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    schedule = make_schedule(
        recipe, [len(row.input_ids) for row in rows], processes, device, padded=cannot_pack is not None
    )
    trainer = Trainer(
        rows=rows,
        schedule=schedule,
        packed=cannot_pack is None,
        own_head=plain_head is None,
        model=model,
        args=sft_config(recipe, schedule, device, checkpoints, has_eval=bool(eval_rows)),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(eval_rows) if eval_rows and recipe.train.evaluate_every else None,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    # TRL casts trainable parameters of a 4-bit model to bf16; small late updates would round away.
    for parameter in trainable(trainer):
        parameter.data = parameter.data.to(DTYPES[recipe.lora.dtype])
    if fast:
        for what, reason in (("rows are padded", cannot_pack), ("TRL computes the loss", plain_head)):
            if reason:
                log.info("%s: %s", what, reason)
    if fast and device.startswith("cuda"):
        for reason, layers in fuse(model).plain.items():
            log.info("%d adapter layers train on the plain path: %s", layers, reason)
    return trainer


def trainable(trainer: Trainer) -> list[torch.nn.Parameter]:
    """The parameters that the optimizer changes."""
    assert trainer.model is not None
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def sft_config(recipe: Recipe, schedule: Schedule, device: str, checkpoints: Path, has_eval: bool) -> SFTConfig:
    """The recipe's train section as TRL's SFTConfig."""
    train = recipe.train
    options: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": recipe.evaluate.batch_size,
        "gradient_accumulation_steps": schedule.forwards,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch_fused" if device.startswith("cuda") else "adamw_torch",
        "gradient_checkpointing": train.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": recipe.model.compute_dtype == "bfloat16",
        "use_cpu": device == "cpu",
        "max_length": None,
        "save_strategy": "steps",
        "save_steps": train.checkpoint_every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if train.evaluate_every and has_eval else "no",
        "eval_steps": train.evaluate_every,
        "logging_steps": train.log_every,
        "logging_nan_inf_filter": False,  # it waits for the GPU in every forward
        "include_num_input_tokens_seen": "no",
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": device.startswith("cuda"),
        "seed": recipe.seed,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
    }
    unknown = sorted(set(train.args) - set(SFTConfig.__dataclass_fields__))
    if unknown:
        raise UserError(
            f"TRL's SFTConfig has no field {', '.join(unknown)}", "train.args", "see TRL's documentation of SFTConfig"
        )
    return SFTConfig(**options | train.args)


def _dataset(rows: Sequence[RenderedRow]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})


def _write_adapter(trainer: Trainer, tokenizer: Any, base: Base, output: Path) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.peft_config["default"].base_model_name_or_path = base.id
    model.save_pretrained(output, save_embedding_layers=False)
    (output / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    tokenizer.save_pretrained(output)


def _write_provenance(trainer: Trainer, recipe: Recipe, base: Base, output: Path) -> None:
    """Before the first step, so that a device that computes 4-bit layers wrongly is refused before it costs time."""
    write_provenance(
        trainer.accelerator.unwrap_model(trainer.model),
        output / "base.json",
        base_id=base.id,
        revision=base.revision,
        settings=QuantizationSettings(
            quant_type=recipe.model.quantization,
            double_quant=recipe.model.double_quant,
            compute_dtype=DTYPES[recipe.model.compute_dtype],
        ),
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
