"""The fused path learns what the plain path learns: as close as two plain runs of different rounding are."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora.recipe_file import load_recipe
from qlora.stages import Run
from qlora.training.sft import build_trainer

KINDS = {
    "llama": {},
    "qwen2": {},
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
STEPS = {"cpu": 25, "cuda": 40}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


@pytest.fixture
def losses(tiny_recipe, tiny_model, tmp_path):
    """`losses(kind, device, *overrides)`: the loss of every step of a run."""

    def train(kind: str, device: str, *overrides: str) -> torch.Tensor:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        config = AutoConfig.for_model(
            kind, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, vocab_size=len(tokenizer), initializer_range=0.08,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None, **KINDS[kind],
        )  # fmt: skip
        directory = tmp_path / kind
        if not directory.is_dir():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        path = tiny_recipe(model={"base": str(directory)}, device=device, train={"learning_rate": 0.003})
        run = Run(load_recipe(path, (f"train.max_steps={STEPS[device]}", "train.log_every=1", *overrides)))
        trainer = build_trainer(
            run.recipe, run.base, run.tokenizer, run.train_rows.rows, None,
            device="cuda:0" if device == "cuda" else device, checkpoints=Path(tmp_path / "checkpoints"),
        )  # fmt: skip
        trainer.train()
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    return train


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_both_paths_are_as_close_as_of_two_plain_runs(losses, kind, device):
    plain = losses(kind, device, "train.kernels=plain")
    again = losses(kind, device, "train.kernels=plain", "train.micro_batch_tokens=1")  # other batches, other rounding
    fused = losses(kind, device)
    assert len(plain) == len(again) == len(fused) == STEPS[device]
    noise, difference = ((each - plain).abs().mean() for each in (again, fused))
    assert plain[-5:].mean() < 0.7 * plain[:5].mean(), "it learns"
    assert difference < 3 * noise + 0.01 * plain.mean(), (difference, noise)
