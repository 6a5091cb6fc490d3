"""The recipe's train section as the arguments of TRL's trainers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from qlora.errors import UserError
from qlora.kernels.float8 import missing as float8_missing
from qlora.models.patches import on_one_gpu
from qlora.recipe import Recipe

LOG_EVERY = 10  # steps, on a GPU
# Settings of the train section that TRL's other trainers do not follow, and what leaves them out.
OF_SFT_ALONE = {"micro_batch_tokens": None, "neftune_alpha": None, "loraplus_ratio": 1.0}
PLAN = "plan.json"  # beside the checkpoints: how the run that wrote them was divided


def config_class(method: str) -> Any:
    """TRL's configuration of a method."""
    if method == "orpo":
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # that ORPO's place in TRL may change is ours to follow
        from trl.experimental.orpo import ORPOConfig

        return ORPOConfig
    from trl import DPOConfig, KTOConfig, SFTConfig

    return {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig}[method]


def trainable(trainer: Any) -> list[torch.nn.Parameter]:
    """The parameters that the optimizer changes."""
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def training_arguments(recipe: Recipe, device: str, checkpoints: Path, has_eval: bool) -> TrainingArguments:
    """The recipe's train section as TRL's configuration of its method, without what follows from the plan.

    Raises UserError for `train.args` that it does not have, for settings that its method does not, and for products in
    8 bits on a device that has none.
    """
    train = recipe.train
    if recipe.model.compute_dtype == "float8" and (reason := float8_missing(torch.device(device))):
        raise UserError(reason, "model.compute_dtype", "use bfloat16")
    asked = [key for key, default in OF_SFT_ALONE.items() if getattr(train, key) != default]
    if train.method != "sft" and asked:
        what = f"{', '.join(asked)}: for method sft alone"
        raise UserError(what, "train", f"leave it out; TRL makes the batches of {train.method}")
    config = config_class(train.method)
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
        "gradient_checkpointing": False,  # as the plan says
        "bf16": recipe.model.dtype == "bfloat16",
        "use_cpu": device == "cpu",
        "max_length": recipe.data.max_length if train.method == "orpo" else None,  # rows are cut; ORPO wants a number
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
    unknown = sorted(set(train.args) - set(config.__dataclass_fields__))
    if unknown:
        name = config.__name__
        what = f"TRL's {name} has no field {', '.join(unknown)}"
        raise UserError(what, "train.args", f"see TRL's documentation of {name}")
    found: TrainingArguments = config(**options | train.args)
    on_one_gpu(found)
    return found
