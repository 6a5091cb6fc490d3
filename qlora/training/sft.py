"""Supervised fine-tuning: the 4-bit base with a LoRA adapter through TRL's SFTTrainer.

Rows arrive as tokens and labels (qlora.data.rendering), so TRL neither templates nor masks. Training resumes from the
last complete checkpoint with the same data order, and writes the adapter with `base.json`: what it was trained on.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PrinterCallback, set_seed
from trl import SFTConfig

from qlora.artifacts import read_json, write_json
from qlora.data.rendering import RenderedRow
from qlora.errors import UserError
from qlora.kernels.float8 import missing as float8_missing
from qlora.measure import free_for_training
from qlora.models.base import Base
from qlora.models.loading import DTYPES, attach_adapter, load_base
from qlora.models.provenance import QuantizationSettings, write_provenance
from qlora.models.resources import machine_of
from qlora.models.shapes import AdapterShapes, model_shapes, skeleton
from qlora.models.starting_adapter import require_base, start_from
from qlora.recipe import Recipe
from qlora.training.best import BEST, KeepBest
from qlora.training.callbacks import COMPLETE, MarkComplete, Report, Reporter
from qlora.training.fused import Fused, fuse, fuse_head
from qlora.training.graphs import Room
from qlora.training.host_embedding import keep_embeddings_on_host
from qlora.training.neftune import add_noise
from qlora.training.packed import allow_packed
from qlora.training.plan import Division, TrainingPlan, plan_training
from qlora.training.probe import kept_bytes_per_token
from qlora.training.profile import ProfileStep
from qlora.training.recompute import recompute_first
from qlora.training.trainer import Trainer

log = logging.getLogger(__name__)

LOG_EVERY = 10  # steps, on a GPU
PLAN = "plan.json"  # beside the checkpoints: how the run that wrote them was divided


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
        write_json(checkpoints / PLAN, asdict(trainer.plan.division))
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
    totals = {"steps": result.global_step, "mean_loss": result.training_loss, "processes": trainer.args.world_size}
    if output is not None:
        if best is not None and recipe.train.keep_best:
            totals["best"] = best.restore()
        _write_adapter(trainer, tokenizer, base, output)
    trainer.accelerator.wait_for_everyone()
    return report.metrics() | totals


def _keep_best(recipe: Recipe, trainer: Trainer, checkpoints: Path, *, writes: bool) -> KeepBest | None:
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
    fused = fuse(model, float8=recipe.model.compute_dtype == "float8") if fast and device.startswith("cuda") else None
    config = sft_config(recipe, device, checkpoints, has_eval=bool(eval_rows))
    row_tokens = [len(row.input_ids) for row in rows]
    kept = checkpoints / PLAN
    before = Division(**read_json(kept)) if kept.is_file() else None
    plan = _plan(recipe, row_tokens, model, config, device, padded=cannot_pack is not None, before=before)
    largest = plan.memory.largest
    recompute_first(model.get_base_model(), largest.recomputed, offload=largest.offloaded)
    if fused is not None and largest.dense:
        fused.keep_dense(largest.dense / plan.layers)
    log.info("training: %s", plan.text)
    if recipe.train.neftune_alpha is not None:
        add_noise(model.get_base_model(), recipe.train.neftune_alpha)
    if fused is not None and largest.offloaded and keep_embeddings_on_host(model.get_base_model()):
        log.info("token embeddings are in host memory")
    for what, reason in (("rows are padded", cannot_pack), ("TRL computes the loss", plain_head)):
        if reason:
            log.info("%s: %s", what, reason)
    for reason, layers in fused.plain.items() if fused is not None else ():
        log.info("%d adapter layers train on the plain path: %s", layers, reason)
    config.gradient_accumulation_steps = plan.schedule.forwards
    room = None
    if cannot_pack is None and plain_head is None and config.world_size == 1 and _can_be_recorded(model, fused, plan):
        room = Room.of(plan.schedule)
        plan = replace(plan, schedule=replace(plan.schedule, multiple=room.tokens))
        log.info("kernels are launched as CUDA graphs, rows filled up to multiples of %d tokens", room.tokens)
    trainer = Trainer(
        rows=rows,
        plan=plan,
        packed=cannot_pack is None,
        own_head=plain_head is None,
        room=room,
        loraplus_ratio=recipe.train.loraplus_ratio,
        model=model,
        args=config,
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(eval_rows) if eval_rows and recipe.train.evaluate_every else None,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    # TRL casts trainable parameters of a 4-bit model to bf16; small late updates would round away.
    for parameter in trainable(trainer):
        parameter.data = parameter.data.to(DTYPES[recipe.lora.dtype])
    if recipe.lora.start_from is not None:
        start_from(model, recipe.lora)
    return trainer


def _plan(
    recipe: Recipe,
    row_tokens: Sequence[int],
    model: Any,
    config: SFTConfig,
    device: str,
    *,
    padded: bool,
    before: Division | None,
) -> TrainingPlan:
    """The same on every process: in the memory of the one that has least, with what layers were found to keep."""
    shapes = model_shapes(skeleton(model.config, trust_remote_code=recipe.model.trust_remote_code))
    recompute_first(model.get_base_model(), 0)
    measured = kept_bytes_per_token(model, shapes.layers, packed=not padded)
    free = free_for_training(device)
    if config.world_size > 1:
        found = gather_object([(free, measured)])
        free, measured = min(each[0] for each in found), max(each[1] for each in found)
    return plan_training(
        recipe,
        row_tokens,
        config.world_size,
        shapes,
        AdapterShapes(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)),
        machine_of(device),
        free,
        padded=padded,
        measured=measured,
        before=before,
    )


def _can_be_recorded(model: Any, fused: Fused | None, plan: TrainingPlan) -> bool:
    """Whether passes are worth a CUDA graph, and nothing in them is known that a graph cannot hold."""
    if fused is None or fused.plain or plan.memory.largest.offloaded:
        return False
    return plan.launch_bound and not any(
        isinstance(module, torch.nn.Dropout) and module.p for module in model.modules()
    )


def trainable(trainer: Trainer) -> list[torch.nn.Parameter]:
    """The parameters that the optimizer changes."""
    assert trainer.model is not None
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def sft_config(recipe: Recipe, device: str, checkpoints: Path, has_eval: bool) -> SFTConfig:
    """The recipe's train section as TRL's SFTConfig, without what follows from the plan."""
    train = recipe.train
    if recipe.model.compute_dtype == "float8" and (reason := float8_missing(torch.device(device))):
        raise UserError(reason, "model.compute_dtype", "use bfloat16")
    options: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": recipe.evaluate.batch_size,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch_fused" if device.startswith("cuda") else "adamw_torch",
        "gradient_checkpointing": False,  # by `recompute_first`
        "bf16": recipe.model.dtype == "bfloat16",
        "use_cpu": device == "cpu",
        "max_length": None,
        "save_strategy": "steps",
        "save_steps": train.checkpoint_every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if train.evaluate_every and has_eval else "no",
        "eval_steps": train.evaluate_every,
        "logging_steps": train.log_every or (LOG_EVERY if device.startswith("cuda") else 1),
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
    provenance = write_provenance(
        trainer.accelerator.unwrap_model(trainer.model),
        output / "base.json",
        base_id=base.id,
        revision=base.revision,
        settings=QuantizationSettings(
            quant_type=recipe.model.quantization,
            double_quant=recipe.model.double_quant,
            compute_dtype=DTYPES[recipe.model.dtype],
        ),
    )
    if recipe.lora.start_from is not None:
        require_base(provenance, recipe.lora)


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
