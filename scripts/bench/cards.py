"""What fits a card: for each model the longest row that trains in so much GPU memory, by the plan and by doing it.

    python scripts/bench/cards.py --out scripts/bench/results/cards-h200.json [--cards 8,12,16,24,48,80]
        [--models llama-3.2-1b,llama-3.1-8b,qwen3-14b,qwen3-32b,llama-3.3-70b] [--longest 32768] [--formula]

For each card and model, from the longest row down, the first that the plan says will fit is trained for two steps, one
row a step, with torch held to the memory of that card less what the driver and a desktop take; cards above the first
that takes the longest row are left out. Weights are random and drawn in memory (random_model.py), rank is 16 on all
linear layers, tokens per second are those of the second step. A cell is a process of its own. What --out holds already
is kept. With --formula nothing is trained, and nothing written. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_shapes import SHAPES

from qlora.cli import with_allocator
from qlora.models.resources import assumed_machine
from qlora.models.shapes import adapter_shapes, model_shapes, skeleton
from qlora.recipe import Recipe
from qlora.training.plan import TrainingPlan, plan_training

MODELS = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
}
SHORTEST = 512
STEPS = 2
# Of a card's memory, what is not torch's: the driver's context, a desktop.
USABLE = 0.93
GIB = 2**30


def main() -> None:
    arguments = parse()
    if arguments.job:
        print("RESULT", json.dumps(train(**json.loads(arguments.job))))
        return
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    known = {(row["model"], row["card"]) for row in rows}
    for model in arguments.models:
        shapes, adapter = sizes(model)
        for card in arguments.cards:
            plans = ((length, planned(shapes, adapter, length, USABLE * card)) for length in lengths(arguments.longest))
            length, plan = next(((length, plan) for length, plan in plans if fits(plan)), (None, None))
            if (model, card) not in known:
                row = {"model": model, "card": card, "length": length, "plan": plan.text if plan else None}
                rows.append(row | (measured(model, card, length) if plan and not arguments.formula else {}))
                print(line(rows[-1]), flush=True)
                if not arguments.formula:
                    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
            if length == arguments.longest:
                break
    print(f"\n{HEAD}", *map(line, rows), sep="\n")


def lengths(longest: int) -> Iterator[int]:
    while longest >= SHORTEST:
        yield longest
        longest //= 2


def sizes(model: str) -> tuple[Any, Any]:
    bare = skeleton(SHAPES[MODELS[model]].config())
    return model_shapes(bare), adapter_shapes(bare, recipe_of(1.0).lora)


def recipe_of(gib: float) -> Recipe:
    document = {"name": "card", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}, "lora": {"r": 16}}
    train = {"batch_size": 1, "memory": gib, "max_steps": STEPS, "log_every": STEPS, "checkpoint_every": 10**6}
    return Recipe.model_validate(document | {"train": train})


def planned(shapes: Any, adapter: Any, length: int, gib: float) -> TrainingPlan:
    machine = assumed_machine("cuda:0", "NVIDIA H100 80GB HBM3", 16)
    return plan_training(recipe_of(gib), [length] * STEPS, 1, shapes, adapter, machine, 0, padded=False, records=True)


def fits(plan: TrainingPlan) -> bool:
    return plan.memory.peak <= plan.budget


def measured(model: str, card: int, length: int) -> dict[str, Any]:
    """Tokens per second and GiB, from a process of its own; `error` where nothing came of it."""
    job = json.dumps({"model": model, "card": card, "length": length})
    command = [sys.executable, __file__, "--out", "none", "--job", job]
    environment = with_allocator(dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    results = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if done.returncode or not results:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    found: dict[str, Any] = json.loads(results[-1].removeprefix("RESULT "))
    return found


def train(model: str, card: int, length: int) -> dict[str, Any]:
    import torch
    from random_model import train_random

    from qlora.data.rendering import RenderedRow

    config = SHAPES[MODELS[model]].config()
    drawn = torch.randint(10, config.vocab_size, (STEPS, length), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [RenderedRow(ids, ids, 0, False, "") for ids in drawn]
    found = train_random(recipe_of(USABLE * card), config, rows, "cuda", USABLE * card)
    return found | {"tokens_per_second": length / found["step_seconds"][-1], "machine": torch.cuda.get_device_name()}


HEAD = """| model | card, GB | longest row | tokens/s | GiB | plan |
| --- | --- | --- | --- | --- | --- |"""


def line(row: dict[str, Any]) -> str:
    head = f"| {row['model']} | {row['card']} |"
    if row["length"] is None:
        return f"{head} does not fit | | | |"
    speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else row.get("error", "")
    memory = f"{row['allocated']:.1f}" if "allocated" in row else ""
    return f"{head} {row['length']:,} | {speed} | {memory} | {row['plan']} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, read and added to")
    parser.add_argument(
        "--cards", type=lambda text: [int(part) for part in text.split(",")], default="8,12,16,24,48,80"
    )
    parser.add_argument("--models", type=lambda text: text.split(","), default=",".join(MODELS))
    parser.add_argument("--longest", type=int, default=2**15, help="tokens of a row; halved until it fits")
    parser.add_argument("--formula", action="store_true", help="plans alone, nothing trained")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
