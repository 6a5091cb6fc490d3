"""Tokens per second and memory of training by the recipes that ship, on random weights of their models' sizes.

    python scripts/bench/recipes.py --out scripts/bench/results/recipes-h200.json [--only llama-3.1-8b,gemma-3-1b]
    python scripts/bench/recipes.py --out trial.json --device cpu --tiny

Each recipe is trained for --steps optimizer steps, of which the last two are timed, as `qlora train` would: the base in
4 bits, the plan, the kernels, the trainer of its method. Its settings are the recipe's own; rows are random tokens as
long as it allows, of which half are learned (all with `loss_on: all`), and weights are random (random_model.py). Torch
is held to what the card in the recipe's title leaves it, and the plan to nine tenths of that, as it would be on such a
card. Of a recipe for several GPUs one process trains its share of a step's rows: gradients are exchanged with no one.
Only where they share the base are there as many processes, and GPUs, as the recipe says; where there are not so many
GPUs it is left out.

Recipes of one model share a process, and the next one imports its libraries while this one trains. What --out holds
already is kept, and measured again only if the recipe's settings are others, it failed, or --only names it. With --tiny
every model has two layers of 64 channels: a trial of the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model_shapes import SHAPES, Shape

from qlora.cli import with_allocator
from qlora.paths import packaged_recipes
from qlora.recipe import Recipe
from qlora.recipe_file import load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
COUNTS = {"one": 1, "two": 2, "four": 4, "eight": 8}
# What changes neither speed nor memory.
NOT_MEASURED = {
    "model": {"base", "revision"},
    "lora": {"alpha"},
    "train": {"epochs", "learning_rate", "warmup_steps", "scheduler", "checkpoint_every", "log_every", "args"},
}
TIMED = 2
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 512, "num_hidden_layers": 2,
}  # fmt: skip
TINY_EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
TINY_LENGTH, TINY_ROWS, TINY_RANK = 48, 4, 8


def main() -> None:
    arguments = parse()
    if arguments.job:
        work(json.loads(Path(arguments.job).read_text()))
        return
    found = read_rows(arguments.out)
    names = measurable(_visible_gpus() if arguments.device != "cpu" else max(COUNTS.values()))
    groups = grouped(name for name in names if is_wanted(name, found, arguments.only))
    place = Path(tempfile.mkdtemp())
    waiting: list[subprocess.Popen[str]] = []
    for number, group in enumerate(groups):
        process = waiting.pop() if waiting else start(group, place, arguments)
        following = [each for each in groups[number + 1 : number + 2] if processes_of(each) == 1]
        waiting += [start(each, place, arguments) for each in following]
        for row in finish(process, group, place, arguments.timeout * len(group)):
            found[row["recipe"]] = row
            print(line(row), flush=True)
        write_rows(arguments.out, found)


def measurable(gpus: int = 1) -> list[str]:
    """Recipes that are for a GPU, but those whose base is shared by more than there are."""
    names = [path.stem for path in sorted(packaged_recipes().glob("*.yaml")) if card_of(path) is not None]
    return [name for name in names if processes_of([name]) <= gpus]


def processes_of(group: Sequence[str]) -> int:
    """That recipes of one model are measured in."""
    trains = [load_recipe(name).train for name in group]
    return max(train.processes if train.shard else 1 for train in trains)


def card_of(path: Path) -> tuple[int, int] | None:
    """How many GPUs a recipe's title says it is for, and GB of each."""
    title = path.read_text(encoding="utf-8").splitlines()[0]
    found = re.search(rf"({'|'.join(COUNTS)}) (\d+) GB GPUs?\b", title)
    return (COUNTS[found[1]], int(found[2])) if found else None


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe its speed and memory come from, where it is not the default."""
    sections = {
        name: getattr(recipe, name).model_dump(mode="json", exclude=left_out, exclude_defaults=True)
        for name, left_out in NOT_MEASURED.items()
    }
    return {"base": recipe.model.base, "max_length": recipe.data.max_length, "loss_on": recipe.data.loss_on} | sections


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Recipe → what was measured, from the file that `write_rows` wrote; nothing of none."""
    if not out.is_file():
        return {}
    return {row["recipe"]: row for row in json.loads(out.read_text())}


