"""The benchmark of the recipes: its models are the published ones, and a small one is trained as the recipe says."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

from model_shapes import SHAPES

import recipes
from qlora.models.shapes import skeleton
from qlora.recipe_file import load_recipe


@pytest.mark.parametrize("name", SHAPES)
def test_models_have_the_published_number_of_parameters(name):
    assert skeleton(SHAPES[name].config()).num_parameters() == SHAPES[name].parameters


def test_recipes_of_one_model_share_a_process_and_what_is_measured_is_kept(tmp_path):
    groups = recipes.grouped(recipes.measurable())
    assert sum(groups, []).count("llama-3.1-8b-dpo") == 1
    together = next(group for group in groups if "llama-3.1-8b" in group)
    assert {"llama-3.1-8b-dpo", "llama-3.1-8b-2gpu"} < set(together) and "qwen3-8b" not in together
    row = {"recipe": "qwen3-8b", "settings": recipes.settings_of(load_recipe("qwen3-8b"))}
    recipes.write_rows(tmp_path / "out.json", {"qwen3-8b": row})
    found = recipes.read_rows(tmp_path / "out.json")
    assert not recipes.is_wanted("qwen3-8b", found, None) and recipes.is_wanted("qwen3-8b", found, ["qwen3-8b"])
    changed = {"qwen3-8b": row | {"settings": row["settings"] | {"max_length": 1}}}
    assert recipes.is_wanted("qwen3-8b", changed, None) and recipes.is_wanted("mistral-7b", found, None)


def test_a_card_is_what_the_title_says(tmp_path):
    path = tmp_path / "one.yaml"
    for title, card in (("a, for two 24 GB GPUs", (2, 24)), ("b, for one 8 GB GPU", (1, 8)), ("c", None)):
        path.write_text(f"# {title}\nname: x\n")
        assert recipes.card_of(path) == card


def test_one_of_two_gpus_trains_its_share_of_the_rows_unless_they_share_the_base():
    job = {"steps": 4, "device": "cuda", "tiny": False}
    recipe = load_recipe("llama-3.1-8b-2gpu")
    tried = recipes.shortened(recipe, job, 20.0)
    assert recipe.train.batch_size == 32 and tried.train.batch_size == 16 and tried.train.processes == 1
    assert tried.train.memory == pytest.approx(18.0)
    assert "llama-3.3-70b" in recipes.measurable(gpus=2) and "llama-3.3-70b" not in recipes.measurable()
    tried = recipes.shortened(load_recipe("llama-3.3-70b"), job, 20.0)
    assert (
        tried.train.shard
        and tried.train.processes == 2
        and tried.train.batch_size == load_recipe("llama-3.3-70b").train.batch_size
    )
    tried = recipes.shortened(load_recipe("llama-3.1-8b-pretrain"), job, 20.0)
    assert tried.train.batch_size * tried.data.max_length == 65536


def test_a_measured_recipe_says_what_it_is_and_what_it_took(tmp_path, monkeypatch):
    """One without two losses to compare, one with; on a model of two small layers."""
    from qlora.training import preference, sft

    for module in (sft, preference):
        monkeypatch.setattr(module, "load_for_training", module.load_for_training)  # put back afterwards
    job = {"steps": 3, "device": "cpu", "tiny": True}
    for name in ("qwen3-30b-a3b", "llama-3.1-8b-dpo"):
        row = recipes.measure(name, job)
        assert row["tokens_per_second"] > 0 and len(row["step_seconds"]) == 3 and row["grad_norm"] > 0
        assert row["settings"] == recipes.settings_of(load_recipe(name))
        each = 48 if "dpo" not in name else 2 * 48
        assert row["step_tokens"] == 4 * each
        assert recipes.line(json.loads(json.dumps({"recipe": name} | row))).startswith(f"{name}: ")
