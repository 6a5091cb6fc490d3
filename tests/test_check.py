"""`qlora check` on a tiny model directory: a good recipe, every kind of problem at once, and what does not fit."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from qlora.check import CheckReport, check
from qlora.errors import UserError, WillNotFit
from qlora.models.evaluate_estimates import LAYER_STEP_SECONDS
from qlora.recipe import Recipe
from qlora.reporting.preflight import show

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and byte-level tokenizer of a two-layer Llama. Its weights are no safetensors: nothing may read them."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|end|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(fast), architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    (folder / "model.safetensors").write_bytes(b"not weights")
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, first, count in (("train", 0, 12), ("eval", 100, 4)):
        turns = [(f"What is {i}?", f"It is {i}.") for i in range(first, first + count)]
        rows = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
            for asked, answer in turns
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make(model_dir: Path, data_dir: Path, tmp_path: Path):
    def make_recipe(**sections: dict[str, Any]) -> Recipe:
        tree: dict[str, Any] = {
            "name": "tiny",
            "output_dir": str(tmp_path / "runs"),
            "device": "cpu",
            "model": {"base": str(model_dir)},
            "data": {
                "train": [{"path": str(data_dir / "train.jsonl")}],
                "eval": {"path": str(data_dir / "eval.jsonl")},
            },
            "train": {"batch_size": 4, "micro_batch_tokens": 64, "epochs": 2},
            "quantize": {"group_size": 32, "refine": None},
        }
        for name, values in sections.items():
            tree[name] = tree.get(name, {}) | values
        return Recipe.model_validate(tree)

    return make_recipe


def printed(report: CheckReport) -> str:
    text = io.StringIO()
    show(report, Console(file=text, width=200))
    report.raise_for_problems()
    return text.getvalue()


def test_a_good_recipe_is_described_without_reading_its_weights(make, tmp_path: Path) -> None:
    report = check(make())
    assert report.problems == [] and report.shortfalls == []
    assert report.base is not None and report.base.architecture == "LlamaForCausalLM"
    assert report.base.weight_bytes == len(b"not weights")
    assert report.base.adapter_parameters == 16 * 2 * sum((128, 96, 96, 128, 256, 256, 256))
    assert [(split.name, split.rows) for split in report.splits] == [("train", 12), ("eval", 4)]
    assert (report.steps, report.rows_per_step) == (6, 4)
    assert report.seen_tokens == 2 * report.splits[0].tokens, "two epochs of three steps each"
    assert [stage.stage for stage in report.stages] == ["train", "merge", "quantize", "evaluate"]
    assert all(stage.host > 0 and stage.disk > 0 and stage.seconds for stage in report.stages)
    learned = ["".join(segment.text for segment in row if segment.supervised) for _, row in report.examples]
    assert [number for number, _ in report.examples] == [1, 7, 12]
    assert learned == [f"It is {number}.<|im_end|>" for number in (0, 6, 11)]
    assert all(sum(split.histogram) == split.rows for split in report.splits)
    assert not (tmp_path / "runs").exists(), "a check writes nothing"
    json.dumps(report.to_dict())

    text = printed(report)
    for expected in (
        "⟦It is 0.<|im_end|>⟧",
        "quantize",
        "vLLM",
        f"Training sees {report.seen_tokens:,} tokens in all and learns from about",
        "Estimates, not measurements",
        "Nothing stands in the way",
    ):
        assert expected in text


def test_all_problems_come_at_once_with_exit_code_2(make, data_dir: Path) -> None:
    report = check(
        make(
            quantize={"group_size": 128},
            train={"batch_size": 3, "processes": 4, "args": {"no_such_field": 1}},
            lora={"target_modules": ["no_such_layer"]},
            data={"eval": {"path": str(data_dir / "evil.jsonl")}},
        )
    )
    with pytest.raises(UserError) as raised:
        printed(report)
    assert raised.value.exit_code == 2
    text = str(raised.value)
    for expected in (
        "not divisible by the group size 128",
        "choose quantize.group_size from 64, 32, -1",
        "no_such_field",
        "no_such_layer",
        "batch_size",
        "eval.jsonl",
    ):
        assert expected in text, text


def test_a_base_that_one_process_would_share_is_refused(make) -> None:
    alone, shared = (check(make(train={"batch_size": 4, "processes": count, "shard": True})) for count in (1, 2))
    assert [problem.where for problem in alone.problems] == ["train.shard"] and not shared.problems
    assert shared.training is not None and "the base shared by 2 processes" in shared.training


def test_what_does_not_fit_ends_with_exit_code_4(make, monkeypatch) -> None:
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=10**6))
    report = check(make())
    with pytest.raises(WillNotFit) as raised:
        printed(report)
    assert raised.value.exit_code == 4
    assert "train needs about" in str(raised.value) and "train.micro_batch_tokens" in str(raised.value)


def test_a_missing_base_does_not_hide_problems_of_the_data(make, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    train = [{"path": str(tmp_path / "bad.jsonl")}]
    report = check(make(model={"base": str(tmp_path / "nowhere")}, data={"train": train}))
    base, rows = report.problems
    assert base.what == "this base model does not exist"
    assert "not valid JSON" in rows.what and rows.where.endswith("bad.jsonl:1")
    with pytest.raises(UserError):
        printed(report)


def test_a_base_that_is_quantized_in_a_way_that_is_not_read_is_refused(make, model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    problems = check(make(model={"base": str(tmp_path)})).problems
    assert ["quantized already (fp8)" in problem.what for problem in problems] == [True]


def test_a_missing_extra_is_named(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    problems = check(make(model={"base": str(tmp_path / "model.gguf")})).problems
    assert problems[0].fix == 'pip install "qlora[gguf]"'


def test_rows_that_teach_nothing_are_problems(make) -> None:
    problems = check(make(data={"max_length": 8})).problems
    assert any("no token carries loss" in problem.what for problem in problems)


def test_tools_that_a_template_leaves_out_are_problems_and_one_that_knows_them_shows_them(make, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        {"role": "user", "content": "What is 2 and 0?"},
        {"role": "assistant", "content": "I add.", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"messages": messages, "tools": [{"name": "add"}]}) + "\n")
    data = {"train": [{"path": str(path), "weight": 4}], "loss_on": "assistant"}
    (problem,) = check(make(data=data)).problems
    assert "the chat template leaves the tools out" in problem.what and problem.where == f"{path}:1"
    report = check(make(data=data | {"chat_template": "qwen-3", "max_length": 4096}))
    assert report.problems == [] and report.splits[0].rows == 8, "a row for every answer, each behind its own prompt"
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>' in printed(report)


def test_a_merge_without_weights_needs_no_disk(make) -> None:
    written, direct = (
        {stage.stage: stage for stage in check(make(merge={"write": write})).stages} for write in (True, False)
    )
    assert written["merge"].disk > 0 and direct["merge"].disk == 0
    assert direct["quantize"].disk == written["quantize"].disk
    assert direct["quantize"].seconds > written["quantize"].seconds, "it merges on the way"


def test_a_recipe_without_held_out_rows_is_noted(make) -> None:
    report = check(make(data={"eval": None, "eval_share": 0}))
    assert report.problems == []
    assert any("nothing will be measured" in warning.what for warning in report.warnings)


def test_rules_for_modules_are_held_against_the_model(make) -> None:
    report = check(make(quantize={"modules": {"down_proj": {"bits": 8}}, "skip": [r"layers\.1\.self_attn"]}))
    assert report.problems == []
    gpus = {verdict.engine for verdict in report.engines if verdict.accepts}
    assert "vLLM" in gpus and "transformers + gptqmodel" not in gpus
    problems = check(make(quantize={"modules": {"q_proj": {"bits": 8}}, "skip": ["lm_head"]})).problems
    assert ["no module that is quantized" in problems[0].what, "as one module" in problems[1].what] == [True, True]


def test_the_calibration_mix_is_shown_in_tokens(make, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("The river bends twice before it meets the sea.\n\n" * 40)
    mix = {"from": str(tmp_path / "general.txt"), "share": 0.25}
    report = check(make(quantize={"calibration": {"samples": 8, "max_length": 32, "mix": mix}}))
    train, general = report.calibration
    assert (train.source, train.rows, general.source) == ("train", 8, mix["from"])
    assert general.tokens == general.rows * 32
    assert general.tokens / (train.tokens + general.tokens) == pytest.approx(0.25, abs=0.05)
    assert f"8 rows of train, {train.tokens / (train.tokens + general.tokens):.1%} of the tokens" in printed(report)


def test_too_few_calibration_tokens_are_a_warning_before_any_work(make) -> None:
    def starved(**quantize: Any) -> list[str]:
        return [w.what for w in check(make(quantize=quantize)).warnings if w.where == "quantize.calibration"]

    assert starved(calibration={"samples": 12}) == []
    (what,) = starved(calibration={"from": ["a few words of text"]})
    assert what == (
        "14 of 14 modules will see fewer calibration tokens than they have inputs "
        "(model.layers.0.mlp.down_proj: about 19 for 192)"
    )
    (what,) = starved(calibration={"samples": 12}, prompt_weight=0)
    assert what.startswith("2 of 14"), "answers alone, of 10 or 11 tokens"


def test_refinement_has_a_row_of_its_own(make) -> None:
    report = check(make(quantize={"refine": {"steps": 5, "samples": 3}}))
    assert [stage.stage for stage in report.stages] == ["train", "merge", "quantize", "refine", "evaluate"]
    more = check(make(quantize={"refine": {"steps": 10, "samples": 3}}))
    seconds = [next(stage.seconds for stage in found.stages if stage.stage == "refine") for found in (report, more)]
    assert seconds[1] > 1.5 * seconds[0]
    assert "\nrefine " in printed(report)
    assert all(stage.disk == 0 for stage in report.stages if stage.stage == "refine")


def test_answers_of_the_held_out_rows_and_golden_prompts_are_in_the_time_of_evaluation(make) -> None:
    def seconds(**evaluate: Any) -> float:
        return check(make(evaluate=evaluate)).stages[-1].seconds

    alone = seconds(golden=0)
    golden = seconds() - alone
    step = 2 * LAYER_STEP_SECONDS  # of both layers
    answer = 10  # tokens of the longest, with its end
    assert golden > 2 * answer * step
    answers = seconds(golden=0, generate=True, max_new_tokens=50) - alone
    assert answers > (2 * 50 + 3 * answer) * step
    assert seconds(golden=0, generate=True, max_new_tokens=5) - alone < answers / 3


def test_engines_that_fail_with_the_architecture_are_named(make, model_dir: Path, tmp_path: Path) -> None:
    for file in model_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    report = check(make(model={"base": str(tmp_path)}))
    assert report.problems == []
    assert "cannot load GPT-2" in printed(report)


def test_rules_that_cannot_be_followed_are_named_once(make) -> None:
    problems = check(make(quantize={"skip": ["layers"]})).problems
    assert [problem.what for problem in problems] == ["every module is skipped"]


def test_another_engine_is_looked_at_before_it_runs(make, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gptqmodel" else find(name))
    awq = check(make(quantize={"engine": "gptqmodel", "method": "awq", "sym": False, "damp": 0.05}))
    linear = "model.layers.0.self_attn.k_proj"  # two heads of 16 outputs
    assert [problem.where for problem in awq.problems] == [linear, "quantize.damp", "quantize.engine"]
    awq = check(make(quantize={"engine": "gptqmodel", "method": "awq", "sym": False}))
    assert "ExLlamaV2" not in {verdict.engine for verdict in awq.engines}
    assert any("no counterpart for act_order" in warning.what for warning in awq.warnings)


def test_general_text_that_cannot_be_had_is_a_problem_before_it_is_needed(make) -> None:
    (problem,) = check(make(quantize={"calibration": {"from": "wikitext2"}})).problems
    assert problem.where.startswith("hub data set Salesforce/wikitext") and "name a text file instead" in problem.fix
