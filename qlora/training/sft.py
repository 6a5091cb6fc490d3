"""Supervised fine-tuning: the 4-bit base with a LoRA adapter through TRL's SFTTrainer.

Rows arrive as tokens and labels (qlora.data.rendering), so TRL neither templates nor masks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig

from qlora.artifacts import read_json
from qlora.data.store import Rows
from qlora.measure import free_for_training
from qlora.models.adapter_beginning import begin, take_parts
from qlora.models.base import Base
from qlora.models.held import training_shapes
from qlora.models.loading import DTYPES, attach_adapter, load_for_training
from qlora.models.resources import machine_of
from qlora.models.shapes import AdapterShapes, skeleton
from qlora.models.tokens import trained_tokens
from qlora.recipe import Recipe
from qlora.training.arguments import PLAN, trainable, training_arguments
from qlora.training.columns import IDS, on_disk
from qlora.training.fused import Fused, fuse, fuse_head
from qlora.training.graphs import Room
from qlora.training.host_embedding import keep_embeddings_on_host
from qlora.training.launch import shared_base
from qlora.training.neftune import add_noise
from qlora.training.packed import allow_packed
from qlora.training.plan import Division, TrainingPlan, plan_training
from qlora.training.probe import probe
from qlora.training.recompute import recompute_first
from qlora.training.trainer import Trainer

log = logging.getLogger(__name__)


def build_trainer(
    recipe: Recipe,
    base: Base,
    tokenizer: Any,
    rows: Rows,
    eval_rows: Rows | None,
    *,
    device: str,
    checkpoints: Path,
) -> Trainer:
    """The 4-bit base with a fresh adapter, and the rows, in a trainer."""
    config: Any = training_arguments(recipe, device, checkpoints, has_eval=eval_rows is not None)
    sharding = shared_base(recipe, config)
    tokens = trained_tokens(recipe.lora, base.directory, recipe.model.trust_remote_code)
    loaded = load_for_training(base, recipe.model, device, tokens=tokens, sharding=sharding)
    model = attach_adapter(loaded, recipe.lora, tokens)
    parts = take_parts(model, recipe.lora, base.directory, checkpoints)
    fast = recipe.train.kernels == "auto"
    cannot_pack = allow_packed(model.get_base_model()) if fast else "train.kernels: plain"
    plain_head = fuse_head(model) if fast else "train.kernels: plain"
    fused = fuse(model, float8=recipe.model.compute_dtype == "float8") if fast and device.startswith("cuda") else None
    row_tokens = rows.lengths
    kept = checkpoints / PLAN
    before = Division(**read_json(kept)) if kept.is_file() else None
    records = (
        fused is not None and cannot_pack is None and plain_head is None and _can_be_recorded(model, fused, config)
    )
    padded = cannot_pack is not None
    plan = _plan(recipe, base, row_tokens, model, config, device, padded=padded, records=records, before=before)
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
    if plan.recorded:
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
        train_dataset=_dataset(rows[:1]),  # TRL looks at its columns; what is trained on is `rows`
        eval_dataset=_dataset(eval_rows) if eval_rows and recipe.train.evaluate_every else None,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    # TRL casts trainable parameters of a 4-bit model to bf16; small late updates would round away.
    for parameter in trainable(trainer):
        parameter.data = parameter.data.to(DTYPES[recipe.lora.dtype])
    begin(model, recipe.lora, base.directory, parts)
    if sharding is not None:
        sharding.leave_out_of_ddp(model)
    return trainer


def _plan(
    recipe: Recipe,
    base: Base,
    row_tokens: Sequence[int],
    model: Any,
    config: SFTConfig,
    device: str,
    *,
    padded: bool,
    records: bool,
    before: Division | None,
) -> TrainingPlan:
    """The same on every process: in the memory of the one that has least, with what layers were found to keep."""
    bare = skeleton(model.config, trust_remote_code=recipe.model.trust_remote_code)
    shapes = training_shapes(bare, recipe.model, base.packed or base.directory)
    recompute_first(model.get_base_model(), 0)
    measured = probe(model, shapes.layers, packed=not padded)
    log.info("a layer keeps %d bytes a token; %s seconds to launch it", measured.kept_bytes, measured.launch_seconds)
    free = free_for_training(device)
    if config.world_size > 1:
        found = gather_object([(free, measured)])
        free, measured = min(each[0] for each in found), max((each[1] for each in found), key=astuple)
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
        records=records,
        before=before,
    )


def _can_be_recorded(model: Any, fused: Fused, config: SFTConfig) -> bool:
    """Whether nothing in passes is known that a CUDA graph cannot hold."""
    drops = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    return config.world_size == 1 and not fused.plain and not drops


def _dataset(rows: Rows) -> Dataset:
    return on_disk({name: IDS for name in ("input_ids", "labels")}, ((row.input_ids, row.labels) for row in rows))
