"""Writes figures into what describes the recipes: the last lines of their headers, and the table of recipes/README.md.

    python scripts/recipes_table.py

Tokens per second and memory of training are those of scripts/bench/results/recipes-h200.json, which
scripts/bench/recipes.py measured; a recipe whose settings have changed since counts as not measured. The rest is by the
formulas of `qlora check`, for rows as long as the recipe allows. A test runs this and compares.
"""

from __future__ import annotations

import re
import sys
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from cards import USABLE
from model_shapes import SHAPES

from qlora.models.estimates import estimate_stages
from qlora.models.resources import Pass, Rows, Workload, assumed_machine
from qlora.models.shapes import AdapterShapes, ModelShapes, model_shapes, skeleton
from qlora.paths import packaged_recipes
from qlora.recipe import Recipe
from qlora.recipe_file import load_recipe
from recipes import COUNTS, REPOSITORY, card_of, read_rows, settings_of

MEASURED = REPOSITORY / "scripts/bench/results/recipes-h200.json"
BEGIN, END = "<!-- scripts/recipes_table.py writes this table -->", "<!-- end of the table -->"
WIDTH = 118
GIB = 2**30
COLUMNS = (
    "recipe", "for", "card", "training: tokens/s, GiB", "by formula: training from / GPTQ / refining / ladder, GiB",
    "merged / GPTQ, GiB",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


@dataclass(frozen=True)
class Figures:
    """What a recipe takes by formula; GiB."""

    memory: dict[str, float]
    """Stage → of a GPU."""
    movable: dict[str, float]
    """Stage → what of that may wait in host memory."""
    merged: float
    gptq: float
    quantizing: float
    """Seconds of GPTQ and of refinement on an H100."""


def main() -> None:
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")


def rendered() -> dict[Path, str]:
    """File → its text, of all that has figures."""
    measured = read_rows(MEASURED)
    texts, rows = {}, []
    for path in sorted(packaged_recipes().glob("*.yaml"), key=lambda path: path.stem):
        recipe, card, found = load_recipe(path), card_of(path), figures(path)
        row = measured.get(path.stem, {})
        row = {} if row.get("settings") != settings_of(recipe) or row.get("tiny") else row
        if card is not None:
            text = f"{measured_text(recipe, row)} {formula_text(card, found)}"
            texts[path] = with_figures(path.read_text(encoding="utf-8"), text)
        rows.append(table_row(path, row, card, found))
    readme = packaged_recipes() / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return texts | {readme: "\n".join((before + BEGIN, HEAD, *rows, END)) + after}


def with_figures(text: str, figures: str) -> str:
    """A recipe's text with this at the end of its header."""
    lines = text.splitlines()
    header = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    start = next((n for n, line in enumerate(lines[:header]) if re.match("# (Measured|Not measured)", line)), header)
    block = textwrap.wrap(figures, WIDTH)
    return "\n".join([*lines[:start], *(f"# {line}" for line in block), *lines[header:]]) + "\n"


def measured_text(recipe: Recipe, row: dict[str, Any]) -> str:
    if "tokens_per_second" not in row:
        return "Not measured yet."
    kind = "each of {} that share the base" if recipe.train.shard else "one of {} GPUs with its share of a step"
    share = "" if row["gpus"] == 1 else f", {kind.format(row['gpus'])}"
    return (
        f"Measured in training on an {row['machine']} held to {row['held_to']:.1f} GiB{share} (random weights, rows of "
        f"{recipe.data.max_length:,} tokens, scripts/bench/recipes.py): {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['allocated']:.1f} GiB allocated, {row['reserved']:.1f} reserved."
    )


def formula_text(card: tuple[int, int], found: Figures) -> str:
    memory, seconds = found.memory, found.quantizing
    moved = waiting(card, found)
    where = f" (of which {moved:.1f} wait in host memory)" if moved else ""
    merged = f"merged {found.merged:.1f} GiB" if found.merged > 1e-3 else "nothing merged"
    refining = f", {memory['refine']:.1f} in refining it" if "refine" in memory else ""
    time = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} s"
    return (
        f"By formula: {memory['train']:.1f} GiB or more in training, {memory['quantize']:.1f} in GPTQ{refining} "
        f"({time} on an H100), {memory['evaluate']:.1f} for the ladder{where}; {merged}, GPTQ {found.gptq:.1f} GiB "
        "on disk."
    )


def table_row(path: Path, row: dict[str, Any], card: tuple[int, int] | None, found: Figures) -> str:
    title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    purpose = re.sub(rf", for ({'|'.join(COUNTS)}) \d+ GB GPUs?$", "", title)
    size = "none" if card is None else f"{card[1]} GB" if card[0] == 1 else f"{card[0]} × {card[1]} GB"
    speed = "runs without a GPU" if card is None else "not measured"
    if "tokens_per_second" in row:
        each = " each" if row["gpus"] > 1 else ""
        speed = f"{row['tokens_per_second']:,.0f}{each}, {row['allocated']:.1f}"
    memory = [f"{found.memory[stage]:.1f}" if stage in found.memory else "–" for stage in STAGES]
    sizes = f"{found.merged:.1f} / {found.gptq:.1f}"
    return f"| [{path.stem}]({path.name}) | {purpose} | {size} | {speed} | {' / '.join(memory)} | {sizes} |"


STAGES = ("train", "quantize", "refine", "evaluate")


@cache
def figures(path: Path) -> Figures:
    """By formula, on an H100: with a row at a time in training, and the calibration rows as long as may be."""
    recipe = load_recipe(path)
    shapes = shapes_of(recipe.model.base if recipe.model.base in SHAPES else Path(recipe.model.base).name)
    calibration, length = recipe.quantize.calibration, recipe.data.max_length
    rows = Rows(calibration.samples * calibration.max_length, calibration.max_length)
    one_row = length * (1 if recipe.train.method == "sft" else 2)
    answer = length if recipe.data.loss_on == "all" else length // 2
    work = Workload(
        train_tokens=1, train_sequence=length, largest_pass=Pass(one_row, shapes.layers), calibration=rows,
        refinement=rows, evaluation=Rows(length, length), eval_answer_tokens=0, eval_longest_answer=answer,
    )  # fmt: skip
    machine = assumed_machine("cuda:0", "NVIDIA H100 80GB HBM3", 16)
    stages = {stage.stage: stage for stage in estimate_stages(recipe, shapes, adapter(recipe, shapes), work, machine)}
    return Figures(
        {name: stage.device / GIB for name, stage in stages.items()},
        {name: stage.movable / GIB for name, stage in stages.items()},
        stages["merge"].disk / GIB,
        stages["quantize"].disk / GIB,
        sum(stages[name].seconds or 0.0 for name in ("quantize", "refine") if name in stages),
    )


@cache
def shapes_of(base: str) -> ModelShapes:
    return model_shapes(skeleton(SHAPES[base].config()))


def adapter(recipe: Recipe, shapes: ModelShapes) -> AdapterShapes:
    """Of rank r on all linears but those of experts."""
    sizes = [linear.in_features + linear.out_features for linear in shapes.linears if linear.experts == 1]
    return AdapterShapes(recipe.lora.r * sum(sizes))


def waiting(card: tuple[int, int], found: Figures) -> float:
    """GiB of a model in 16 bits that the cards have no room for while it is measured."""
    return max(0.0, found.memory["evaluate"] - card[0] * usable(card))


def usable(card: tuple[int, int]) -> float:
    """GiB of a card that torch may have."""
    return USABLE * card[1]


if __name__ == "__main__":
    main()
