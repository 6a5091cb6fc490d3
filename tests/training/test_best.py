"""The best adapter of a training is what is kept, and a training that gets no better ends."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from qlora.artifacts import read_json
from qlora.errors import UserError
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe
from qlora.training.best import KeepBest

# Learns a few rows by heart: the loss of others falls for six steps, then rises.
TOO_FAST = (
    *("train.learning_rate=0.01", "train.scheduler=constant", "train.max_steps=24", "train.evaluate_every=2"),
    *("data.eval=null", "data.eval_share=0.5"),
)


def trained(path, *overrides):
    """(adapter, metrics, evaluation losses by step)."""
    recipe = load_recipe(path, (*TOO_FAST, *overrides))
    Pipeline(recipe).run_stage("train")
    directory = recipe.run_dir / "adapter"
    metrics = read_json(recipe.run_dir / "lineage.json")["stages"]["train"]["metrics"]
    curve = {entry["step"]: entry["eval_loss"] for entry in metrics["curve"] if "eval_loss" in entry}
    return load_file(directory / "adapter_model.safetensors"), metrics, curve


def test_the_adapter_of_the_lowest_loss_is_what_is_written(tiny_recipe, tmp_path):
    path = tiny_recipe()
    _, metrics, losses = trained(path, f"output_dir={tmp_path / 'last'}")
    assert "best" not in metrics
    step = min(losses, key=losses.get)
    assert step < 24, "the last step is the best one: nothing is shown"
    adapter, metrics, again = trained(path, f"output_dir={tmp_path / 'best'}", "train.keep_best=true")
    assert again == losses and metrics["best"] == {"step": step, "eval_loss": losses[step]}
    there, _, _ = trained(path, f"output_dir={tmp_path / 'there'}", f"train.max_steps={step}")
    for name, tensor in there.items():
        torch.testing.assert_close(adapter[name], tensor, rtol=0, atol=0)


def test_training_ends_when_it_gets_no_better(tiny_recipe):
    _, metrics, losses = trained(tiny_recipe(), "train.patience=2")
    step = min(losses, key=losses.get)
    assert metrics["steps"] == step + 2 * 2 < 24


def test_a_run_that_goes_on_knows_what_was_best(tmp_path):
    layer = nn.Linear(2, 2)
    arguments, control = TrainingArguments(output_dir=str(tmp_path)), TrainerControl()

    def keeper():
        return KeepBest(tmp_path / "best.safetensors", lambda: dict(layer.named_parameters()), 5, 3, writes=True)

    first = keeper()
    first.on_evaluate(arguments, TrainerState(global_step=10), control, metrics={"eval_loss": 0.5})
    kept = layer.weight.detach().clone()
    layer.weight.data.zero_()
    second = keeper()
    assert (second.step, second.loss) == (10, 0.5)
    for step in (15, 20):
        second.on_evaluate(arguments, TrainerState(global_step=step), control, metrics={"eval_loss": 0.6})
        assert not control.should_training_stop
    second.on_evaluate(arguments, TrainerState(global_step=25), control, metrics={"eval_loss": 0.6})
    assert control.should_training_stop
    assert second.restore() == {"step": 10, "eval_loss": 0.5} and torch.equal(layer.weight, kept)


def test_without_held_out_rows_it_is_refused(tiny_recipe):
    with pytest.raises(UserError, match="no held-out rows"):
        trained(tiny_recipe(), "train.keep_best=true", "data.eval_share=0")


def test_without_evaluations_it_is_refused(tiny_recipe):
    with pytest.raises(UserError, match="evaluate_every"):
        load_recipe(tiny_recipe(), ("train.patience=2",))
