"""Training: gradients survive evaluations, labels are what was rendered, packing changes nothing."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from qlora.artifacts import read_json
from qlora.errors import UserError, WillNotFit
from qlora.evaluation.generation import generate
from qlora.models.loading import load_base
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe
from qlora.stages import Run
from qlora.training import plan, sft
from qlora.training.plan import rows_per_step
from qlora.training.sft import build_trainer

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


@pytest.fixture
def trainer_of(tiny_recipe, tmp_path):
    """`trainer_of(*overrides)`: the trainer that a recipe builds, and its run."""

    def build(*overrides: str, device: str = "cpu"):
        run = Run(load_recipe(tiny_recipe(device=device), overrides))
        trainer = build_trainer(
            run.recipe,
            run.base,
            run.tokenizer,
            run.train_rows.rows,
            run.eval_rows.rows,
            device="cuda:0" if device == "cuda" else device,
            checkpoints=tmp_path / "checkpoints",
        )
        return trainer, run

    return build


def gradients(trainer) -> dict[str, torch.Tensor]:
    """Gradients of one fixed batch, in training mode."""
    trainer.model.train()
    trainer.model.zero_grad()
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as the trainer runs it
        trainer.compute_loss(trainer.model, batch).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def randomize_adapter(model) -> None:
    """B starts at zero; random values make every gradient count."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)


def test_evaluation_leaves_the_gradients_what_they_were(trainer_of):
    """bitsandbytes repacks 4-bit weights on the first CPU inference and then trains wrongly (disable_cpu_repacking)."""
    trainer, run = trainer_of("train.evaluate_every=1")
    randomize_adapter(trainer.model)
    before = gradients(trainer)
    assert all(gradient.abs().max() > 0 for gradient in before.values())
    trainer.evaluate()
    trainer.model.eval()
    generate(trainer.model, run.eval_rows.rows, run.tokenizer, batch_size=2, max_new_tokens=4)
    after = gradients(trainer)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=0, atol=0)


def test_only_the_adapter_trains_and_nothing_is_upcast(trainer_of):
    trainer, _ = trainer_of()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_" in name:
            assert parameter.dtype == torch.float32
        else:
            assert parameter.dtype in (torch.bfloat16, torch.uint8), name
    assert trainer.model.config.use_cache is False
    layers = trainer.model.get_base_model().model.layers
    assert not trainer.args.gradient_checkpointing and not any(layer.gradient_checkpointing for layer in layers)
    again, _ = trainer_of("train.gradient_checkpointing=true")
    assert all(layer.gradient_checkpointing for layer in again.model.get_base_model().model.layers)


def test_the_batch_holds_the_rendered_labels_and_teaches_the_end_of_turn(trainer_of):
    trainer, run = trainer_of("train.evaluate_every=1")
    batch = next(iter(trainer.get_eval_dataloader()))
    rendered = {tuple(row.input_ids): row.labels for row in run.eval_rows.rows}
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        assert rendered[tuple(ids[:length].tolist())] == labels[:length].tolist()
        assert labels[length - 1] == run.tokenizer.eos_token_id  # although it is the pad token too
        assert (labels[length:] == -100).all()


def epoch_of(trainer) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    """Loss and gradients summed over the forwards of an epoch, and the tokens of each forward."""
    randomize_adapter(trainer.model)
    trainer.model.train()
    trainer.model.zero_grad()
    loss, tokens = 0.0, []
    for batch in trainer.get_train_dataloader():
        batch.pop("rows")
        part = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(100))
        part.backward()
        loss += part.item()
        tokens.append(batch["input_ids"].numel())
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}, tokens


