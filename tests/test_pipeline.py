"""Whole runs on a tiny model: skipping, resuming after kill -9, gates, and what a user sees when something is wrong."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file, save_file

from qlora.artifacts import read_json
from qlora.check import check
from qlora.errors import GateFailed, UserError
from qlora.paths import cache_dir
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe

OUTPUTS = {"train": "adapter", "merge": "merged", "quantize": "gptq", "evaluate": "evaluation"}
STAGES = tuple(OUTPUTS)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(path: Path, *overrides: str) -> Path:
    recipe = load_recipe(path, overrides)
    Pipeline(recipe).run()
    return recipe.run_dir


def command(*arguments: object) -> subprocess.CompletedProcess:
    return warm.run(*arguments, env=ENVIRONMENT)


def kill_when(condition: Callable[[], bool], *arguments: object) -> None:
    """Start a command, and kill -9 it as soon as the condition holds."""
    process = warm.start(*arguments, env=ENVIRONMENT)
    while not condition():
        assert process.poll() is None, "the command ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()


def copy_before(stage: str, whole: Path, folder: Path) -> Path:
    """A copy of a finished run in `folder` as it was before `stage`."""
    run_dir = folder / whole.name
    if stage != "train":
        shutil.copytree(whole, run_dir)
        for later in STAGES[STAGES.index(stage) :]:
            shutil.rmtree(run_dir / OUTPUTS[later])
    return run_dir


def weights(run_dir: Path) -> dict[str, str]:
    """Digests of everything that must not depend on interruptions."""
    files = [*run_dir.glob("adapter/*.safetensors"), *run_dir.glob("merged/*"), *run_dir.glob("gptq/*")]
    return {str(f.relative_to(run_dir)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def started(run_dir: Path) -> dict[str, str]:
    return {name: entry["started"] for name, entry in read_json(run_dir / "lineage.json")["stages"].items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_recipe):
    """An uninterrupted run in a process of its own, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(
        folder / "whole.yaml",
        name="whole",
        data={"overlap": "remove"},
        train={"max_steps": 12, "micro_batch_tokens": 64, "learning_rate": 0.005, "checkpoint_every": 3},
        quantize={"refine": {"steps": 5}},
    )
    result = command("run", path)
    assert result.returncode == 0, result.stderr
    return path, folder / "runs" / "whole", result.stdout


def test_a_run_leaves_the_directory_of_the_contract(finished, supported):
    _, run_dir, output = finished
    expected = {
        "recipe.yaml",
        "lineage.json",
        "adapter",
        "checkpoints",
        "merged",
        "gptq",
        "evaluation",
        "logs",
        "report",
    }
    assert {path.name for path in run_dir.iterdir() if not path.name.startswith(".")} == expected
    assert {"base.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        p.name for p in (run_dir / "adapter").iterdir()
    }
    for stage in STAGES:
        entry = read_json(run_dir / "lineage.json")["stages"][stage]
        assert entry["status"] == "complete" and entry["outputs"] and entry["versions"]["torch"]
        assert entry["expected"]["seconds"] > 0 and entry["expected"]["host_gib"] > 1
    ladder = read_json(run_dir / "evaluation" / "ladder.json")
    assert [rung["name"] for rung in ladder["rungs"]] == ["base", "nf4", "trained", "merged", "gptq"]
    assert "The ladder: 3 held-out rows" in output
    assert f"Report: {run_dir}/report/index.html" in output
    assert "<h1" in (run_dir / "report" / "index.html").read_text(encoding="utf-8")
    supported(run_dir)


def test_no_artefact_names_this_machine(finished, tiny_model):
    _, run_dir, _ = finished
    for path in [*run_dir.glob("merged/*.json"), *run_dir.glob("gptq/*.json"), *run_dir.glob("adapter/*.json")]:
        assert str(tiny_model.parent) not in path.read_text(), path


