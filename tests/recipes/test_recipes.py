"""Every recipe that ships: it loads and is short, its commands parse, its figures are the measured ones, it fits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qlora.cli import qlora
from qlora.models.shapes import adapter_shapes, skeleton
from qlora.paths import packaged_recipes
from qlora.recipe import Recipe
from qlora.recipe_file import load_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import recipes_table as table

RECIPES = sorted(packaged_recipes().glob("*.y*ml"))
FOR_A_GPU = [path for path in RECIPES if path.stem != "quickstart"]
every = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def header(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def test_families_and_purposes() -> None:
    names = {path.stem for path in RECIPES}
    assert {"llama-3.1-8b", "qwen3-8b", "mistral-7b", "gemma-3-1b", "phi-4-mini", "smollm3-3b", "qwen3-30b-a3b"} < names
    assert {f"llama-3.1-8b-{purpose}" for purpose in ("completion", "pretrain", "dpo", "kto", "2gpu")} < names
    assert {"qwen3-8b-16gb", "llama-3.3-70b"} < names


@every
def test_recipe_loads_and_its_header_says_how_to_run_it(path: Path) -> None:
    assert load_recipe(path).name == path.stem
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    commands = [line[1:].strip().split("  ")[0].split() for line in header(path) if line.startswith("#   qlora ")]
    assert commands[-1][1] == "run"
    for _, *words in commands:
        parse(words)
        assert any(word.removesuffix(".yaml") == path.stem for word in words)


def parse(words: list[str]) -> None:
    """Raises click's error unless they are a command of ours with its arguments."""
    command: click.Command | None = qlora
    while isinstance(command, click.Group):
        _, command, words = command.resolve_command(click.Context(command), words)
    assert command is not None
    command.make_context(command.name, list(words))


@every
def test_a_copy_works_alone_and_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    result = CliRunner().invoke(qlora, ["recipes", "copy", path.stem, str(copy)], catch_exceptions=False)
    assert result.exit_code == 0 and "extends:" not in copy.read_text(encoding="utf-8")
    shown = CliRunner().invoke(qlora, ["recipes", "show", path.stem], catch_exceptions=False)
    assert shown.output == copy.read_text(encoding="utf-8")
    assert contents(copy) == contents(path)


def contents(path: Path) -> str:
    """Of a recipe, whatever folder it lies in."""
    text = json.dumps(load_recipe(path).model_dump(mode="json"))
    return text.replace(f"{path.parent}/shared/", "").replace(f"{path.parent}/", "")


@every
def test_group_size_divides_the_layers_of_the_model(path: Path) -> None:
    recipe = load_recipe(path)
    base = recipe.model.base if recipe.model.base in table.SHAPES else Path(recipe.model.base).name
    inputs = {linear.in_features for linear in table.shapes_of(base).linears}
    assert recipe.quantize.group_size == next(size for size in (128, 64, 32) if not any(k % size for k in inputs))


def test_headers_and_table_have_the_measured_figures_and_those_of_the_formulas() -> None:
    for path, text in table.rendered().items():
        assert path.read_text(encoding="utf-8") == text, "run python scripts/recipes_table.py"


@pytest.mark.parametrize("path", FOR_A_GPU, ids=lambda path: path.stem)
def test_every_stage_fits_the_card_by_formula(path: Path) -> None:
    """With models in 16 bits that are measured, and larger, in host memory: the header says so."""
    card = table.card_of(path)
    assert card is not None, "its title says for which GPU it is"
    found = table.figures(path)
    for stage, size in found.memory.items():
        assert size - found.movable[stage] <= table.usable(card), stage
    assert ("host memory" in " ".join(line.lstrip("# ") for line in header(path))) == (table.waiting(card, found) > 0)


def test_adapters_are_counted_as_peft_makes_them() -> None:
    recipe = load_recipe("phi-4-mini")
    counted = table.adapter(recipe, table.shapes_of(recipe.model.base))
    assert counted == adapter_shapes(skeleton(table.SHAPES[recipe.model.base].config()), recipe.lora)


def test_the_json_schema_describes_every_key() -> None:
    schema = Recipe.model_json_schema()
    objects = {"Recipe": schema, **schema["$defs"]}
    for name, definition in objects.items():
        assert definition.get("additionalProperties") is False, f"{name} takes unknown keys"
        for key, value in definition["properties"].items():
            assert value.get("description"), f"{name}.{key}: no description"
