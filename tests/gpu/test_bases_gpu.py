"""On a CUDA GPU: int8 and a checkpoint's own codes in training, and that the merge adds to what they multiply with.

pytest -m gpu tests/gpu/test_bases_gpu.py
"""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt

from qlora.artifacts import read_json
from qlora.errors import UserError
from qlora.models.base import resolve_base
from qlora.models.frozen import eight_bit_codes, eight_bit_weight
from qlora.models.loading import attach_adapter, load_base, load_for_training, load_plain
from qlora.models.packed_module import PackedLinear
from qlora.pipeline import Pipeline
from qlora.recipe import Lora, Model
from qlora.recipe_file import load_recipe
from qlora.stages import Run, merge
from qlora.training.fused import fuse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FORMATS = [("gptq", 2, False), ("gptq", 3, True), ("gptq", 4, False), ("gptq", 4, True), ("gptq", 8, False)]
FORMATS += [("awq", 4, False)]


@pytest.fixture
def base_of(save_packed, tmp_path, monkeypatch):
    """A packed checkpoint as a base; what is converted goes to a cache of the test's own."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return lambda *kind: resolve_base(str(save_packed(*kind)))


def settings(base, **changes) -> Model:
    return Model(**{"base": str(base.packed), "quantization": "checkpoint"} | changes)


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_the_kernel_gives_the_bits_that_the_merge_adds_to(base_of, kind):
    base = base_of(*kind)
    models = {device: load_for_training(base, settings(base), device) for device in ("cpu", "cuda")}
    found = {name: module for name, module in models["cuda"].named_modules() if isinstance(module, PackedLinear)}
    assert len(found) == 14
    for name, module in found.items():
        assert module.qweight.is_cuda
        assert torch.equal(module.stored_weight().cpu(), models["cpu"].get_submodule(name).stored_weight()), name


def loss_and_gradients(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 500, (2, 32), generator=generator).cuda()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def adapted(model):
    model = attach_adapter(model, Lora(r=8, alpha=16)).train()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).cuda()
    return model


@pytest.mark.parametrize("kind", [("gptq", 4, True), ("awq", 4, False)], ids=str)
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_losses_and_gradients_are_those_of_the_dequantized_model_fused_or_not(base_of, kind, compute_dtype):
    base = base_of(*kind)
    section = settings(base, compute_dtype=compute_dtype)
    packed = adapted(load_for_training(base, section, "cuda"))
    plain = adapted(load_plain(base.directory, getattr(torch, compute_dtype), "cuda"))
    tolerance = 1e-4 if compute_dtype == "float32" else 0.03
    autocast = torch.autocast("cuda", dtype=torch.bfloat16, enabled=compute_dtype == "bfloat16")
    with autocast:
        expected, gradients = loss_and_gradients(plain)
    for fused in (False, True):
        if fused:
            done = fuse(packed)
            assert (done.linears, done.blocks, done.plain) == (14, 2, {})
        with autocast:
            found, own = loss_and_gradients(packed)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
        for name, gradient in gradients.items():
            assert (own[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name


def run(path: Path, *overrides: str):
    recipe = load_recipe(path, ["device=cuda", *overrides])
    Pipeline(recipe).run()
    ladder = read_json(recipe.run_dir / "evaluation" / "ladder.json")
    return recipe.run_dir, {rung["name"]: rung for rung in ladder["rungs"]}


@pytest.mark.parametrize("kind", [("gptq", 4, True), ("gptq", 3, False), ("awq", 4, False)], ids=str)
def test_a_checkpoints_own_codes_go_through_all_stages(tiny_recipe, base_of, kind):
    base = base_of(*kind)
    model = {"base": str(base.packed), "quantization": "checkpoint"}
    run_dir, rungs = run(tiny_recipe(model=model), "evaluate.gates.merge_kl=0.01")
    assert rungs["trained"]["loss"] < rungs["base"]["loss"]
    assert "qlora's Triton kernel" in "".join(file.read_text() for file in (run_dir / "logs").iterdir())
    # Trained on a GPU, merged on a CPU: digests are of the weights, so that they are the same.
    recipe = load_recipe(run_dir / "recipe.yaml", ["device=cpu"])
    (run_dir / "again").mkdir()
    merge(Run(recipe), "", run_dir / "again", lambda *_: None)


def test_int8_goes_through_all_stages_with_the_kl_of_its_inputs(tiny_recipe, capsys):
    overrides = ["model.quantization=int8", r"model.skip_modules=['layers\.0\.mlp']"]
    run_dir, rungs = run(tiny_recipe(), *overrides, "evaluate.gates.merge_kl=1.0e-9")
    assert rungs["trained"]["loss"] < rungs["base"]["loss"]
    assert rungs["merged"]["kl"] < 0.05 and rungs["merged"]["kl"] < rungs["base"]["kl"]
    written = read_json(run_dir / "adapter" / "base.json")
    assert written["device"] == "cuda" and len(written["quantized"]) == 11
    assert "a base in int8" in "".join(file.read_text() for file in (run_dir / "logs").iterdir())
    assert "merge_kl did not apply" in " ".join(capsys.readouterr().out.split())
    (run_dir / "again").mkdir()
    try:
        merge(Run(load_recipe(run_dir / "recipe.yaml", ["device=cpu"])), "", run_dir / "again", lambda *_: None)
    except UserError as error:  # a CPU may round another way at a tie, and then says where to merge
        assert "8-bit codes differ" in str(error) and "on cuda" in str(error)


def test_products_in_int8_are_those_of_the_documentation(tiny_model):
    """Forwards, inputs in 8 bits but for columns that reach the threshold; backwards, the weight the merge adds to."""
    section = Model(base=str(tiny_model), quantization="int8")
    model = load_base(tiny_model, section, "cuda", quantized=True)
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, Linear8bitLt) and linear.state.threshold == 6.0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, linear.in_features, generator=generator).cuda().to(torch.bfloat16)
    x[5, 7] = 20.0
    x.requires_grad_()
    y = linear(x)
    upstream = torch.randn(y.shape, generator=generator).cuda().to(torch.bfloat16)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    codes_NK, scales_N = eight_bit_codes(linear)
    weight = eight_bit_weight(codes_NK, scales_N, torch.bfloat16)
    assert torch.equal(gradient, upstream @ weight)
    exact = codes_NK.double() * scales_N.double()[:, None] / 127
    outliers = (x.detach().abs() >= 6).any(0)
    rest = x.detach().double() * ~outliers
    most = rest.abs().amax(1, keepdim=True)
    in_8_bits = (rest * 127 / most).round() * most / 127
    expected = in_8_bits @ exact.T + (x.detach().double() * outliers) @ exact.T
    assert (y.double() - expected).norm() < 0.01 * expected.norm()
    assert (y.double() - x.detach().double() @ exact.T).norm() < 0.03 * expected.norm()


def test_training_holds_the_codes_alone(base_of):
    """Of the linears no 16-bit copy is left on the device after loading."""
    base = base_of("gptq", 4, False)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load_for_training(base, settings(base), "cuda")
    held = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert torch.cuda.memory_allocated() - before < 1.1 * (held + buffers) + 2**16
