"""What fits a card: for each model the longest row that trains in so much GPU memory, by the plan and by doing it.

    python scripts/bench/cards.py --out DIR [--cards 8,12,16,24,48,80] [--models llama-3.2-1b,llama-3.1-8b,llama-2-13b]
        [--longest 131072] [--formula]

For each card and model, from the longest row down, the first that the plan says will fit is trained for three steps,
one row a step, with torch held to the memory of that card less what the driver and a desktop take; cards above the
first that takes the longest row are left out. Weights are random, rank is 16 on all linear layers. With --formula
nothing is trained. Prints a Markdown table and writes DIR/cards.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from random_llama import SHAPES
from train import main as train
from transformers import LlamaConfig

from qlora.models.resources import assumed_machine
from qlora.models.shapes import adapter_shapes, model_shapes, skeleton
from qlora.recipe import Lora, Recipe
from qlora.training.plan import TrainingPlan, plan_training

SHORTEST = 512
# Of a card's memory, what is not torch's: the driver's context, a desktop.
USABLE = 0.93
GIB = 2**30


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in arguments.models:
        shapes, adapter = sizes(model)
        for card in arguments.cards:
            plans = ((length, planned(shapes, adapter, length, USABLE * card)) for length in lengths(arguments.longest))
            found = next(((length, plan) for length, plan in plans if fits(plan)), None)
            row: dict[str, Any] = {"model": model, "card": card}
            if found is not None:
                length, plan = found
                row |= {"length": length, "plan": plan.text}
                row |= {} if arguments.formula else measured(arguments, model, card, length)
            rows.append(row)
            print(line(row), flush=True)
            if row.get("length") == arguments.longest:
                break
    (arguments.out / "cards.json").write_text(json.dumps(rows, indent=2))
    print("\n| model | card, GiB | longest row | tokens/s | GiB | plan |\n| --- | --- | --- | --- | --- | --- |")
    print(*map(line, rows), sep="\n")


def lengths(longest: int) -> Iterator[int]:
    while longest >= SHORTEST:
        yield longest
        longest //= 2


def sizes(model: str) -> tuple[Any, Any]:
    bare = skeleton(LlamaConfig(**{"tie_word_embeddings": False} | SHAPES[model]))
    return model_shapes(bare), adapter_shapes(bare, Lora(r=16))


def planned(shapes: Any, adapter: Any, length: int, gib: float) -> TrainingPlan:
    document = {"name": "card", "model": {"base": "a/b"}, "data": {"train": [{"path": "x"}]}}
    recipe = Recipe.model_validate(document | {"train": {"batch_size": 1, "memory": gib}})
    machine = assumed_machine("cuda:0", "NVIDIA H100 80GB HBM3", 16)
    return plan_training(recipe, [length] * 4, 1, shapes, adapter, machine, 0, padded=False)


def fits(plan: TrainingPlan) -> bool:
    return plan.memory.peak <= plan.budget


def measured(arguments: argparse.Namespace, model: str, card: int, length: int) -> dict[str, Any]:
    out = arguments.out / f"{model}-{card}"
    options = ["--out", out, "--work", arguments.work, "--shape", model, "--length", length, "--micro-batch", 1]
    options += ["--steps", 3, "--engines", "ours", "--checkpointing", "auto", "--gpu-memory", USABLE * card]
    train(list(map(str, options)))
    result: dict[str, Any] = json.loads((out / "train.json").read_text())["rows"][0]
    return {key: result[key] for key in ("tokens_per_second", "allocated", "reserved", "error") if key in result}


def line(row: dict[str, Any]) -> str:
    head = f"| {row['model']} | {row['card']} |"
    if "length" not in row:
        return f"{head} does not fit | | | |"
    speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else row.get("error", "")
    memory = f"{row['allocated']:.1f}" if "allocated" in row else ""
    return f"{head} {row['length']:,} | {speed} | {memory} | {row['plan']} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-train"), help="checkpoints")
    parser.add_argument(
        "--cards", type=lambda text: [int(part) for part in text.split(",")], default="8,12,16,24,48,80"
    )
    models = "llama-3.2-1b,llama-3.2-3b,llama-3.1-8b,llama-2-13b"
    parser.add_argument("--models", type=lambda text: text.split(","), default=models)
    parser.add_argument("--longest", type=int, default=2**17, help="tokens of a row; halved until it fits")
    parser.add_argument("--formula", action="store_true", help="plans alone, nothing trained")
    return parser.parse_args()


if __name__ == "__main__":
    main()