def test_a_second_run_does_nothing_and_a_change_runs_what_depends_on_it(finished, capsys):
    path, run_dir, _ = finished
    before = started(run_dir), weights(run_dir)
    run(path)
    assert (started(run_dir), weights(run_dir)) == before
    time.sleep(1.1)  # start times have a resolution of a second
    capsys.readouterr()
    run(path, "quantize.bits=8")
    after = started(run_dir)
    assert [stage for stage in STAGES if after[stage] != before[0][stage]] == ["quantize", "evaluate"]
    assert "quantize.bits changed" in capsys.readouterr().out
    run(path)  # and back, for the tests after this one
    assert weights(run_dir) == before[1]


def test_a_file_that_is_gone_or_was_changed_is_named(finished, tmp_path):
    path, run_dir, _ = finished
    shutil.copytree(run_dir, tmp_path / "whole")
    pipeline = Pipeline(load_recipe(path, (f"output_dir={tmp_path}",)))
    pipeline.require(["quantize"], "publish")
    weights = tmp_path / "whole" / "gptq" / "model.safetensors"
    for damage, words in ((lambda: weights.write_bytes(b""), "has another size"), (weights.unlink, "is missing")):
        damage()
        with pytest.raises(UserError, match=f"out of date because gptq/model.safetensors {words}"):
            pipeline.require(["quantize"], "publish")


