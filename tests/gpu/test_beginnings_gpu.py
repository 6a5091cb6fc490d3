"""On a CUDA GPU: what adapters begin as (PiSSA), and rows of tokens that learn, are what they are on a CPU.

pytest -m gpu tests/gpu/test_beginnings_gpu.py
"""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

from qlora.artifacts import read_json
from qlora.models.adapter_beginning import begin, take_parts
from qlora.models.loading import attach_adapter, load_base
from qlora.models.principal import principal_part
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe
from qlora.stages import Run, merge

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
TOKENS = "lora.new_tokens=[<call>, {text: </call>, special: true}]"
KNOWN = "lora.train_tokens=['<|im_start|>']"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 100])
def test_what_pissa_leaves_of_a_weight_has_the_same_bits_as_on_a_cpu(rank, dtype):
    generator = torch.Generator().manual_seed(0)
    weight_NK = (torch.randn(1536, 4096, generator=generator) * 0.02).bfloat16()
    fresh = torch.ones(rank, 4096, device="cuda"), torch.zeros(1536, rank, device="cuda")
    part = principal_part(weight_NK.cuda().float(), *fresh, 0.7)
    on_cpu, on_gpu = (part.rest(weight_NK, dtype, device) for device in ("cpu", "cuda"))
    assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), on_cpu)
    assert on_cpu.double().norm() < 0.9999 * weight_NK.double().norm()


def test_pissa_goes_through_all_stages_and_its_base_is_that_of_a_cpu(tiny_recipe, tmp_path):
    recipe = load_recipe(
        tiny_recipe(device="cuda"),
        ["lora.init=pissa", "train.max_steps=8", "evaluate.gates.merge_kl=0.01", f"output_dir={tmp_path}"],
    )
    Pipeline(recipe).run()
    rungs = {rung["name"]: rung for rung in read_json(recipe.run_dir / "evaluation/ladder.json")["rungs"]}
    assert rungs["trained"]["loss"] < rungs["base"]["loss"]
    # Merged on a CPU: it compares every 4-bit code of its base with that of training.
    (recipe.run_dir / "again").mkdir()
    merge(
        Run(load_recipe(recipe.run_dir / "recipe.yaml", ["device=cpu"])), "", recipe.run_dir / "again", lambda *_: None
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tokens_learn_the_same_fused_recorded_or_plain(tiny_recipe, calls, tmp_path, dtype):
    learned = {}
    for kernels in ("plain", "auto"):
        path = tiny_recipe(device="cuda", model={"compute_dtype": dtype}, data=calls)
        recipe = load_recipe(
            path,
            [TOKENS, KNOWN, f"train.kernels={kernels}", "train.max_steps=12", "train.learning_rate=0.003",
             f"name={kernels}", f"output_dir={tmp_path}"],
        )  # fmt: skip
        Pipeline(recipe).run()
        rungs = {rung["name"]: rung for rung in read_json(recipe.run_dir / "evaluation/ladder.json")["rungs"]}
        assert rungs["trained"]["loss"] < rungs["base"]["loss"] and rungs["merged"]["kl"] < 0.01
        adapter = load_file(recipe.run_dir / "adapter/adapter_model.safetensors")
        learned[kernels] = {name: each for name, each in adapter.items() if "lora_" not in name}
        text = "".join(file.read_text() for file in (recipe.run_dir / "logs").iterdir())
        if kernels == "auto" and dtype == "bfloat16":
            assert "launched as CUDA graphs" in text and "without CUDA graphs" not in text
    assert learned["plain"].keys() == learned["auto"].keys() and learned["auto"]
    for name, rows in learned["auto"].items():
        difference = (learned["plain"][name] - rows).norm() / rows.norm()
        assert difference < (0.05 if dtype == "bfloat16" else 5e-3), name


def test_codes_of_what_pissa_leaves_are_those_of_a_cpu(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe(), ["lora.init=pissa"])
    held = {}
    for device in ("cuda", "cpu"):  # the GPU takes the parts, and a CPU reads them
        model = attach_adapter(load_base(recipe.model.base, recipe.model, device, quantized=True), recipe.lora)
        begin(model, recipe.lora, recipe.model.base, take_parts(model, recipe.lora, recipe.model.base, tmp_path))
        held[device] = {
            name: module.weight.data.cpu() for name, module in model.named_modules() if isinstance(module, Linear4bit)
        }
    assert len(held["cpu"]) == 14
    for name, codes in held["cpu"].items():
        assert torch.equal(held["cuda"][name], codes), name
