"""A grid of runs: what is shared is computed once, and what came out is shown."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from qlora.artifacts import read_json, write_json
from qlora.cli import qlora
from qlora.errors import QloraError, UserError
from qlora.recipe_file import load_recipe
from qlora.sweep import Grid, _outcome, sweep


def run(path, *overrides, jobs=None):
    sweep(str(path), overrides, cluster="local", jobs=jobs, parameters={})


def test_every_combination_is_a_run_and_what_they_share_is_computed_once(
    tiny_recipe, warm_python, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "200")
    path = tiny_recipe(train={"max_steps": 2}, evaluate={"rows": 2})
    run(path, "quantize.bits=4,3", "lora.r=4")
    folder = tmp_path / "runs" / "tiny-sweep"
    runs = {each["name"]: each for each in read_json(folder / "sweep.json")["runs"]}
    assert list(runs) == ["bits-4", "bits-3"] and all(each["outcome"] == "done" for each in runs.values())
    assert runs["bits-4"]["taken_over"] == [] and runs["bits-3"]["taken_over"] == ["train", "merge"]
    weights = [folder / name / "merged" / "model.safetensors" for name in runs]
    assert weights[0].samefile(weights[1])
    assert runs["bits-4"]["gptq"]["kl"] < runs["bits-3"]["gptq"]["kl"]
    assert load_recipe(folder / "bits-3" / "recipe.yaml").lora.r == 4
    told = capsys.readouterr().out
    assert "2 runs, 1 adapter to train" in told and "train, merge taken over" in told
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")

    before = {name: (folder / name / "gptq" / "model.safetensors").stat().st_mtime_ns for name in runs}
    jobs = len(list((folder / "jobs").iterdir()))
    run(path, "quantize.bits=4,3", "lora.r=4", jobs=2)
    assert "2 runs, 2 up to date" in capsys.readouterr().out and len(list((folder / "jobs").iterdir())) == jobs
    assert [each["outcome"] for each in read_json(folder / "sweep.json")["runs"]] == ["done", "done"]
    assert {name: (folder / name / "gptq" / "model.safetensors").stat().st_mtime_ns for name in runs} == before

    # GPTQ has run again and its checkpoint was not measured: the ladder that is there is of the one before.
    again = {name: read_json(folder / name / "lineage.json") for name in runs}
    outputs = again["bits-3"]["stages"]["quantize"]["outputs"]
    outputs["model.safetensors"]["sha256"] = "0" * 64
    write_json(folder / "bits-3" / "lineage.json", again["bits-3"])
    points = {point.name: point for point in Grid.of(str(path), ["quantize.bits=4,3", "lora.r=4"]).points}
    found = {name: _outcome(point, 1) for name, point in points.items()}
    assert found["bits-4"] == runs["bits-4"] | {"outcome": "failed (1)"}
    stale = {"outcome": "failed (1)", "trained": None, "gptq": None}
    assert found["bits-3"] == runs["bits-3"] | stale


def test_names_values_and_groups(tiny_recipe):
    path = tiny_recipe()
    grid = Grid.of(str(path), ["lora.r=8,16", "quantize.bits=4,3", "lora.target_modules=[q_proj, v_proj],all-linear"])
    assert len(grid.points) == 8
    assert grid.points[0].name == "r-8_bits-4_target_modules-q_proj-v_proj"
    assert grid.points[0].recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert all(point.recipe.run_dir.parent == grid.directory for point in grid.points)
    assert [[point.values["quantize.bits"] for point in group] for group in grid.groups()] == [["4", "3"]] * 4
    assert Grid.of(str(path), ["lora.r=8,16", "train.max_steps=7"]).points[1].recipe.train.max_steps == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.r=8"], "no key has several values"),
        (["lora.r=8,8"], "a value is given twice"),
        (["lora.r=8,-1", "train.epochs=1,0"], "greater than 0"),
        (["lora.rr=8,16"], "lora.rr"),
    ],
    ids=["none", "twice", "wrong", "unknown"],
)
def test_a_grid_that_cannot_run_is_refused_before_anything_runs(tiny_recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        Grid.of(str(tiny_recipe()), overrides)


def test_a_run_that_fails_does_not_stop_the_others(tiny_recipe, warm_python, tmp_path):
    missing = [f"[{{path: {tmp_path / name}}}]" for name in ("one.jsonl", "two.jsonl")]
    with pytest.raises(QloraError, match="failed") as failure:
        run(tiny_recipe(), f"data.train={','.join(missing)}", jobs=2)
    assert len(failure.value.problems) == 2
    runs = read_json(tmp_path / "runs" / "tiny-sweep" / "sweep.json")["runs"]
    assert [each["outcome"] for each in runs] == ["failed (2)"] * 2
    logs = [log.read_text() for log in (tmp_path / "runs" / "tiny-sweep" / "jobs").glob("*.err")]
    assert all(any(f"{name}.jsonl" in log for log in logs) for name in ("one", "two"))


def test_a_file_for_wandbs_agents(tiny_recipe, tmp_path):
    path, file = tiny_recipe(), tmp_path / "sweep.yaml"
    overrides = ["lora.r=8,16", "train.learning_rate=1e-4,2e-4", "seed=3"]
    assert CliRunner().invoke(qlora, ["sweep", str(path), *overrides, "--wandb", str(file)]).exit_code == 0
    document = yaml.safe_load(file.read_text())
    assert document["method"] == "grid"
    assert document["parameters"] == {
        "lora.r": {"values": [8, 16]},
        "train.learning_rate": {"values": [1e-4, 2e-4]},
    }
    assert document["command"][:4] == ["qlora", "run", str(path), "seed=3"]
    assert document["command"][-1] == "${args_no_hyphens}"
    assert json.dumps(document) and Path(file).is_file()