def test_the_content_of_calibration_text_and_templates_counts_not_their_paths(
    tiny_recipe, tiny_model, tmp_path, capsys
):
    text, template = tmp_path / "general.txt", tmp_path / "chat.jinja"
    text.write_text("The river bends twice before it meets the sea.\n\n" * 20)
    template.write_text((tiny_model / "chat_template.jinja").read_text())
    mix = f"quantize.calibration.mix={{from: {text}, share: 0.25}}"
    short_rows = {"group_size": 32, "calibration": {"samples": 8, "max_length": 64}}
    path, overrides = tiny_recipe(quantize=short_rows), [mix, f"data.chat_template={template}"]
    run(path, *overrides)
    moved = text.rename(tmp_path / "moved.txt")
    capsys.readouterr()
    run(path, mix.replace(str(text), str(moved)), overrides[1])
    assert "again" not in capsys.readouterr().out
    moved.write_text("Twelve apples and three pears make fifteen fruits.\n\n" * 20)
    run(path, mix.replace(str(text), str(moved)), overrides[1])
    output = capsys.readouterr().out
    assert "quantize   runs again because quantize.calibration.mix.from changed" in output
    assert "train      up to date" in output
    template.write_text(template.read_text() + "{# a comment #}")
    run(path, mix.replace(str(text), str(moved)), overrides[1])
    assert "train      runs again because data.chat_template changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.quantization=none"],
        ["model.quantization=fp4", "model.double_quant=false"],
        ["lora.dora=true", "lora.rslora=true", "lora.rank_pattern={q_proj: 4}", "lora.alpha_pattern={v_proj: 4}"],
        ["lora.target_modules=[q_proj, v_proj]", "lora.dropout=0.1", "lora.dtype=bfloat16"],
        ["lora.modules_to_save=[norm]", "lora.bias=all"],
        ["merge.dtype=float32", "quantize.bits=3", "quantize.sym=false", "quantize.group_size=-1"],
        [
            "train.kernels=plain",
            "train.batch_size=null",
            "train.tokens_per_step=96",
            "train.gradient_checkpointing=true",
        ],
        ["data.loss_on=all", "train.evaluate_every=2", "train.neftune_alpha=0.1", "train.keep_best=true"],
        ["quantize.asymmetric_calibration=1", "quantize.prompt_weight=0.25"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_variant_goes_through_all_stages_and_merges_exactly(tiny_recipe, overrides, supported):
    run_dir = run(tiny_recipe(), *overrides)
    rungs = {rung["name"]: rung for rung in read_json(run_dir / "evaluation" / "ladder.json")["rungs"]}
    assert rungs["trained"]["loss"] < rungs["base"]["loss"]
    assert rungs["merged"]["kl"] < 2e-3
    assert rungs["gptq"]["kl"] < rungs["base"]["kl"]
    supported(run_dir)


def test_moving_the_base_does_not_train_again(finished, tiny_model, tmp_path):
    path, run_dir, _ = finished
    before = started(run_dir)
    (tmp_path / tiny_model.name).symlink_to(tiny_model)
    run(path, f"model.base={tmp_path / tiny_model.name}")
    assert started(run_dir) == before


@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_in_a_stage_then_run_again_ends_with_the_same_bytes(finished, stage, tmp_path):
    path, whole, _ = finished
    run_dir = copy_before(stage, whole, tmp_path)
    output = OUTPUTS[stage]
    # In training, after a checkpoint; in the others, as soon as the stage has its folder.
    inside = run_dir / "checkpoints/checkpoint-6/complete" if stage == "train" else run_dir / f"{output}.partial"
    kill_when(inside.exists, "run", path, f"output_dir={tmp_path}")
    assert not (run_dir / output).exists()

    run(path, f"output_dir={tmp_path}")
    assert weights(run_dir) == weights(whole)
    assert not list(run_dir.glob("*.partial"))
    if stage == "train":
        assert read_json(run_dir / "lineage.json")["stages"]["train"]["metrics"]["resumed_from"] is not None


@pytest.mark.parametrize("change", [[], ["quantize.bits=8"]], ids=["the same recipe", "another recipe"])
def test_what_an_interrupted_quantize_left_goes_to_the_same_work_only(finished, change, tmp_path):
    path, whole, _ = finished
    run_dir = copy_before("quantize", whole, tmp_path)
    kill_when((run_dir / "gptq.partial").exists, "run", path, f"output_dir={tmp_path}")
    (run_dir / "gptq.partial" / "left").touch()
    run(path, f"output_dir={tmp_path}", *change)
    assert (run_dir / "gptq" / "left").exists() == (not change)
    assert not [file for file in run_dir.iterdir() if "partial" in file.name]
    if not change:
        (run_dir / "gptq" / "left").unlink()
        assert weights(run_dir) == weights(whole)


def test_without_merged_weights_gptq_is_the_same_and_the_ladder_says_what_it_lacks(tiny_recipe, capsys, supported):
    """In float32 throughout, where writing the merged model rounds nothing either."""
    path, exact = tiny_recipe(), ["model.compute_dtype=float32", "merge.dtype=float32"]
    run_dir = run(path, *exact)
    written = weights(run_dir)
    capsys.readouterr()
    run(path, *exact, "merge.write=false", "evaluate.gates.merge_kl=1.0e-9")
    output = " ".join(capsys.readouterr().out.split())
    assert "merge runs again because merge.write changed" in output and "train up to date" in output
    assert "merged: not measured, because merge.write is false" in output and "merge_kl did not apply" in output
    assert not list(run_dir.rglob("merged/*.safetensors")) and (run_dir / "merged" / "tokenizer.json").is_file()
    ladder = read_json(run_dir / "evaluation" / "ladder.json")
    assert [rung["name"] for rung in ladder["rungs"]] == ["base", "nf4", "trained", "gptq"]
    direct = weights(run_dir)
    assert direct == {name: digest for name, digest in written.items() if name in direct}
    assert "gptq/model.safetensors" in direct
    supported(run_dir)
    # The adapter changes and nothing in merged/ does: GPTQ must notice all the same.
    run(path, *exact, "merge.write=false", "train.learning_rate=0.02")
    after = weights(run_dir)
    assert after["merged/config.json"] == direct["merged/config.json"]
    assert after["gptq/model.safetensors"] != direct["gptq/model.safetensors"]


@pytest.fixture
def refine(tmp_path) -> list[str]:
    """Overrides for a refinement that pays: at 3 bits, on text enough for what is learnt to hold on rows held back."""
    text = tmp_path / "sums.txt"
    text.write_text("".join(f"The sum of {i} and {i} is {2 * i}.\n\n" for i in range(300)))
    calibration = f"quantize.calibration={{from: {text}, samples: 32, max_length: 64}}"
    steps = "quantize.refine={steps: 10, tokens_per_step: 512, learning_rate: 0.003, held_out: 0.25}"
    return ["quantize.bits=3", calibration, steps]


def codes(run_dir: Path) -> dict[str, torch.Tensor]:
    """Everything of the GPTQ checkpoint that refinement must leave alone."""
    tensors = load_file(run_dir / "gptq" / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".scales") and "norm" not in name}


