"""DPO, KTO and ORPO: TRL's losses on the tokens that everything else sees, from an adapter that changes nothing."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from qlora.artifacts import read_json
from qlora.check import check
from qlora.errors import UserError
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe
from qlora.stages import Run
from qlora.training.callbacks import MarkComplete
from qlora.training.preference import REFERENCE, build_trainer, longest_of

ANSWERS = ("copper", "granite", "linen", "cedar", "marble", "bronze", "velvet", "slate")


@pytest.fixture
def preference_recipe(tiny_recipe, tmp_path):
    """`preference_recipe(method, section={...})`: a recipe of rows whose answers are better or worse."""

    def rows_file(method: str, name: str, numbers: range):
        rows = []
        for number in numbers:
            prompt = [{"role": "user", "content": f"What is box {number} made of?"}]
            words = ANSWERS[number % 4], ANSWERS[4 + number % 4]
            better, worse = ([{"role": "assistant", "content": f"It is {word}."}] for word in words)
            if method == "kto":
                rows.append({"prompt": prompt, "completion": better, "label": True})
                rows.append({"prompt": prompt, "completion": worse, "label": False})
            else:
                rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
        path = tmp_path / f"{method}-{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path)}

    def write(method: str, **sections):
        data = {"train": [rows_file(method, "train", range(24))], "eval": rows_file(method, "eval", range(30, 38))}
        train = {"method": method, "max_steps": 18, "log_every": 1, "learning_rate": 0.01}
        return tiny_recipe(data=data, train=train | sections.pop("train", {}), **sections)

    return write


@pytest.fixture
def trainer_of(preference_recipe, tmp_path):
    def build(method: str, *overrides: str, **sections):
        run = Run(load_recipe(preference_recipe(method, **sections), overrides))
        trainer = build_trainer(
            run.recipe, run.base, run.tokenizer, run.train_rows.rows, run.eval_rows.rows,
            device="cpu", checkpoints=tmp_path / "checkpoints",
        )  # fmt: skip
        return trainer, run

    return build


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("method", "first"), [("dpo", math.log(2)), ("kto", 0.5), ("orpo", None)])
def test_what_is_better_is_learned(trainer_of, method, first):
    trainer, _ = trainer_of(method)
    trainer.train()
    found = losses(trainer)
    if first is not None:  # the adapter changes nothing yet, so nothing differs from what it is measured against
        assert found[0] == pytest.approx(first, abs=1e-3)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    assert REFERENCE not in trainer.model.peft_config


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_batches_are_the_rendered_rows(trainer_of, method):
    trainer, run = trainer_of(method)
    seen = set()
    for batch in trainer.get_train_dataloader():
        names = ("chosen_", "rejected_") if method == "orpo" else ("",)
        for name in names:
            for ids, mask in zip(batch[f"{name}input_ids"], batch[f"{name}attention_mask"], strict=True):
                seen.add(tuple(ids[mask.bool()].tolist()))
    expected = set()
    for row in run.train_rows.rows:
        expected.add(tuple(row.input_ids))
        if row.rejected_ids is not None:
            expected.add(tuple(row.input_ids[: row.prompt_length] + row.rejected_ids))
    assert seen == expected


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_memory_is_planned_for_the_positions_that_learn(trainer_of, method):
    """Forwards without gradients, such as those of references, keep nothing."""
    trainer, run = trainer_of(method, "train.batch_size=4")
    positions = []

    def look(module, args, kwargs):
        if torch.is_grad_enabled():
            positions.append(kwargs["input_ids"].numel())

    trainer.model.get_base_model().register_forward_pre_hook(look, with_kwargs=True)
    planned = trainer.args.per_device_train_batch_size * longest_of(method, run.train_rows.rows)
    for batch in trainer.get_train_dataloader():
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    assert 0.9 * planned <= max(positions) <= planned


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_a_run_goes_on_where_it_was_stopped_and_ends_the_same(preference_recipe, monkeypatch, method):
    adapters = {}
    plain = MarkComplete.on_save

    def stopping(self, args, state, control, **options):
        plain(self, args, state, control, **options)
        if state.global_step == 8:
            raise KeyboardInterrupt

    for name in ("whole", "parts"):
        recipe = load_recipe(preference_recipe(method, name=name))
        if name == "parts":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(MarkComplete, "on_save", stopping)
                Pipeline(recipe).run_stage("train")
        Pipeline(recipe).run_stage("train")
        adapters[name] = load_file(recipe.run_dir / "adapter" / "adapter_model.safetensors")
        metrics = read_json(recipe.run_dir / "lineage.json")["stages"]["train"]["metrics"]
        assert metrics["resumed_from"] == ("checkpoint-8" if name == "parts" else None)
    assert adapters["whole"].keys() == adapters["parts"].keys()
    for key, tensor in adapters["whole"].items():
        assert torch.equal(adapters["parts"][key], tensor), key


def test_going_on_from_an_adapter_measures_against_that_adapter(trainer_of, preference_recipe, tmp_path):
    first = load_recipe(preference_recipe("dpo", name="first", train={"max_steps": 4}))
    Pipeline(first).run_stage("train")
    start = first.run_dir / "adapter"
    trainer, run = trainer_of("dpo", lora={"start_from": str(start)})
    assert REFERENCE in trainer.model.peft_config
    parameters = dict(trainer.model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            assert torch.equal(parameter, parameters[name.replace(".default.", f".{REFERENCE}.")])
            assert parameter.dtype == torch.float32 and parameter.requires_grad
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-3)
    again = load_recipe(preference_recipe("dpo", name="again", lora={"start_from": str(start)}))
    Pipeline(again).run_stage("train")
    assert not (again.run_dir / "adapter" / REFERENCE).exists()
    assert set(load_file(again.run_dir / "adapter" / "adapter_model.safetensors")) == set(
        load_file(start / "adapter_model.safetensors")
    )


@pytest.mark.parametrize(
    ("method", "rows", "message"),
    [
        ("dpo", "kto", "there is no second answer"),
        ("orpo", "kto", "there is no second answer"),
        ("kto", "dpo", "nothing says whether the answer is a good one"),
        ("sft", "kto", "train.method: kto learns from that"),
    ],
)
def test_rows_that_a_method_cannot_learn_from_are_refused(preference_recipe, method, rows, message):
    path = preference_recipe(rows)
    with pytest.raises(UserError, match=message):
        Run(load_recipe(path, (f"train.method={method}",))).train_rows  # noqa: B018


def test_settings_of_the_method_reach_trl(trainer_of):
    trainer, _ = trainer_of("dpo", "train.args={beta: 0.4, loss_type: [ipo]}")
    assert trainer.beta == 0.4 and trainer.loss_types == ["ipo"]
    with pytest.raises(UserError, match="TRL's KTOConfig has no field label_smooth"):
        trainer_of("kto", "train.args={label_smooth: 0.1}")


def test_settings_that_another_method_would_not_follow_are_refused(trainer_of):
    with pytest.raises(UserError, match="micro_batch_tokens, neftune_alpha: for method sft alone"):
        trainer_of("dpo", "train.micro_batch_tokens=100", "train.neftune_alpha=5")


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_the_whole_run(preference_recipe, method, supported):
    """Trained, merged, quantized and measured: better answers have become likelier, in every model after training."""
    path = preference_recipe(method, train={"max_steps": 30})
    report = check(load_recipe(path))
    assert not report.problems and report.stages
    recipe = load_recipe(path, ("evaluate.gates.preferred=0.9",))
    Pipeline(recipe).run()
    rungs = {rung["name"]: rung for rung in read_json(recipe.run_dir / "evaluation" / "ladder.json")["rungs"]}
    assert rungs["base"]["preferred"] is None and rungs["nf4"]["preferred"] is None
    for name in ("trained", "merged", "gptq"):
        assert rungs[name]["preferred"] > 0.9 and rungs[name]["margin"] > 1
    assert rungs["merged"]["margin"] == pytest.approx(rungs["trained"]["margin"], rel=0.05)
    supported(recipe.run_dir)
