"""The same checkpoint from a GPU: mixed-precision Hessians, determinism, agreement with the CPU."""

import copy

import pytest
import torch

from qlora.models.checkpoint import CheckpointReader
from qlora.models.gptq_format import TENSOR_NAMES, GPTQTensors, dequantize
from qlora.quantization import GPTQSettings, quantize_checkpoint
from qlora.quantization.hessian import InputStatistics
from qlora.quantization.skeleton import Skeleton
from qlora.quantization.solver import product, solve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hessians_accumulate_in_fp32(dtype):
    x_TK = torch.randn(3000, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    accumulator = InputStatistics(200, "cuda")
    for batch in x_TK.split(1024):
        accumulator.add(batch.cuda())
    expected = (x_TK.double().T @ x_TK.double() / 3000).float()
    torch.testing.assert_close(accumulator.hessian().cpu(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_cpu(bits, sym):
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(500, 128, generator=generator).double() @ torch.randn(128, 128, generator=generator).double()
    w_NK = torch.randn(64, 128, generator=generator, dtype=torch.float64)
    hessian = x_TK.T @ x_TK / 500
    settings = GPTQSettings(bits=bits, group_size=64, sym=sym)
    on_cpu, on_gpu = solve(w_NK, hessian, settings), solve(w_NK.cuda(), hessian.cuda(), settings)
    assert torch.equal(on_cpu.grid.scales_GN, on_gpu.grid.scales_GN.cpu())
    assert (on_cpu.codes_KN == on_gpu.codes_KN.cpu()).double().mean() > 0.999


@pytest.mark.parametrize(("inputs", "outputs"), [(256, 64), (256, 400), (2304, 64), (2304, 2400)])
def test_corrections_are_as_good_as_in_float64(inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    tokens = 8 * inputs
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    full_TK = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    x_TK = full_TK + 0.1 * full_TK.roll(1, dims=1)
    w_NK = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    hessian, drift = x_TK.T @ x_TK / tokens, (full_TK - x_TK).T @ x_TK / tokens
    settings = GPTQSettings(group_size=64, asymmetric_calibration=1.0)
    errors = []
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "cuda")):
        solution = solve(*(each.to(device, dtype) for each in (w_NK, hessian)), settings, drift.to(device, dtype))
        group = solution.g_idx.long()
        codes_KN = solution.codes_KN.double() - solution.grid.zeros_GN.double()[group]
        q_KN = (codes_KN * solution.grid.scales_GN.double()[group]).cpu()
        errors.append((x_TK @ q_KN - full_TK @ w_NK.T).square().mean().item())
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("shape", [((300, 200), (200, 500)), ((64, 4096), (4096, 70))])
def test_products_of_halves_are_good_to_sixteen_bits(shape):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*each, generator=generator, dtype=torch.float64) for each in shape)
    found = product(left.float().cuda(), right.float().cuda()).double().cpu()
    assert (found - left @ right).norm() < 2.0**-15 * (left @ right).norm()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_fused_norms_are_those_of_the_model(save_model, kind):
    skeleton = Skeleton(CheckpointReader(save_model(kind)), attn_implementation="sdpa", trust_remote_code=False)
    layer = skeleton.fill_layer(0, "cuda")
    norms = [module for module in layer.modules() if "RMSNorm" in type(module).__name__]
    assert norms
    for norm in norms:
        x = torch.randn(3, 5, norm.weight.shape[0], device="cuda", dtype=skeleton.dtype)
        tolerance = max(2 * torch.finfo(skeleton.dtype).eps, 1e-5)
        assert "forward" in vars(norm)
        torch.testing.assert_close(norm(x), type(norm).forward(norm, x), rtol=tolerance, atol=tolerance)
        twin = copy.deepcopy(norm)
        twin.weight.data.zero_()
        assert not torch.equal(twin(x), norm(x))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_checkpoints_repeat_and_agree_with_the_cpu(save_model, tmp_path, rows, kind):
    source = save_model(kind)
    settings = GPTQSettings(group_size=32)
    for name, device in (("cpu", "cpu"), ("gpu", "cuda"), ("again", "cuda")):
        (tmp_path / name).mkdir()
        quantize_checkpoint(source, tmp_path / name, rows, settings, device=device)
    file = "model.safetensors"
    assert (tmp_path / "gpu" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    first = "model.layers.0.self_attn.q_proj"
    weights = []
    for name in ("cpu", "gpu"):
        reader = CheckpointReader(tmp_path / name)
        weights.append(dequantize(GPTQTensors(*(reader.read(f"{first}.{kind}") for kind in TENSOR_NAMES)), 4))
    assert (weights[0] == weights[1]).double().mean() > 0.99