def test_refinement_follows_gptq_and_needs_no_merged_weights(tiny_recipe, refine, capsys, supported):
    path, exact = tiny_recipe(), ["model.compute_dtype=float32", "merge.dtype=float32"]
    run_dir = run(path, *exact, *refine, "quantize.refine=null")
    plain, plain_codes = weights(run_dir), codes(run_dir)
    capsys.readouterr()
    run(path, *exact, *refine)
    output = " ".join(capsys.readouterr().out.split())
    assert "merge up to date" in output and "quantize runs again because quantize.refine" in output
    refined = weights(run_dir)
    changed = {name for name in plain if plain[name] != refined[name]}
    assert changed == {"gptq/model.safetensors"}
    assert all(torch.equal(tensor, plain_codes[name]) for name, tensor in codes(run_dir).items())
    report = read_json(run_dir / "lineage.json")["stages"]["quantize"]["metrics"]["refine"]
    assert report["kept"] and report["kl_after"] < report["kl_before"]
    # 10 steps of 512 tokens are 80 rows of 64; a quarter of a corpus is held back, since it has no rows left over.
    assert (report["rows"], report["held_out_rows"]) == (60, 20)

    supported(run_dir)

    run(path, *exact, *refine, "merge.write=false")
    supported(run_dir)
    direct = weights(run_dir)
    assert not list(run_dir.rglob("merged/*.safetensors"))
    assert direct["gptq/model.safetensors"] == refined["gptq/model.safetensors"]