@pytest.mark.parametrize("forward_tokens", [1, 60, 10**6])
def test_packed_rows_and_the_fused_head_learn_what_the_plain_path_learns(trainer_of, forward_tokens):
    """fp32, so that only leaks between rows and forgotten tokens could differ."""
    fp32 = ("model.compute_dtype=float32", "train.batch_size=8")
    plain, run = trainer_of(*fp32, "train.kernels=plain")
    fast, _ = trainer_of(*fp32, f"train.micro_batch_tokens={forward_tokens}")
    assert (plain.packed, plain.own_head, fast.packed, fast.own_head) == (False, False, True, True)
    loss, grads, tokens = epoch_of(plain)
    fast_loss, fast_grads, fast_tokens = epoch_of(fast)
    assert sum(fast_tokens) == sum(len(row.input_ids) for row in run.train_rows.rows) < sum(tokens)
    assert (len(fast_tokens) == len(run.train_rows.rows)) == (forward_tokens == 1)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in grads.items():
        torch.testing.assert_close(fast_grads[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("accumulated", [False, True])
def test_when_memory_runs_out_forwards_get_shorter_and_gradients_stay_the_same(trainer_of, monkeypatch, accumulated):
    trainer, _ = trainer_of("model.compute_dtype=float32", "train.micro_batch_tokens=1000000")
    randomize_adapter(trainer.model)
    count, loops = torch.tensor(100), 1 + accumulated
    batches = [dict(next(iter(trainer.get_train_dataloader()))) for _ in range(2 * loops)]
    tokens = batches[0]["input_ids"].numel()

    def learned() -> tuple[float, list[torch.Tensor]]:
        trainer.model.zero_grad()
        loss = sum(trainer.training_step(trainer.model, batches.pop(), count).item() for _ in range(loops))
        return loss, [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]

    loss, gradients = learned()
    compute_loss = trainer.compute_loss

    def runs_out(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        if inputs["input_ids"].numel() > tokens / 3:
            loss.backward(retain_graph=True)  # as if in the middle of the backward
            raise torch.OutOfMemoryError("no more")
        return loss

    monkeypatch.setattr(trainer, "compute_loss", runs_out)
    found, same = learned()
    assert found == pytest.approx(loss, rel=1e-5)
    assert trainer.most_tokens <= tokens / 2
    for gradient, expected in zip(same, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def plan_to_be(monkeypatch, *, recorded):
    """Whatever the plan says of recording."""
    plan_training = plan.plan_training
    monkeypatch.setattr(sft, "plan_training", lambda *a, **k: replace(plan_training(*a, **k), recorded=recorded))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("forwards", [1, 2])
def test_recorded_passes_train_the_same_adapter(trainer_of, monkeypatch, device, forwards):
    """Batches are filled up and, on a GPU, replayed; the CPU runs what would be recorded."""
    found = []
    for recorded in (False, True):
        plan_to_be(monkeypatch, recorded=recorded)
        tokens = 10**6 if forwards == 1 else 60
        options = ("model.compute_dtype=float32", "train.max_steps=12", "train.log_every=1", "train.batch_size=4")
        torch.manual_seed(0)
        trainer, _ = trainer_of(*options, f"train.micro_batch_tokens={tokens}", device=device)
        assert (trainer.room is not None) == recorded and trainer.plan.schedule.forwards >= forwards
        trainer.train()
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        adapter = [p.detach().float().cpu() for p in trainer.model.parameters() if p.requires_grad]
        found.append((losses, adapter))
    (losses, adapter), (same, others) = found
    assert len(losses) == 12
    torch.testing.assert_close(same, losses, rtol=1e-3, atol=1e-3)
    moved = torch.cat([each.flatten() for each in adapter]).norm()
    apart = torch.cat([(one - other).flatten() for one, other in zip(adapter, others, strict=True)]).norm()
    assert apart < 0.02 * moved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("recorded", [False, True])
def test_steps_wait_for_nothing(trainer_of, monkeypatch, recorded):
    """Between two log lines the host is ahead of the GPU: whatever waits for it raises."""
    plan_to_be(monkeypatch, recorded=recorded)
    options = ("train.max_steps=12", "train.log_every=100", "train.checkpoint_every=100", "train.batch_size=4")
    trainer, _ = trainer_of(*options, device="cuda")

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 9:  # kernels are built, sizes recorded
                torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 11:
                torch.cuda.set_sync_debug_mode("default")

    trainer.add_callback(Watch())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 12


def test_a_row_that_memory_cannot_hold_is_named(trainer_of, monkeypatch):
    trainer, _ = trainer_of()

    def runs_out(*args, **kwargs):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(trainer, "compute_loss", runs_out)
    with pytest.raises(WillNotFit, match="memory ran out in a forward of"):
        trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())), torch.tensor(1))


def test_rows_come_in_another_order_every_epoch_and_all_of_them(trainer_of):
    trainer, run = trainer_of("train.max_steps=6", "train.batch_size=4")
    collate, seen = trainer._collate, []
    trainer._collate = lambda rows: seen.append(rows) or collate(rows)
    trainer.train()
    epochs = [[row for rows in seen[start : start + 2] for row in rows] for start in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(len(run.train_rows.rows))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_what_trl_computes_differently_is_left_to_it(trainer_of):
    trainer, _ = trainer_of("train.args={loss_type: dft}")
    assert trainer.packed and not trainer.own_head
    assert "targets" not in next(iter(trainer.get_train_dataloader()))


def test_a_process_without_rows_runs_a_token_and_learns_nothing(trainer_of):
    trainer, _ = trainer_of()
    batch = trainer._collate([])
    assert batch.pop("rows") == []
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(10))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in trainer.model.parameters() if p.requires_grad)


def test_rows_of_a_step_follow_from_the_recipe(tiny_recipe):
    def rows(*overrides: str, processes: int = 1):
        return rows_per_step(load_recipe(tiny_recipe(), overrides), [10, 20, 30], processes)

    assert rows("train.batch_size=10", processes=4) == 10
    assert rows("train.batch_size=null", "train.tokens_per_step=400") == 20
    assert rows("train.batch_size=null", "train.tokens_per_step=1", processes=2) == 2
    with pytest.raises(UserError, match="without a row"):
        rows("train.batch_size=2", processes=3)


def test_unknown_train_args_are_refused(trainer_of):
    with pytest.raises(UserError, match="no field neftune_nose"):
        trainer_of("train.args={neftune_nose: 5}")


def test_products_in_8_bits_are_refused_where_there_are_none(trainer_of):
    with pytest.raises(UserError, match="cpu has no matrix units for 8 bits"):
        trainer_of("model.compute_dtype=float8", "device=cpu")


def test_target_modules_that_match_nothing_are_refused(trainer_of):
    with pytest.raises(UserError, match="(?i)target modules"):
        trainer_of("lora.target_modules=[nothing]")


def test_quantized_base_is_as_bitsandbytes_makes_it(tiny_recipe):
    from bitsandbytes.nn import Linear4bit

    run = Run(load_recipe(tiny_recipe()))
    model = load_base(run.base.directory, run.recipe.model, "cpu", quantized=True)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert all(layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers)
    assert all(layer.compute_dtype == torch.bfloat16 for layer in layers)


def test_a_profile_is_a_trace_and_a_table(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe(output_dir=str(tmp_path)), ("train.profile=true", "train.max_steps=2"))
    Pipeline(recipe).run_stage("train")
    directory = tmp_path / "tiny" / "profile"
    assert "aten::mm" in (directory / "table.txt").read_text()
    assert (directory / "table.txt").read_text().startswith("Step 2\n")
    assert any("aten::mm" in str(event.get("name")) for event in read_json(directory / "trace.json")["traceEvents"])
