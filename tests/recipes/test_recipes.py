"""Every recipe that ships: it loads, explains itself, is in the table with its figures, and fits its model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

from qlora.models.estimates import estimate_stages
from qlora.models.resources import Pass, Rows, Workload, assumed_machine
from qlora.models.shapes import adapter_shapes, model_shapes, skeleton
from qlora.paths import packaged_recipes
from qlora.recipe import Recipe
from qlora.recipe_file import load_recipe

RECIPES = sorted(packaged_recipes().glob("*.y*ml"))

# Dimensions as the models' config.json on the hub states them.
CONFIGS: dict[str, PretrainedConfig] = {
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32,
        vocab_size=128256, tie_word_embeddings=False,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        num_hidden_layers=36, vocab_size=151936, tie_word_embeddings=False,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32,
        vocab_size=32768, tie_word_embeddings=False,
    ),
    "google/gemma-3-1b-it": Gemma3TextConfig(
        hidden_size=1152, intermediate_size=6912, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
        num_hidden_layers=26, vocab_size=262144, tie_word_embeddings=True,
    ),
    "SmolLM2-135M-Instruct.Q4_1.gguf": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30,
        vocab_size=49152, tie_word_embeddings=True,
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


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "quickstart"], ids=lambda path: path.stem)
def test_figures_in_headers_and_table_are_those_of_the_formulas(path: Path) -> None:
    recipe = load_recipe(path)
    model = skeleton(CONFIGS[recipe.model.base])
    shapes, calibration = model_shapes(model), recipe.quantize.calibration
    longest = Rows(calibration.samples * calibration.max_length, calibration.max_length)
    work = Workload(
        train_tokens=1, train_sequence=1,
        largest_pass=Pass(recipe.data.max_length, shapes.layers),
        calibration=longest, refinement=longest, evaluation=Rows(0, 0), eval_answer_tokens=0, eval_longest_answer=0,
    )  # fmt: skip
    machine = assumed_machine("cuda:0", "NVIDIA H100 80GB HBM3", 16)
    stages = estimate_stages(recipe, shapes, adapter_shapes(model, recipe.lora), work, machine)
    memory = {stage.stage: f"{stage.device / 2**30:.1f}" for stage in stages}
    disk = {stage.stage: stage.disk / 2**30 for stage in stages}
    table = (packaged_recipes() / "README.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith(f"| [{path.stem}]"))
    assert f"| {memory['train']} / {memory['quantize']} / {memory['refine']} GiB |" in row
    assert f"| {disk['merge']:.1f} / {disk['quantize']:.1f} GiB |" in row
    header = " ".join(line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines()[:12])
    assert f"GPU memory from {memory['train']} GiB in training" in header
    assert f"{memory['quantize']} GiB in GPTQ, {memory['refine']} GiB in refining it" in header
    minutes = sum(stage.seconds or 0 for stage in stages if stage.stage in ("quantize", "refine")) / 60
    stated = re.search(r"both in (\d+) (minutes|seconds) on an H100", header)
    assert stated is not None
    most = int(stated[1]) / (60 if stated[2] == "seconds" else 1)
    assert 0.8 * most < minutes < 1.2 * most


def test_the_json_schema_describes_every_key() -> None:
    schema = Recipe.model_json_schema()
    objects = {"Recipe": schema, **schema["$defs"]}
    for name, definition in objects.items():
        assert definition.get("additionalProperties") is False, f"{name} takes unknown keys"
        for key, value in definition["properties"].items():
            assert value.get("description"), f"{name}.{key}: no description"
