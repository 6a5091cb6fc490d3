"""A grid of runs through the command line: what is shared is computed once, and what came out is shown."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora.artifacts import read_json
from qlora.errors import UserError
from qlora.recipe_file import load_recipe
from qlora.sweep import Grid, write_wandb


def sweep(*arguments):
    environment = os.environ | {"COLUMNS": "200"}
    command = [sys.executable, "-m", "qlora", "sweep", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_combination_is_a_run_and_what_they_share_is_computed_once(tiny_recipe, tmp_path):
    path = tiny_recipe(train={"max_steps": 2}, evaluate={"rows": 2})
    done = sweep(path, "quantize.bits=4,3", "lora.r=4")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "tiny-sweep"
    runs = {run["name"]: run for run in read_json(folder / "sweep.json")["runs"]}
    assert list(runs) == ["bits-4", "bits-3"] and all(run["outcome"] == "done" for run in runs.values())
    assert runs["bits-4"]["taken_over"] == [] and runs["bits-3"]["taken_over"] == ["train", "merge"]
    weights = [folder / name / "merged" / "model.safetensors" for name in runs]
    assert weights[0].samefile(weights[1])
    assert runs["bits-4"]["gptq"]["kl"] < runs["bits-3"]["gptq"]["kl"]
    assert load_recipe(folder / "bits-3" / "recipe.yaml").lora.r == 4
    assert "2 runs, 1 adapters to train" in done.stdout and "train, merge taken over" in done.stdout
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")

    before = {run: (folder / run / "gptq" / "model.safetensors").stat().st_mtime_ns for run in runs}
    assert sweep(path, "quantize.bits=4,3", "lora.r=4").returncode == 0
    assert {run: (folder / run / "gptq" / "model.safetensors").stat().st_mtime_ns for run in runs} == before


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


def test_a_run_that_fails_does_not_stop_the_others(tiny_recipe, tmp_path):
    missing = [f"[{{path: {tmp_path / name}}}]" for name in ("one.jsonl", "two.jsonl")]
    done = sweep(tiny_recipe(), f"data.train={','.join(missing)}")
    assert done.returncode == 2 and done.stdout.count("failed (2)") >= 2
    runs = read_json(tmp_path / "runs" / "tiny-sweep" / "sweep.json")["runs"]
    assert [run["outcome"] for run in runs] == ["failed (2)"] * 2
    logs = [log.read_text() for log in (tmp_path / "runs" / "tiny-sweep" / "jobs").glob("*.err")]
    assert all(any(f"{name}.jsonl" in log for log in logs) for name in ("one", "two"))


def test_a_file_for_wandbs_agents(tiny_recipe, tmp_path):
    path, file = tiny_recipe(), tmp_path / "sweep.yaml"
    write_wandb(str(path), ["lora.r=8,16", "train.learning_rate=1e-4,2e-4", "seed=3"], file)
    document = yaml.safe_load(file.read_text())
    assert document["method"] == "grid"
    assert document["parameters"] == {
        "lora.r": {"values": [8, 16]},
        "train.learning_rate": {"values": [1e-4, 2e-4]},
    }
    assert document["command"][:4] == ["qlora", "run", str(path), "seed=3"]
    assert document["command"][-1] == "${args_no_hyphens}"
    assert json.dumps(document) and Path(file).is_file()