@pytest.fixture
def one_thread():
    """As in ENVIRONMENT: sums in another order end in other bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("writing", [False, True])
def test_kill_9_in_refinement_then_run_again_ends_with_the_same_bytes(finished, refine, writing, tmp_path, one_thread):
    path, whole, _ = finished
    uninterrupted, run_dir = (copy_before("quantize", whole, tmp_path / name) for name in ("uninterrupted", "killed"))
    run(path, *refine, f"output_dir={uninterrupted.parent}")
    partial = run_dir / "gptq.partial"

    def is_refining() -> bool:
        return (partial / "quantized.json").exists()

    kill_when(is_refining, "quantize", path, f"output_dir={run_dir.parent}", *refine)
    gptq = read_json(partial / "quantized.json")["timings"]
    if writing:  # as if the kill had come then
        (partial / "quantized.json").unlink()
        file = partial / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1000:] = bytes(1000)
        file.write_bytes(content)
    run(path, *refine, f"output_dir={run_dir.parent}")
    assert weights(run_dir) == weights(uninterrupted)
    metrics = read_json(run_dir / "lineage.json")["stages"]["quantize"]["metrics"]
    assert metrics["refine"]["kept"]
    assert (metrics["timings"] == gptq) == (not writing), "GPTQ is not done again"
    assert not (run_dir / "gptq" / "quantized.json").exists()


def test_the_ladder_names_refinement_and_every_fallback(tiny_recipe, capsys):
    path = tiny_recipe()
    run_dir = run(path, "quantize.refine={steps: 8, tokens_per_step: 128}", "quantize.calibration.samples=2")
    output = " ".join(capsys.readouterr().out.split())
    metrics = read_json(run_dir / "lineage.json")["stages"]["quantize"]["metrics"]
    refined = metrics["refine"]
    assert f"KL on held-back rows {refined['kl_before']:.4f} → {refined['kl_after']:.4f}" in output
    ladder = read_json(run_dir / "evaluation" / "ladder.json")
    assert ladder["rungs"][-1]["label"].endswith(", refined") == refined["kept"]
    assert ("refinement was not kept" in output) != refined["kept"]
    assert any("fewer calibration tokens" in warning for warning in metrics["warnings"])
    below = output[output.index("The ladder") :]
    for warning in metrics["warnings"]:
        assert f"quantized: {warning}" in below
    run(path, "quantize.refine={steps: 8, tokens_per_step: 128}", "quantize.calibration.samples=2")
    assert "quantized: " in capsys.readouterr().out, "also when nothing is left to do"


def test_ctrl_c_ends_with_130_within_seconds_and_the_run_continues(finished, tmp_path):
    path, whole, _ = finished
    errors = tmp_path / "stderr"
    process = warm.start("run", path, f"output_dir={tmp_path}", env=ENVIRONMENT, stderr=str(errors))
    while not (tmp_path / "whole/checkpoints/checkpoint-3/complete").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=20)
    assert process.returncode == 130
    told = errors.read_text(encoding="utf-8")
    assert "the same command continues" in told and "Traceback" not in told
    assert not (tmp_path / "whole/adapter.partial").exists()
    run(path, f"output_dir={tmp_path}")
    assert weights(tmp_path / "whole") == weights(whole)


def test_checkpoints_of_another_run_are_not_resumed_from(tiny_recipe):
    path = tiny_recipe()
    run_dir = run(path)
    assert list(run_dir.glob("checkpoints/checkpoint-*"))
    run(path, "train.learning_rate=0.002")  # another recipe
    metrics = read_json(run_dir / "lineage.json")["stages"]["train"]["metrics"]
    assert (metrics["resumed_from"], metrics["steps"]) == (None, 6)
    (run_dir / "checkpoints" / "fingerprint.json").unlink()  # and those whose origin nobody knows
    (run_dir / "lineage.json").unlink()
    run(path, "train.learning_rate=0.003")
    metrics = read_json(run_dir / "lineage.json")["stages"]["train"]["metrics"]
    assert metrics["resumed_from"] is None and len(metrics["curve"]) == 6


def test_a_stage_without_the_one_before_it_names_the_command(tiny_recipe):
    path = tiny_recipe()
    with pytest.raises(UserError) as caught:
        Pipeline(load_recipe(path)).run_stage("merge")
    assert "qlora train" in caught.value.problems[0].fix
    with pytest.raises(UserError) as caught:
        Pipeline(load_recipe(path)).run_stage("evaluate")
    assert [p.what.split(" of ")[1].split(",")[0] for p in caught.value.problems] == ["train", "merge", "quantize"]


def test_a_missed_gate_ends_with_3_and_keeps_the_artefacts(finished, capsys):
    path, run_dir, _ = finished
    for _ in range(2):  # also when nothing is left to do
        with pytest.raises(GateFailed) as caught:
            run(path, "evaluate.gates={merge_kl: 1.0e-12, kl: 1.0e-9}")
        assert {p.where for p in caught.value.problems} == {"evaluate.gates.kl", "evaluate.gates.merge_kl"}
    assert caught.value.exit_code == 3
    assert (run_dir / "gptq" / "model.safetensors").is_file()
    assert "The ladder" in capsys.readouterr().out
    assert "Do not ship it: 2 checks failed" in (run_dir / "report" / "index.html").read_text(encoding="utf-8")


def test_without_eval_rows_the_run_says_that_nothing_was_measured(tiny_recipe, capsys):
    run_dir = run(tiny_recipe(), "data.eval=null", "data.eval_share=0")
    assert (run_dir / "gptq/model.safetensors").is_file() and not (run_dir / "evaluation").exists()
    assert "nothing was measured" in capsys.readouterr().out


def test_without_eval_rows_a_share_of_the_training_rows_is_measured_and_not_trained_on(tiny_recipe, capsys):
    path = tiny_recipe()
    run_dir = run(path, "data.eval=null", "data.eval_share=0.3")
    data = read_json(run_dir / "lineage.json")["stages"]["train"]["metrics"]["data"]
    assert data["held_out"] > 0 and data["rows_read"] + data["held_out"] == len(load_recipe_rows(path))
    assert read_json(run_dir / "evaluation/ladder.json")["rows"] == data["held_out"]
    run(path, "data.eval=null", "data.eval_share=0.3")
    assert "train      up to date" in capsys.readouterr().out
    run(path, "data.eval=null", "data.eval_share=0")
    assert "train      runs again because data.eval_share changed" in capsys.readouterr().out


def load_recipe_rows(path: Path) -> list[object]:
    from qlora.data.formats import Examples
    from qlora.recipe_file import load_recipe

    return list(Examples(load_recipe(path).data.train[0]))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_gptq_checkpoint_as_base_is_what_its_codes_stand_for(
    finished, tiny_recipe, quantization, tmp_path, capsys, supported
):
    """The first rung of its ladder is the last of the one that made it; what is trained on it merges exactly."""
    _, whole, _ = finished
    cached = cache_dir() / "models"
    path = tiny_recipe(
        model={"base": str(whole / "gptq"), "quantization": quantization}, evaluate={"gates": {"merge_kl": 0.02}}
    )
    run(path)
    before, after = (
        {rung["name"]: rung for rung in read_json(each / "evaluation" / "ladder.json")["rungs"]}
        for each in (whole, tmp_path / "runs" / "tiny")
    )
    assert after["base"]["loss"] == pytest.approx(before["gptq"]["loss"], abs=1e-6)
    assert after["trained"]["loss"] < after["base"]["loss"]
    assert "base, GPTQ" in capsys.readouterr().out
    supported(tmp_path / "runs" / "tiny")
    (converted,) = [each for each in cached.glob("gptq-*") if each.is_dir()]
    config = read_json(converted / "config.json")
    assert "quantization_config" not in config and config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert not (converted / "quantize_config.json").exists()
    report = check(load_recipe(path))
    assert report.problems == [] and any("is a GPTQ checkpoint" in warning.what for warning in report.warnings)
    shutil.rmtree(converted)


def test_a_gptq_base_with_zeros_of_another_version_is_refused(finished, tiny_recipe, tmp_path):
    _, whole, _ = finished
    base = shutil.copytree(whole / "gptq", tmp_path / "v2")
    tensors = load_file(base / "model.safetensors")
    zeros = next(name for name in tensors if name.endswith("qzeros"))
    tensors[zeros] += 0x11111111
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="may hold v2 zeros"):
        run(tiny_recipe(model={"base": str(base)}))
    assert not list((cache_dir() / "models").glob("v2-*")), "a conversion that failed leaves nothing"


def test_recipe_in_the_run_directory_runs_as_it_is(finished):
    path, run_dir, _ = finished
    run(path)
    before = started(run_dir)
    run(run_dir / "recipe.yaml")
    assert started(run_dir) == before


def test_unknown_architecture_is_an_unexpected_failure_with_a_log(tiny_recipe, tiny_model, tmp_path):
    broken = tmp_path / "broken-model"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).symlink_to(file)
    (broken / "config.json").unlink()
    config = json.loads((tiny_model / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "two"}))
    result = command("train", tiny_recipe(model={"base": str(broken)}))
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "the log is" in result.stderr


def test_what_will_not_quantize_is_refused_before_anything_is_trained(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match="not divisible by the group size 128") as refused:
        run(tiny_recipe(), "quantize.group_size=128")
    assert "quantize.group_size" in str(refused.value)
    assert not (tmp_path / "runs" / "tiny" / "adapter").exists()


def test_refinement_that_does_not_fit_leaves_the_checkpoint_of_gptq_and_is_named(tiny_recipe, monkeypatch, capsys):
    import qlora.quantization.refine

    path = tiny_recipe()
    expected = load_file(run(path, "name=without") / "gptq" / "model.safetensors")

    def too_large(*_, **__) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(qlora.quantization.refine, "refine_checkpoint", too_large)
    run_dir = run(path, "quantize.refine.steps=2")
    found = load_file(run_dir / "gptq" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert "quantized: refinement was left out" in " ".join(capsys.readouterr().out.split())
