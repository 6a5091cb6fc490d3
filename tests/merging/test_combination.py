"""Several adapters as one: the merged model has the sum of their updates, by weight."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qlora.artifacts import read_json
from qlora.check import check
from qlora.errors import UserError
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe


@pytest.fixture
def adapters(tiny_recipe, tmp_path):
    """Two adapters of the same base: other ranks, other modules, another scale."""

    def train(name: str, *overrides: str):
        recipe = load_recipe(tiny_recipe(), (f"name={name}", f"output_dir={tmp_path}", "train.max_steps=3", *overrides))
        Pipeline(recipe).run_stage("train")
        return recipe.run_dir / "adapter"

    return train


def merged(path, tmp_path, name, *overrides):
    every = (f"name={name}", f"output_dir={tmp_path}", "merge.dtype=float32", "merge.rounding=nearest")
    recipe = load_recipe(path, (*every, *overrides))
    Pipeline(recipe).run_stage("train")
    Pipeline(recipe).run_stage("merge")
    return load_file(recipe.run_dir / "merged" / "model.safetensors"), recipe.run_dir


def test_the_merged_sum_is_the_sum_of_the_merges(tiny_recipe, adapters, tmp_path):
    one = adapters("one", "lora.r=4")
    two = adapters(
        "two", "lora.rslora=true", "lora.target_modules=[q_proj, down_proj]", "lora.rank_pattern={q_proj: 2}", "seed=3"
    )
    alone = [
        merged(tiny_recipe(), tmp_path, f"alone-{number}", f"lora.combine=[{{path: {path}}}]")[0]
        for number, path in enumerate((one, two))
    ]
    weights = f"[{{path: {one}, weight: 0.5}}, {{path: {two}, weight: -2}}]"
    both, directory = merged(tiny_recipe(), tmp_path, "both", f"lora.combine={weights}")
    nothing, _ = merged(tiny_recipe(), tmp_path, "nothing", f"lora.combine=[{{path: {one}, weight: 0}}]")
    changed = [name for name in both if not torch.equal(both[name], nothing[name])]
    assert any("down_proj" in name for name in changed) and any("k_proj" in name for name in changed)
    for name, tensor in both.items():
        first, second = (other[name].double() - nothing[name].double() for other in alone)
        expected = nothing[name].double() + 0.5 * first - 2 * second
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=2e-7 * float(tensor.abs().max()))
    config = read_json(directory / "adapter" / "adapter_config.json")
    assert config["r"] == config["lora_alpha"] and set(config["rank_pattern"].values()) <= {4, 6, 12}
    assert (directory / "adapter" / "base.json").is_file()


def test_peft_reads_the_sum_as_the_merge_does(tiny_recipe, tiny_model, adapters, tmp_path, supported):
    """The ladder's gate compares the model with the combined adapter, which PEFT loads, and the merged one."""
    one, two = adapters("one"), adapters("two", "seed=3", "lora.target_modules=[v_proj, up_proj]")
    path = tiny_recipe(
        evaluate={"gates": {"merge_kl": 1e-5}}, model={"base": str(tiny_model), "compute_dtype": "float32"}
    )
    weights = f"[{{path: {one}, weight: 0.7}}, {{path: {two}, weight: 1.3}}]"
    recipe = load_recipe(path, (f"lora.combine={weights}", "merge.dtype=float32", f"output_dir={tmp_path}"))
    Pipeline(recipe).run()
    supported(recipe.run_dir)
    report = check(recipe)
    assert report.problems == [] and "train" not in [stage.stage for stage in report.stages]
    assert report.training == "no training: the sum of 2 adapters"


def test_what_decides_whether_it_is_done_again(tiny_recipe, adapters, tmp_path):
    one = adapters("one")
    recipe = lambda weight: load_recipe(  # noqa: E731
        tiny_recipe(), (f"lora.combine=[{{path: {one}, weight: {weight}}}]", f"output_dir={tmp_path}", "name=sum")
    )
    written = []
    for weight in (1.0, 1.0, 0.5):
        Pipeline(recipe(weight)).run_stage("train")
        written.append((tmp_path / "sum" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns)
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("lora.dora=true",), "DoRA"),
        (("lora.modules_to_save=[norm]",), "modules trained in full"),
        (("model.quantization=fp4",), "trained on other weights"),
    ],
    ids=["dora", "modules_to_save", "another base"],
)
def test_what_has_no_sum_is_refused_by_name(tiny_recipe, adapters, tmp_path, overrides, message):
    one, two = adapters("one"), adapters("two", *overrides)
    parts = f"lora.combine=[{{path: {one}}}, {{path: {two}}}]"
    with pytest.raises(UserError, match=message) as caught:
        Pipeline(load_recipe(tiny_recipe(), (parts, f"output_dir={tmp_path}"))).run_stage("train")
    assert str(two) in str(caught.value) and str(one) not in str(caught.value)


def test_a_missing_adapter_and_a_second_beginning(tiny_recipe, tmp_path):
    missing = f"lora.combine=[{{path: {tmp_path / 'none'}}}]"
    with pytest.raises(UserError, match="there is no adapter_model.safetensors"):
        Pipeline(load_recipe(tiny_recipe(), (missing,))).run_stage("train")
    assert any("missing" in str(problem) for problem in check(load_recipe(tiny_recipe(), (missing,))).problems)
    with pytest.raises(UserError, match="nothing to start_from"):
        load_recipe(tiny_recipe(), (missing, f"lora.start_from={tmp_path}"))


def test_paths_are_relative_to_the_recipe(tiny_recipe, tmp_path):
    path = tiny_recipe(lora={"combine": [{"path": "adapters/one", "weight": 0.5}]})
    (path.parent / "adapters" / "one").mkdir(parents=True)
    assert load_recipe(path).lora.combine[0].path == str(path.parent / "adapters" / "one")
    assert json.dumps(load_recipe(path).model_dump())
