"""Trackers: one wandb run across all stages, offline and silent without a key; TensorBoard; nothing by default."""

import os
import subprocess

import warm

from qlora.artifacts import read_json
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe


def run(path, *overrides) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NETRC": "/dev/null"}
    return warm.run("run", path, *overrides, env=environment)


def test_trackers_get_one_run_and_the_terminal_stays_quiet(tiny_recipe, tmp_path):
    path = tiny_recipe(track={"to": ["wandb", "tensorboard"], "project": "test"})
    result = run(path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "wandb" not in (result.stdout + result.stderr).lower()
    tracking = tmp_path / "runs" / "tiny" / "tracking"
    run_id = read_json(tracking / "wandb.json")["id"]
    (offline,) = tracking.glob("wandb/offline-run-*")
    assert offline.name.endswith(run_id)
    media = {
        path.relative_to(offline / "files" / "media").as_posix().partition("_")[0]
        for path in offline.rglob("media/*/**/*.*")
    }
    assert {"html/report", "table/ladder/table", "table/ladder/kl"} <= media

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracking / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "merge/seconds", "quantize/seconds", "evaluate/gptq_kl"} <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert "| GPTQ, 4 bits, group 32 |" in events.Tensors("ladder/text_summary")[0].tensor_proto.string_val[0].decode()

    result = run(path, "quantize.bits=8")  # a later command continues the same run
    assert result.returncode == 0, result.stdout + result.stderr
    assert read_json(tracking / "wandb.json")["id"] == run_id


def test_nothing_is_tracked_unless_asked_for(tiny_recipe, tmp_path):
    Pipeline(load_recipe(tiny_recipe(output_dir=str(tmp_path / "runs")))).run_stage("train")
    assert (tmp_path / "runs" / "tiny" / "adapter").is_dir()
    assert not (tmp_path / "runs" / "tiny" / "tracking").exists()
