"""On two GPUs: processes that have the base each, and such that share it, train the adapter of one.

    pytest tests/gpu/test_several_gpus.py

Speed and memory are in scripts/bench/scaling.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from qlora.artifacts import read_json

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 CUDA GPUs, has {torch.cuda.device_count()}"),
]
STEPS = 6
LAYERS = 16
KINDS = {
    "one": ["train.processes=1"],
    "copies": ["train.processes=2"],
    "shared": ["train.processes=2", "train.shard=true"],
}


@pytest.mark.parametrize("recomputed", ["true", "false"])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_two_gpus_train_the_adapter_of_one(deep_model, tiny_recipe, tmp_path, kernels, recomputed):
    path = tiny_recipe(
        device="cuda",
        model={"base": str(deep_model), "compute_dtype": "float32"},
        train={"max_steps": STEPS, "learning_rate": 1e-3, "evaluate_every": 3, "kernels": kernels, "log_every": 1},
        evaluate={"batch_size": 1},
    )
    adapters, metrics, bases = {}, {}, {}
    for kind, options in KINDS.items():
        options = [*options, f"train.gradient_checkpointing={recomputed}", f"output_dir={tmp_path / kind}"]
        command = [sys.executable, "-m", "qlora", "train", str(path), *options]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert result.returncode == 0, result.stdout + result.stderr
        place = tmp_path / kind / "tiny"
        adapters[kind] = load_file(place / "adapter/adapter_model.safetensors")
        bases[kind] = read_json(place / "adapter/base.json")
        metrics[kind] = read_json(place / "lineage.json")["stages"]["train"]["metrics"]
    # B begins at zero: what it is now is how far it moved.
    ups = [name for name in adapters["one"] if ".lora_B." in name]
    moved = torch.cat([adapters["one"][name].flatten() for name in ups]).norm()
    for kind in ("copies", "shared"):
        assert metrics[kind]["processes"] == 2 and bases[kind] == bases["one"]
        for key in ("loss", "eval_loss"):
            curves = [[entry[key] for entry in metrics[each]["curve"] if key in entry] for each in ("one", kind)]
            assert curves[1] == pytest.approx(curves[0], rel=1e-3), (kind, key)
        apart = [(adapters[kind][name] - adapters["one"][name]).flatten() for name in ups]
        assert torch.cat(apart).norm() < 0.02 * moved, kind


@pytest.fixture
def large_model(tiny_model, tmp_path) -> Path:
    """The tiny model's tokenizer with 16 layers of 6.8 million weights each: 54 MiB of them in 4 bits."""
    config = AutoConfig.from_pretrained(tiny_model)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = LAYERS, 768, 2048
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "large")
    return tmp_path / "large"


def test_a_process_holds_its_part_of_the_base(large_model, tiny_recipe, tmp_path):
    """Two processes hold half of the layers each, and two of 16 layers whole."""
    held = {}
    for kind in ("copies", "shared"):
        path = tiny_recipe(device="cuda", model={"base": str(large_model)}, train={"max_steps": 2, "kernels": "plain"})
        options = [*KINDS[kind], "train.gradient_checkpointing=true", f"output_dir={tmp_path / kind}"]
        command = [sys.executable, "-m", "qlora", "train", str(path), *options]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert result.returncode == 0, result.stdout + result.stderr
        stages = read_json(tmp_path / kind / "tiny/lineage.json")["stages"]
        held[kind] = stages["train"]["metrics"]["gpu_peak_gib"]
    weights = LAYERS * (2 * 768 * 768 + 2 * 768 * 384 + 3 * 768 * 2048)
    saved = 0.516 * weights * (1 / 2 - 2 / LAYERS) / 2**30
    assert held["copies"] - held["shared"] > 0.8 * saved
