"""What of memory and disk the stages need, against what is free."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.errors import Problem
from qlora.models.resources import StageEstimate
from qlora.recipe import Recipe

ADVICE = {
    "train": "lower train.micro_batch_tokens or data.max_length, keep train.gradient_checkpointing, share the base "
    "among several GPUs with train.shard, or free memory",
    "merge": "free memory, or set merge.device: cpu",
    "quantize": "lower quantize.calibration.max_length or samples, or free memory",
    "refine": "lower quantize.refine.tokens_per_step, set quantize.refine: null, or free memory",
    "evaluate": "lower evaluate.batch_size, or free memory",
}


@dataclass(frozen=True)
class Free:
    """Bytes available now. `device` is None on a CPU, where the host's memory is what counts."""

    device: int | None
    host: int
    disk: int


def free_now(recipe: Recipe, device: str) -> Free:
    """Of the device, the host, and the disk that runs are written to."""
    import psutil
    import torch

    output = Path(recipe.output_dir).absolute()
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    return Free(
        torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None,
        psutil.virtual_memory().available,
        shutil.disk_usage(place).free,
    )


def _moved(stage: StageEstimate, free: Free) -> int:
    """Bytes of a stage that will be in host memory, since the GPU is too small."""
    return 0 if free.device is None else min(stage.movable, max(0, stage.device - free.device))


def slowed(stages: Sequence[StageEstimate], free: Free) -> list[Problem]:
    """What is there, but slower."""
    return [
        Problem(
            f"{gib(moved)} of the models in 16 bits will wait in host memory during {stage.stage}, which takes longer",
            f"{stage.stage}.memory",
        )
        for stage in stages
        if (moved := _moved(stage, free))
    ]


def shortfalls(stages: Sequence[StageEstimate], free: Free) -> list[Problem]:
    """What is needed and is not there."""
    problems = []
    for stage in stages:
        moved = _moved(stage, free)
        pools = [("host", stage.host + moved, free.host)]
        if free.device is not None:
            pools.append(("GPU", stage.device - moved, free.device))
        problems += [
            Problem(
                f"{stage.stage} needs about {gib(need)} of {pool} memory, {gib(have)} are free", fix=ADVICE[stage.stage]
            )
            for pool, need, have in pools
            if need > have
        ]
    disk = sum(stage.disk for stage in stages)
    if disk > free.disk:
        problems.append(
            Problem(
                f"all stages together need about {gib(disk)} of disk, {gib(free.disk)} are free",
                "output_dir",
                "free some space, or set output_dir to a larger disk",
            )
        )
    return problems


def gib(size: int) -> str:
    """Bytes as `1.2 GiB`."""
    return f"{size / 2**30:.1f} GiB"
