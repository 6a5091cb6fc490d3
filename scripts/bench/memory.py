"""Peak GPU memory of training by formula, as `qlora check` computes it, against what was allocated at most.

    python scripts/bench/memory.py --out DIR [--work DIR] [--only llama-3.2-1b,llama-3.1-8b]

Trains each of SETTINGS for five steps on random weights and random tokens, one after the other in one process, and
prints a Markdown table; DIR/memory.json has the parts of every estimate. The probe of what layers really keep, which a
training run adds to the formula, is off: the estimate is what a user sees before anything is loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from random_llama import SHAPES, first_layers, write_checkpoint
from train import GIB, one, rows_of

from qlora.training import sft

# Shape, tokens of a row, rows of a forward, checkpointing, rank, GiB for the plan.
SETTINGS: list[tuple[str, int, int, str, int, float | None]] = [
    ("llama-3.2-1b", 512, 1, "off", 8, None),
    ("llama-3.2-1b", 2048, 4, "off", 16, None),
    ("llama-3.2-1b", 2048, 4, "on", 16, None),
    ("llama-3.2-1b", 4096, 8, "on", 64, None),
    ("llama-3.2-3b", 1024, 2, "off", 16, None),
    ("llama-3.2-3b", 4096, 2, "off", 16, 24),
    ("llama-3.2-3b", 4096, 2, "on", 128, None),
    ("llama-3.2-3b", 8192, 1, "on", 16, 6),
    ("llama-3.1-8b", 512, 1, "on", 16, 9),
    ("llama-3.1-8b", 2048, 1, "off", 16, 20),
    ("llama-3.1-8b", 4096, 2, "off", 16, 36),
    ("llama-3.1-8b", 4096, 2, "on", 16, None),
    ("llama-3.1-8b", 8192, 2, "on", 64, 12),
]


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sft.probe = lambda *_, **__: None
    rows = []
    print(HEAD, flush=True)
    for number, setting in enumerate(SETTINGS):
        if arguments.only and setting[0] not in arguments.only:
            continue
        rows.append(measured(setting, arguments, arguments.out / f"rows-{number}.json"))
        print(line(rows[-1]), flush=True)
        (arguments.out / "memory.json").write_text(json.dumps(rows, indent=2))


def measured(setting: tuple[str, int, int, str, int, float | None], arguments: Any, rows_file: Path) -> dict[str, Any]:
    shape, length, micro_batch, checkpointing, rank, memory = setting
    layers = SHAPES[shape]["num_hidden_layers"]
    source = write_checkpoint(shape, layers, arguments.work / f"{shape}-source", "cuda")
    model = first_layers(source, shape, layers, arguments.work / f"{shape}-{layers}")
    options = argparse.Namespace(rows_per_step=micro_batch, steps=5, train=None, length=length, shape=shape)
    rows_file.write_text(json.dumps(rows_of(options)))
    job = {"engine": "ours", "model": str(model), "rows": str(rows_file), "profile": None, "device": "cuda"}
    job |= {"length": length, "micro_batch": micro_batch, "rows_per_step": micro_batch, "steps": 5, "rank": rank}
    job |= {"checkpointing": checkpointing, "gpu_memory": None}
    job |= {"set": {} if memory is None else {"train.memory": memory}}
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    result = one(job)
    found = {"setting": setting, "plan": result["plan"], "allocated": result["allocated"] - before / GIB}
    return found | {"reserved": result["reserved"], "formula": result["expected"], "parts": result["parts"]}


HEAD = """| shape | row | rows | recomputed | rank | formula, GiB | allocated | apart | plan |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(row: dict[str, Any]) -> str:
    shape, length, micro_batch, checkpointing, rank, _ = row["setting"]
    apart = row["formula"] / row["allocated"] - 1
    figures = f"{row['formula']:.2f} | {row['allocated']:.2f} | {apart:+.1%}"
    return f"| {shape} | {length:,} | {micro_batch} | {checkpointing} | {rank} | {figures} | {row['plan']} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-train", help="checkpoints")
    parser.add_argument("--only", type=lambda text: text.split(","), help="shapes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
