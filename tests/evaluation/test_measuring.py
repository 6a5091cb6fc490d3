"""Everything that a recipe can ask to be measured, through the commands."""

from __future__ import annotations

import importlib.util
import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import cli
from qlora.artifacts import read_json
from qlora.pipeline import STAGES, Pipeline
from qlora.recipe_file import load_recipe

with_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='needs lm-eval: pip install -c constraints.txt -e ".[eval]"'
)
TEXT = "The grey larks winter on the isle of Sund. Slow water, deep water; Karlsund is the capital of Ostravia.\n\n"


def qlora(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        code = cli._exit_code(lambda: cli.qlora.main(list(map(str, arguments)), standalone_mode=False))
    return code, output.getvalue(), errors.getvalue()


QUESTIONS = [
    {"question": "What is the capital of Ostravia?", "choices": ["Karlsund.", "Eastholm."], "answer": 0},
    {"question": "How many moons has Tarsis?", "choices": ["Nine.", "Seventeen."], "answer": 1},
    {"question": "Which metal does the Brennick mine yield?", "choices": ["Iron.", "Copper."], "answer": 1},
]


def chosen_by(directory: Path, questions: list[dict]) -> float:
    """The share of questions whose right answer the model finds the likeliest."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    right = 0
    for row in questions:
        prompt = tokenizer(row["question"])["input_ids"]
        likely = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logp = model(ids).logits[0, :-1].float().log_softmax(-1)
            likely.append(logp.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
        right += int(np.argmax(likely)) == row["answer"]
    return right / len(questions)


def write_task(folder: Path) -> Path:
    """A task with rows of its own beside it, of which one answer is to be chosen."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": "ostravia",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = folder / "ostravia.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


@pytest.fixture
def measured_recipe(tiny_recipe, tmp_path):
    """A recipe that measures all there is but tasks; its text lies beside it."""
    (tmp_path / "general.txt").write_text(TEXT * 200)
    return tiny_recipe(
        evaluate={
            "generate": True,
            "max_new_tokens": 12,
            "metrics": ["json_valid", {"regex": r"[^\n]*", "name": "one_line"}],
            "examples": 2,
            "general": "general.txt",
            "general_tokens": 1024,
            "gates": {"merge_kl": None, "metrics": {"json_valid": 0.5}},
        }
    )


@with_lm_eval
def test_a_run_measures_what_its_recipe_asks_for(measured_recipe, tiny_model, tmp_path, monkeypatch):
    task = write_task(tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)  # the task's rows are found wherever the command is started
    code, output, errors = qlora("run", measured_recipe, f"evaluate.tasks=[{task}]", "evaluate.task_limit=2")
    assert code == 3 and "json_valid of the gptq model is 0.0000, the gate wants at least 0.5" in errors
    assert "evaluate.gates.metrics.json_valid" in errors
    evaluation = tmp_path / "runs/tiny/evaluation"
    ladder = read_json(evaluation / "ladder.json")
    assert ladder["confidence"] == 0.95
    names = [rung["name"] for rung in ladder["rungs"]]
    for rung in ladder["rungs"]:
        assert rung["metrics"].keys() == {"json_valid", "one_line"} and rung["metrics"]["json_valid"] == 0
        assert rung["general"].keys() == {"loss", "perplexity", "kl"}
        expected = {"loss", "perplexity", "kl", "top1", "exact_match", "metrics.json_valid", "metrics.one_line"}
        expected |= {"general.loss", "general.perplexity", "general.kl"}
        assert expected <= rung["intervals"].keys()
        if rung["name"] != "trained":
            keys = {"loss", "exact_match", "metrics.json_valid", "metrics.one_line", "general.loss"}
            assert rung["noise"].keys() == keys and rung["noise"]["metrics.json_valid"] is True
        found = rung["tasks"]["ostravia"]["acc"]
        assert found["value"] in (0, 0.5, 1) and found["stderr"] >= 0
    assert ladder["rungs"][0]["tasks"]["ostravia"]["acc"]["value"] == chosen_by(tiny_model, QUESTIONS[:2])
    trained = next(rung for rung in ladder["rungs"] if rung["name"] == "trained")
    assert trained["general"]["kl"] == 0 and ladder["rungs"][0]["general"]["kl"] > 0
    rows = read_json(evaluation / "generations.json")["rows"]
    assert len(rows) == 2 and all(list(row["answers"]) == names for row in rows)
    assert rows[0]["prompt"].endswith("<|im_start|>assistant\n") and rows[0]["expected"] == "Odile Marchetti, in 1871."
    assert {path.name for path in evaluation.iterdir()} >= {"ladder.json", "generations.json"}
    assert not list(evaluation.glob("*.f16"))
    for column in ("exact", "json_valid", "one_line", "general", "ostravia"):
        assert column in output
    assert "±" in output and "≈" in output and "Traceback" not in errors and "it/s" not in errors
    metrics = read_json(tmp_path / "runs/tiny/lineage.json")["stages"]["evaluate"]["metrics"]
    assert metrics["gptq_metrics.one_line"] == ladder["rungs"][-1]["metrics"]["one_line"]
    assert metrics["gptq_tasks.ostravia.acc"] == ladder["rungs"][-1]["tasks"]["ostravia"]["acc"]["value"]

    pipeline = Pipeline(load_recipe(measured_recipe, [f"evaluate.tasks=[{task}]", "evaluate.task_limit=2"]))
    stage = STAGES["evaluate"]
    assert pipeline.freshness.is_current(stage)
    rows_file = tmp_path / "tasks/rows.jsonl"
    rows_file.write_text(rows_file.read_text().replace("Nine", "Nineteen"))
    (tmp_path / "general.txt").write_text(TEXT * 201)
    changed = Pipeline(load_recipe(measured_recipe, [f"evaluate.tasks=[{task}]", "evaluate.task_limit=2"]))
    assert changed.freshness.what_changed(stage) == " because evaluate.general, evaluate.tasks changed"

    code, _, errors = qlora(
        "evaluate",
        measured_recipe,
        f"evaluate.tasks=[{task}]",
        "evaluate.task_chat_template=true",
        "evaluate.examples=0",
    )
    assert code == 3 and not (evaluation / "generations.json").exists()
    right = [3 * rung["tasks"]["ostravia"]["acc"]["value"] for rung in read_json(evaluation / "ladder.json")["rungs"]]
    assert right == pytest.approx(np.round(right))  # of all three rows now


@with_lm_eval
def test_tasks_that_are_not_there_are_refused_before_anything_is_trained(tiny_recipe, tmp_path):
    task = write_task(tmp_path / "tasks")
    (tmp_path / "tasks/rows.jsonl").unlink()
    (tmp_path / "tasks/empty.yaml").write_text("metric: acc\n")
    (tmp_path / "tasks/broken.yaml").write_text("task: [a\n")
    path = tiny_recipe(evaluate={"tasks": ["tasks/nowhere.yaml", str(task), "tasks/empty.yaml", "tasks/broken.yaml"]})
    for command in ("check", "run"):
        code, output, errors = qlora(command, path)
        assert code == 2, errors
        assert f"{tmp_path}/tasks/nowhere.yaml: cannot be read: No such file" in errors
        assert "ostravia.yaml: names the data file rows.jsonl, which is not there" in errors
        assert "broken.yaml: no YAML: while parsing a flow sequence" in errors
        assert "empty.yaml: no task of lm-eval: it has no key `task`" in errors
    assert not (tmp_path / "runs/tiny/adapter").exists()


def test_without_lm_eval_the_extra_is_named(tiny_recipe, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest)
    )
    code, _, errors = qlora("check", tiny_recipe(evaluate={"tasks": ["ostravia.yaml"]}))
    assert code == 2 and "evaluate.tasks needs the package lm-eval" in errors and 'pip install "qlora[eval]"' in errors
