"""Learning from preferences: DPO, KTO and ORPO by TRL's trainers, on the 4-bit base with a LoRA adapter.

TRL would template, tokenize and cut for itself; it is given the tokens that everything else here sees. What it measures
an answer against (DPO, KTO) is the base with the adapter off, or, where training goes on from an adapter, a copy of
that: no second model.
"""

from __future__ import annotations

import logging
import random
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PrinterCallback

from qlora.artifacts import read_json
from qlora.data.rendering import RenderedRow
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
from qlora.training.fused import fuse
from qlora.training.launch import shared_base
from qlora.training.plan import Division, TrainingPlan, fewest_rows, longest_of, plan_batches

log = logging.getLogger(__name__)

REFERENCE = "ref"
"""TRL's name for the copy of an adapter that training goes on from."""
KL_COLUMN = "KL_completion_ids"


def build_trainer(
    recipe: Recipe,
    base: Base,
    tokenizer: Any,
    rows: Rows,
    eval_rows: Rows | None,
    *,
    device: str,
    checkpoints: Path,
) -> Any:
    """TRL's trainer of `train.method`, with the plan of its batches as `plan`."""
    train = recipe.train
    config: Any = training_arguments(recipe, device, checkpoints, has_eval=eval_rows is not None)
    sharding = shared_base(recipe, config)
    tokens = trained_tokens(recipe.lora, base.directory, recipe.model.trust_remote_code)
    loaded = load_for_training(base, recipe.model, device, tokens=tokens, sharding=sharding)
    model = attach_adapter(loaded, recipe.lora, tokens)
    plan = _plan(recipe, base, rows, model, config, device, checkpoints)
    largest = plan.memory.largest
    together = plan.schedule.rows_per_step // config.world_size // plan.memory.forwards
    config.per_device_train_batch_size = together
    config.gradient_accumulation_steps = plan.memory.forwards
    config.gradient_checkpointing = largest.recomputed > 0
    config.gradient_checkpointing_kwargs = {"use_reentrant": False}
    config.dataloader_drop_last = False
    log.info("training: %s", plan.text)
    begin(model, recipe.lora, base.directory, take_parts(model, recipe.lora, base.directory, checkpoints))
    started = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if train.method == "kto":  # TRL goes through them in order, and pairs each with its neighbour
        order = array("q", range(len(rows)))
        random.Random(recipe.seed).shuffle(order)
        rows = rows.select(np.frombuffer(order, dtype=np.int64))
    trainer = _trainer_class(train.method)(
        model=model,
        args=config,
        train_dataset=_dataset(train.method, rows, together),
        eval_dataset=_dataset(train.method, eval_rows, together) if eval_rows and train.evaluate_every else None,
        processing_class=tokenizer,
    )
    trainer.plan = plan
    trainer.remove_callback(PrinterCallback)
    if recipe.lora.start_from is None and REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)  # of an adapter that changes nothing yet
    # TRL casts trainable parameters of a 4-bit model to bf16; small late updates would round away.
    for parameter in trainable(trainer):
        parameter.data = parameter.data.to(DTYPES[recipe.lora.dtype])
    _as_started(model, started)
    if device.startswith("cuda") and train.kernels == "auto":
        fused = fuse(model, float8=recipe.model.compute_dtype == "float8")
        if largest.dense:
            fused.keep_dense(largest.dense / plan.layers)
        for reason, layers in fused.plain.items():
            log.info("%d adapter layers train on the plain path: %s", layers, reason)
    if sharding is not None:
        sharding.leave_out_of_ddp(model)
    return trainer


def _plan(
    recipe: Recipe, base: Base, rows: Rows, model: Any, config: Any, device: str, checkpoints: Path
) -> TrainingPlan:
    kept = checkpoints / PLAN
    bare = skeleton(model.config, trust_remote_code=recipe.model.trust_remote_code)
    free = free_for_training(device)
    if config.world_size > 1:
        free = min(gather_object([free]))
    return plan_batches(
        recipe,
        rows.tokens,
        longest_of(recipe.train.method, rows),
        config.world_size,
        training_shapes(bare, recipe.model, base.packed or base.directory),
        AdapterShapes(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)),
        machine_of(device),
        free,
        fewest=fewest_rows(recipe.train.method),
        before=Division(**read_json(kept)) if kept.is_file() else None,
    )


def _as_started(model: Any, started: dict[str, torch.Tensor]) -> None:
    """The adapter, and its copy if there is one, as they were before TRL rounded them."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in started.items():
            parameters[name].copy_(value)
            copy = parameters.get(name.replace(".default.", f".{REFERENCE}."))
            if copy is not None:
                copy.data = value.to(parameters[name].dtype, copy=True)


def _dataset(method: str, rows: Rows, together: int) -> Dataset:
    """The columns that TRL's trainer of the method reads once it has tokenized; `together` rows are a batch."""
    if method == "kto":
        columns = {"prompt_ids": IDS, "completion_ids": IDS, "label": pyarrow.bool_(), KL_COLUMN: IDS}
        return on_disk(columns, (_judged(rows, index, together) for index in range(len(rows))))
    columns = {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}
    texts = ("prompt", "chosen", "rejected") if method == "orpo" else ()  # looks at them before it tokenizes
    pairs = ((*_divided(row), row.rejected_ids, *("" for _ in texts)) for row in rows)
    return on_disk(columns | dict.fromkeys(texts, pyarrow.string()), pairs)


def _divided(row: RenderedRow) -> tuple[list[int], list[int]]:
    return row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :]


def _judged(rows: Rows, index: int, together: int) -> tuple[Any, ...]:
    """A prompt with its answer, and that of the row before it in its batch (Ethayarajh et al. 2024, §4.1)."""
    first = index - index % together
    before = index - 1 if index > first else min(first + together, len(rows)) - 1
    row = rows[index]
    return *_divided(row), row.good, _divided(rows[before])[1]


@cache
def _trainer_class(method: str) -> Any:
    """TRL's trainer of a method, for rows that are tokens already."""
    if method == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        class OfRenderedRows(ORPOTrainer):  # type: ignore[misc]
            def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
                prompt_ids, found = feature["prompt_ids"], {}
                for name in ("chosen", "rejected"):
                    answer = feature[f"{name}_ids"]
                    found[f"{name}_input_ids"] = prompt_ids + answer
                    found[f"{name}_attention_mask"] = [1] * len(prompt_ids + answer)
                    found[f"{name}_labels"] = [-100] * len(prompt_ids) + answer
                return found | {"prompt_input_ids": prompt_ids, "prompt_attention_mask": [1] * len(prompt_ids)}

        return OfRenderedRows
    from trl import DPOTrainer, KTOTrainer

    if method == "dpo":

        class Pairs(DPOTrainer):  # type: ignore[misc]
            def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
                return dataset

        return Pairs

    class Judged(KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(
            self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str = "", **_: Any
        ) -> Dataset:
            return dataset if self.calculate_KL else dataset.remove_columns(KL_COLUMN)

    return Judged
