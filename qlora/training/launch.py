"""What a launcher decides for training: how many processes share it, and nothing that would train something else.

accelerate's plugins are refused. FSDP2 leaves 4-bit weights out unless they are stored as 16-bit numbers, and does not
load those in parts (fsdp2_prepare_model in accelerate.utils.fsdp_utils, 1.15). DeepSpeed is ignored on CPUs, where
accelerate trains with DDP and says nothing (AcceleratorState, 1.15); ZeRO-3 does not load quantized models in parts
(transformers.modeling_utils, 5.23, lets it begin with the parts of other models alone).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from qlora.errors import Problem, UserError
from qlora.recipe import Recipe

if TYPE_CHECKING:
    from qlora.models.sharding import Sharding

SHARD = "set train.shard: true in the recipe and launch with recipes/accelerate/gpus.yaml: {}"
# What accelerate sets for its plugins → its flag, why it is refused, and what to do.
REFUSED = {
    "ACCELERATE_USE_FSDP": (
        "--use_fsdp",
        "a base in 4 bits has to be whole on every card before FSDP divides it, if it does",
        SHARD.format("processes then share one copy of the 4-bit base"),
    ),
    "ACCELERATE_USE_DEEPSPEED": (
        "--use_deepspeed",
        "ZeRO-1 and 2 divide states of the adapter, which are small; for ZeRO-3 the base is whole on every card first",
        SHARD.format("what is large, the base, is divided"),
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "it has no 4-bit layers", SHARD.format("the base is divided")),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "--use_parallelism_config",
        "rows are divided among all processes, and nothing else",
        "leave it out; train.shard: true divides the base",
    ),
}


def require_plain_launch(recipe: Recipe) -> None:
    """Raise UserError if accelerate was told to train in another way than this process would, naming the flags."""
    problems = [
        Problem(reason, f"accelerate launch {flag}", fix)
        for name, (flag, reason, fix) in REFUSED.items()
        if os.environ.get(name, "false").lower() == "true"
    ]
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()) != "NO":
        what = f"the model is not compiled ({backend}): its kernels are fused already"
        problems.append(Problem(what, "accelerate launch --dynamo_backend", "use no"))
    # transformers sets it too, in a process that has trained; a launch trains once.
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") if "RANK" in os.environ else "no"
    own = recipe.model.dtype
    if precision not in ("no", {"bfloat16": "bf16"}.get(own)):
        what = f"{precision}, but the recipe computes in {own}"
        problems.append(Problem(what, "accelerate launch --mixed_precision", "use no; model.compute_dtype says it"))
    if problems:
        raise UserError(problems)


def require_processes(recipe: Recipe, processes: int) -> None:
    """Raise UserError for a base that is to be shared by one process."""
    if recipe.train.shard and processes == 1:
        raise UserError(
            "there is one process, which needs the whole base",
            "train.shard",
            "set train.processes to the number of GPUs, or start as many with accelerate launch",
        )


def shared_base(recipe: Recipe, arguments: Any) -> Sharding | None:
    """How the processes of TRL's arguments share the base, if the recipe says so. Raises as `require_processes`."""
    if not recipe.train.shard:
        return None
    from qlora.models.sharding import Sharding

    require_processes(recipe, arguments.world_size)
    return Sharding(arguments.process_index, arguments.world_size)
