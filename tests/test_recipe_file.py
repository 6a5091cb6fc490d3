"""Recipes: extends, overrides, positions of errors, hints, and that everything wrong is said at once."""

import pytest

from qlora.errors import UserError
from qlora.recipe import Recipe
from qlora.recipe_file import dump_recipe, load_recipe

GOOD = """\
name: test
model: {base: org/model}
data:
  train: [{path: rows.jsonl}]
"""


def write(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_all_errors_are_reported_with_file_line_and_hint(tmp_path):
    path = write(tmp_path, GOOD + "train:\n  learning_rat: 1.0e-4\n  epochs: two\nlora: {r: 0}\nquantise: {bits: 4}\n")
    found = {problem.where.rpartition(":")[2]: problem for problem in problems(path)}
    assert set(found) == {"6", "7", "8", "9"}
    assert all(problem.where.startswith(str(path)) for problem in found.values())
    assert "did you mean learning_rate?" in found["6"].fix
    assert "train.epochs" in found["7"].what and "'two'" in found["7"].what
    assert "did you mean quantize?" in found["9"].fix


def test_overrides_win_and_their_errors_name_the_command_line(tmp_path):
    path = write(tmp_path, GOOD)
    recipe = load_recipe(
        path, ["train.learning_rate=3e-5", "lora.target_modules=[q_proj, v_proj]", "data.train.0.split=x"]
    )
    assert recipe.train.learning_rate == 3e-5
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.data.train[0].split == "x" and recipe.data.train[0].path.endswith("rows.jsonl")
    (problem,) = problems(path, "lora.rank=3")
    assert "command line" in problem.where and "lora.rank" in problem.what
    (problem,) = problems(path, "lora.r")
    assert "section.key=value" in problem.fix


def test_extends_merges_sections_and_resolves_paths_beside_each_file(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", GOOD + "train: {epochs: 2, batch_size: 8}\n")
    recipe = load_recipe(write(tmp_path, "extends: base/recipe.yaml\nname: child\ntrain: {epochs: 5}\n"))
    assert (recipe.name, recipe.train.epochs, recipe.train.batch_size) == ("child", 5, 8)
    assert recipe.data.train[0].path == str(tmp_path / "base" / "rows.jsonl")


def test_an_error_in_an_extended_file_names_that_file(tmp_path):
    parent = write(tmp_path, GOOD + "merge: {dtype: bf16}\n", "parent.yaml")
    (problem,) = problems(write(tmp_path, "extends: parent.yaml\nname: child\n"))
    assert problem.where == f"{parent}:5"


def test_extends_in_a_circle_and_a_missing_parent(tmp_path):
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    path = write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "circle" in problems(path)[0].what
    assert "not there" in problems(write(tmp_path, "extends: nowhere.yaml\n", "c.yaml"))[0].what


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [unclosed\n", "not valid YAML"),
        ("- a\n- b\n", "a mapping of sections"),
        ("name: a\nname: b\n", "given twice"),
        (GOOD + "train: {batch_size: 4, tokens_per_step: 100}\n", "not both"),
        (GOOD + "train: {args: {bf16: true, output_dir: x}}\n", "use model.compute_dtype"),
        (GOOD + "evaluate: {gates: {exact_match: 0.5}}\n", "evaluate.generate"),
        ("model: {base: a}\n", "name is missing"),
        (GOOD + "quantize: {method: awq}\n", "method: awq needs engine: gptqmodel; sym: false"),
        (GOOD + "quantize: {engine: gptqmodel}\nmerge: {write: false}\n", "needs merge.write: true"),
        (
            GOOD.replace("base:", "compute_dtype: float8, base:") + "train: {kernels: plain}\n",
            "float8 is how the fused",
        ),
        (GOOD + "quantize: {calibration: {path: a.txt}}\n", "known here: from, samples, max_length, mix"),
        (GOOD + "quantize: {modules: {mlp: {bit: 8}}}\n", "did you mean bits?"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, message):
    assert any(message in str(problem) for problem in problems(write(tmp_path, text)))


def test_a_missing_recipe_suggests_near_ones(tmp_path):
    write(tmp_path, GOOD, "mine.yaml")
    assert "mine.yaml" in problems(tmp_path / "mien.yaml")[0].fix
    assert "quickstart" in problems("quikstart")[0].fix


def test_a_resolved_recipe_reads_back_the_same(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD + "train: {learning_rate: 2e-4, args: {label_smoothing_factor: 0.1}}\n"))
    assert load_recipe(write(tmp_path, dump_recipe(recipe), "resolved.yaml")) == recipe


def test_cache_variable_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(write(tmp_path, GOOD.replace("org/model", "'${QLORA_CACHE}/models/x.gguf'")))
    assert recipe.model.base == str(tmp_path / "cache" / "models" / "x.gguf")


def test_calibration_text_is_a_file_beside_the_recipe_or_a_name(tmp_path):
    (tmp_path / "wikitext2").mkdir()  # a folder of that name changes nothing
    (tmp_path / "general.txt").write_text("text")
    text = "quantize: {calibration: {from: wikitext2, mix: {from: general.txt, share: 0.1}}}\n"
    calibration = load_recipe(write(tmp_path, GOOD + text)).quantize.calibration
    assert (calibration.from_, calibration.mix.from_) == ("wikitext2", str(tmp_path / "general.txt"))
    listed = load_recipe(write(tmp_path, GOOD), ["quantize.calibration.from=[one, two]"]).quantize.calibration
    assert listed.from_ == ["one", "two"]
    resolved = dump_recipe(load_recipe(write(tmp_path, GOOD + text)))
    assert load_recipe(write(tmp_path, resolved, "resolved.yaml")).quantize.calibration == calibration


def test_every_key_of_the_schema_says_what_it_does():
    schema = Recipe.model_json_schema()
    for definition in (schema, *schema["$defs"].values()):
        for name, field in definition["properties"].items():
            assert field.get("description"), name
        assert definition["additionalProperties"] is False


def test_only_the_native_engine_refines():
    from pydantic import ValidationError

    from qlora.recipe import Quantize

    assert Quantize().refine is not None
    assert Quantize.model_validate({"engine": "gptqmodel"}).refine is None
    with pytest.raises(ValidationError, match="refine tunes what engine: native wrote"):
        Quantize.model_validate({"engine": "gptqmodel", "refine": {"steps": 3}})
