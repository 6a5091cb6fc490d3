"""Every recipe that ships: it loads, explains itself, is in the table, and its group size fits its model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

from qlora.models.shapes import model_shapes, skeleton
from qlora.paths import packaged_recipes
from qlora.recipe import Recipe
from qlora.recipe_file import load_recipe

RECIPES = sorted(packaged_recipes().rglob("*.y*ml"))

# Dimensions as the models' config.json on the hub states them; two layers are enough for their shapes.
CONFIGS: dict[str, PretrainedConfig] = {
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        num_hidden_layers=2,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2
    ),
    "google/gemma-3-1b-it": Gemma3TextConfig(
        hidden_size=1152, intermediate_size=6912, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
        num_hidden_layers=2,
    ),
    "SmolLM2-135M-Instruct.Q4_1.gguf": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=2
    ),
}  # fmt: skip


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "llama-3.1-8b", "qwen3-8b", "mistral-7b", "gemma-3-1b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_header_says_how_to_run_it(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert len(header) > 2
    assert any(f"qlora run {path.stem}" in line for line in header)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_group_size_divides_the_layers_of_the_model(path: Path) -> None:
    recipe = load_recipe(path)
    base = recipe.model.base if recipe.model.base in CONFIGS else Path(recipe.model.base).name
    inputs = {linear.in_features for linear in model_shapes(skeleton(CONFIGS[base])).linears}
    assert recipe.quantize.group_size == next(size for size in (128, 64, 32) if not any(k % size for k in inputs))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_in_the_table(path: Path) -> None:
    table = (packaged_recipes() / "README.md").read_text(encoding="utf-8")
    assert f"[{path.stem}]({path.relative_to(packaged_recipes()).as_posix()})" in table


def test_the_json_schema_describes_every_key() -> None:
    schema = Recipe.model_json_schema()
    objects = {"Recipe": schema, **schema["$defs"]}
    for name, definition in objects.items():
        assert definition.get("additionalProperties") is False, f"{name} takes unknown keys"
        for key, value in definition["properties"].items():
            assert value.get("description"), f"{name}.{key}: no description"
