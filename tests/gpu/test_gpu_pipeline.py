"""On a CUDA GPU: whole runs, the exact merge of a real model, and that training survives evaluation.

    pytest -m gpu

runs these and the CUDA tests of the merge and of GPTQ, which stand beside their CPU twins.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora.artifacts import read_json
from qlora.models.loading import load_base
from qlora.models.provenance import QuantizationSettings, write_provenance
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe
from qlora.stages import Run
from qlora.training.sft import build_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def test_quickstart_meets_its_gates_and_the_merge_is_the_trained_model(smollm2, tmp_path):
    recipe = load_recipe(QUICKSTART, [f"model.base={smollm2}", f"output_dir={tmp_path}", "device=cuda"])
    Pipeline(recipe).run()  # raises if a gate fails
    rungs = {rung["name"]: rung for rung in read_json(recipe.run_dir / "evaluation/ladder.json")["rungs"]}
    assert rungs["base"]["exact_match"] <= 0.04
    assert rungs["trained"]["exact_match"] >= 0.9
    assert rungs["gptq"]["exact_match"] >= rungs["trained"]["exact_match"] - 0.04
    assert rungs["merged"]["kl"] <= 0.002
    survival = read_json(recipe.run_dir / "evaluation/survival.json")
    assert survival["damaged"] == [] and 0.9 < survival["overall"]["energy"] < 1.1
    assert all(0 < module["output_error"] < 0.2 for module in survival["modules"])
    stages = read_json(recipe.run_dir / "lineage.json")["stages"]
    assert stages["train"]["metrics"]["gpu_peak_gib"] > stages["merge"]["metrics"]["gpu_peak_gib"] > 0


def test_codes_quantized_on_the_gpu_are_those_of_the_cpu(smollm2, tmp_path):
    recipe = load_recipe(QUICKSTART, [f"model.base={smollm2}"])
    settings = QuantizationSettings("nf4", True, torch.bfloat16)
    found = {}
    for device in ("cpu", "cuda"):
        model = load_base(smollm2, recipe.model, device, quantized=True)
        found[device] = write_provenance(
            model, tmp_path / f"{device}.json", base_id="x", revision=None, settings=settings
        )
    assert found["cpu"].digest == found["cuda"].digest
    for name, codes in found["cpu"].quantized.items():
        assert codes.absmax_deviation(found["cuda"].quantized[name]) < 1e-3


def test_evaluation_leaves_the_gradients_what_they_were(tiny_recipe, tmp_path):
    run = Run(load_recipe(tiny_recipe(device="cuda"), ["train.evaluate_every=1"]))
    trainer = build_trainer(
        run.recipe,
        run.base,
        run.tokenizer,
        run.train_rows.rows,
        run.eval_rows.rows,
        device="cuda:0",
        checkpoints=tmp_path / "checkpoints",
    )
    torch.manual_seed(1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.train()
        trainer.model.zero_grad()
        batch = next(iter(trainer.get_eval_dataloader()))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            trainer.compute_loss(trainer.model, batch).backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    before = gradients()
    trainer.evaluate()
    after = gradients()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().max()))


def test_accelerate_launch_on_one_gpu(tiny_recipe, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "train.py"
    flags = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script), str(tiny_recipe(device="cuda"))]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "runs/tiny/adapter/adapter_model.safetensors").is_file()
    assert "cuda:0" in result.stdout