def write_rows(out: Path, found: dict[str, dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([found[name] for name in sorted(found)], indent=1) + "\n")


def is_wanted(name: str, found: dict[str, dict[str, Any]], only: Sequence[str] | None) -> bool:
    if only is not None:
        return name in only
    row = found.get(name, {"error": "not measured"})
    return "error" in row or row["settings"] != settings_of(load_recipe(name))


def grouped(names: Any) -> list[list[str]]:
    """Recipes of one model, and of one number of processes, together; the smallest model first."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in names:
        kind = SHAPES[load_recipe(name).model.base].parameters, processes_of([name])
        groups.setdefault(kind, []).append(name)
    return [groups[kind] for kind in sorted(groups)]


def start(group: list[str], place: Path, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that measures these recipes once it is told to go."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if arguments.device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), environment.get("PYTHONPATH"))))
    job = place / f"{group[0]}.job.json"
    options = {key: getattr(arguments, key) for key in ("steps", "device", "tiny")}
    job.write_text(json.dumps(options | {"recipes": group}))
    command = [sys.executable]
    if (processes := processes_of(group)) > 1:
        configuration = str(packaged_recipes() / "accelerate" / "gpus.yaml")
        command += ["-m", "accelerate.commands.launch", "--config_file", configuration]
        command += ["--num_processes", str(processes)]
    with log_of(group, place).open("w") as log:
        return subprocess.Popen(
            [*command, __file__, "--out", str(arguments.out), "--job", str(job)],
            env=with_allocator(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[str], group: list[str], place: Path, timeout: float) -> list[dict[str, Any]]:
    """Let it go, and wait: a row for each recipe, with `error` where nothing came of it."""
    problem = ""
    try:
        output, _ = process.communicate("go\n", timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        problem = f"no result after {timeout:.0f} s"
    rows = [json.loads(text.removeprefix("RESULT ")) for text in output.splitlines() if text.startswith("RESULT ")]
    log = log_of(group, place).read_text(errors="replace").strip().splitlines()
    problem = problem or (log[-1][:300] if log else f"ended with {process.returncode}")
    missing = [name for name in group if name not in {row["recipe"] for row in rows}]
    return rows + [{"recipe": name, "error": problem} for name in missing]


def log_of(group: list[str], place: Path) -> Path:
    return place / f"{group[0]}.log"


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['recipe']}: failed: {row['error']}"
    memory = f"{row['allocated']:.1f} GiB allocated, {row['reserved']:.1f} reserved, {row['expected']:.1f} by formula"
    return f"{row['recipe']}: {row['tokens_per_second']:,.0f} tokens/s, {memory}; {row['plan']}"


def work(job: dict[str, Any]) -> None:
    """Measure the job's recipes, one after the other, in this process; a line of output for each."""
    import torch

    import qlora.training.run  # noqa: F401 - its libraries, while another process trains

    if "RANK" not in os.environ and sys.stdin.readline() != "go\n":
        return
    for name in job["recipes"]:
        try:
            row = measure(name, job)
        except Exception as error:  # the others are measured all the same
            row = {"error": f"{type(error).__name__}: {error}"[:300]}
        if os.environ.get("RANK", "0") == "0":
            print("RESULT", json.dumps({"recipe": name} | row), flush=True)
        gc.collect()
        if job["device"] != "cpu":
            torch.cuda.empty_cache()


def measure(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """One recipe's figures."""
    import torch
    from cards import USABLE
    from random_model import train_random

    recipe = load_recipe(name)
    card = card_of(packaged_recipes() / f"{name}.yaml")
    assert card is not None, "it is measurable"
    usable = USABLE * card[1]
    shape = SHAPES[recipe.model.base]
    config = tiny(shape) if job["tiny"] else shape.config()
    tried = shortened(recipe, job, usable)
    rows = random_rows(tried, config.vocab_size, tried.train.batch_size * job["steps"])
    found = train_random(tried, config, rows, job["device"], usable)
    tokens = sum(row.tokens for row in rows) / job["steps"] / tried.train.processes
    seconds = sum(found["step_seconds"][-TIMED:]) / TIMED
    on_gpu = job["device"] != "cpu"
    return found | {
        "settings": settings_of(recipe),
        "machine": torch.cuda.get_device_name() if on_gpu else "CPU",
        "held_to": usable if on_gpu else None,
        "gpus": card[0],
        "tokens_per_second": tokens / seconds,
        "step_tokens": tokens,
        "tiny": job["tiny"],
    }


def shortened(recipe: Recipe, job: dict[str, Any], usable: float) -> Recipe:
    """The recipe for so few steps, of one process's share of rows, with its card's memory; what is shared stays so."""
    from qlora.training.plan import SHARE_OF_FREE, rows_per_step

    rows = rows_per_step(recipe, [recipe.data.max_length], recipe.train.processes) // recipe.train.processes
    processes = recipe.train.processes if recipe.train.shard else 1
    train: dict[str, Any] = {
        "max_steps": job["steps"], "log_every": job["steps"], "checkpoint_every": 10**6, "tokens_per_step": None,
        "processes": processes, "batch_size": rows * processes, "evaluate_every": None, "keep_best": False,
        "patience": None,
    }  # fmt: skip
    data: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    if job["device"] != "cpu":
        train["memory"] = SHARE_OF_FREE * usable
    if job["tiny"]:
        train["batch_size"], lora["r"] = TINY_ROWS, TINY_RANK
        data["max_length"] = TINY_LENGTH
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=train),
            "data": recipe.data.model_copy(update=data),
            "lora": recipe.lora.model_copy(update=lora),
        }
    )


def tiny(shape: Shape) -> Any:
    experts = TINY_EXPERTS if "num_experts" in shape.sizes else {}
    return shape.config(**{key: value for key, value in TINY.items() if key != "head_dim"} | experts, head_dim=16)


def random_rows(recipe: Recipe, vocabulary: int, count: int) -> list[Any]:
    """Rows as long as the recipe allows: half a prompt, half an answer, unless all is learned."""
    import torch

    from qlora.data.rendering import IGNORED, RenderedRow

    length, method = recipe.data.max_length, recipe.train.method
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(10, vocabulary, (2, count, length), generator=generator).tolist()
    prompt = 0 if recipe.data.loss_on == "all" and method == "sft" else length // 2
    return [
        RenderedRow(
            one, [IGNORED] * prompt + one[prompt:], prompt, False, "",
            rejected_ids=two[prompt:] if method in ("dpo", "orpo") else None,
            good=number % 2 == 0 if method == "kto" else None,
        )
        for number, (one, two) in enumerate(zip(first, second, strict=True))
    ]  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, read and added to")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of recipes")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for a recipe")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a trial: every model with two small layers")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < TIMED + 1:
        parser.error(f"--steps: {TIMED} are timed, behind one that is not")
    return arguments


if __name__ == "__main__":
    main()
