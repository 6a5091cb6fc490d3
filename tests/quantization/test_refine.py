"""Refinement: gradients of packed weights against float64, what it changes in a checkpoint, what it leaves alone."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, OlmoConfig, OlmoForCausalLM

from qlora.data.calibration import CalibrationRow
from qlora.errors import UserError
from qlora.kernels.packed_linear import PackedWeight, dequantize, log_scale_gradient
from qlora.models.checkpoint import CheckpointReader, overwrite_tensors
from qlora.models.gptq_format import pack_rows
from qlora.models.loading import load_gptq, load_plain
from qlora.quantization import GPTQSettings, quantize_checkpoint
from qlora.quantization.calibration import make_batches
from qlora.quantization.refine import RefineSettings, compare, refine_checkpoint, teach, train
from qlora.quantization.skeleton import Skeleton
from qlora.quantization.student import QuantizedLinear, Student

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SETTINGS = RefineSettings(steps=30, tokens_per_step=256, held_out=0.25)
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
OPTIONS = {"attn_implementation": "sdpa", "trust_remote_code": False}


@pytest.fixture
def quantized(save_model, output_dir, rows):
    """`quantized(kind, bits, sym)`: (source, its GPTQ checkpoint)."""

    def quantize(kind: str = "llama", bits: int = 3, sym: bool = True, dtype: torch.dtype = torch.float32):
        source = CheckpointReader(save_model(kind, dtype))
        quantize_checkpoint(source, output_dir, rows, GPTQSettings(bits=bits, group_size=32, sym=sym), device="cpu")
        return source, output_dir

    return quantize


@pytest.fixture
def similar_rows() -> list[CalibrationRow]:
    """Rows of few distinct tokens: what is learnt on some of them holds for the others."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(20, 41, (48,), generator=generator).tolist()
    return [CalibrationRow(tuple(torch.randint(0, 12, (n,), generator=generator).tolist()), None) for n in lengths]


def stored(directory) -> dict[str, torch.Tensor]:
    """Every tensor, in memory of its own: what the safetensors library maps would change with the file."""
    reader = CheckpointReader(directory)
    return {name: reader.read(name) for name in reader.names()}


def random_weight(bits: int, sym: bool, inputs: int = 96, outputs: int = 64, group_size: int = 32):
    """(packed weight, q − z [K, N] in float64, random δ [G, N])"""
    generator = torch.Generator().manual_seed(bits)
    groups = inputs // group_size
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, outputs), generator=generator)
    zeros = torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
    scales = (torch.randn(groups, outputs, generator=generator) * 0.05).half()
    steps = (codes - zeros.repeat_interleave(group_size, 0)).double()
    weight = PackedWeight(pack_rows(codes, bits), zeros.to(torch.uint8), scales, bits)
    return weight, steps, torch.randn(groups, outputs, generator=generator) * 0.1


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 96])
def test_gradients_are_those_of_a_dense_float64_layer(bits, sym, group_size):
    weight, steps, log_scale = random_weight(bits, sym, group_size=group_size)
    bias, x = torch.randn(64), torch.randn(2, 7, 96)
    linear = QuantizedLinear(weight, bias)
    linear.log_scale.data.copy_(log_scale)
    x.requires_grad_()
    y = linear(x)
    upstream = torch.randn(y.shape)
    y.backward(upstream)

    delta, x64 = log_scale.double().requires_grad_(), x.detach().double().requires_grad_()
    scales = (weight.scales_GN.double() * delta.exp()).repeat_interleave(group_size, 0)
    expected = x64 @ (scales * steps) + bias.double()
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear.log_scale.grad.double(), delta.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kernels_follow_their_formulas_in_float64(bits):
    weight, steps, log_scale = random_weight(bits, sym=False)
    scales = (weight.scales_GN.double() * log_scale.double().exp()).repeat_interleave(32, 0)
    torch.testing.assert_close(dequantize(weight, log_scale.double(), torch.float64), scales * steps)
    grad = torch.randn(96, 64, dtype=torch.float64)
    expected = (scales * steps * grad).unflatten(0, (3, 32)).sum(1)
    torch.testing.assert_close(log_scale_gradient(weight, log_scale.double(), grad), expected)


def test_scales_of_fewer_bits_move_further(save_model, output_dir, rows):
    source = CheckpointReader(save_model("llama"))
    settings = GPTQSettings(bits=4, group_size=32, modules={"mlp\\.down_proj": {"bits": 2}})
    quantize_checkpoint(source, output_dir, rows, settings, device="cpu")
    build = partial(Skeleton, **OPTIONS)
    student = Student(build(source), output_dir, "cpu")
    lessons = teach(build, source, make_batches(rows, 256, 160, "cpu"), "cpu")
    train(student, lessons, RefineSettings(steps=1, learning_rate=1e-3), None)
    # Adam's first step is as long as the learning rate wherever there is a gradient.
    moved = {name: linear.log_scale.detach().abs() for name, linear in student.linears.items()}
    for name, change in moved.items():
        expected = 4e-3 if "down_proj" in name else 1e-3
        torch.testing.assert_close(change[change > 0], torch.full_like(change[change > 0], expected), rtol=0.01, atol=0)
        assert (change > 0).double().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(96, 64, 32), (192, 96, 64), (96, 160, 96), (1024, 320, 128)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_triton_kernels_equal_their_twins(bits, shape):
    inputs, outputs, group_size = shape
    weight, _, log_scale = random_weight(bits, False, inputs, outputs, group_size)
    on_gpu = PackedWeight(weight.qweight_WN.cuda(), weight.zeros_GN.cuda(), weight.scales_GN.cuda(), bits)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = dequantize(weight, log_scale, dtype)
        found = dequantize(on_gpu, log_scale.cuda(), dtype).cpu()
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
        grad = torch.randn(inputs, outputs).to(dtype)
        expected = log_scale_gradient(weight, log_scale, grad)
        found = log_scale_gradient(on_gpu, log_scale.cuda(), grad.cuda())
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found, log_scale_gradient(on_gpu, log_scale.cuda(), grad.cuda()))


def test_stored_scales_keep_their_sign_and_stay_in_range_of_fp16():
    scales = torch.tensor([[0.5, -0.5, 2.0**-24, -(2.0**-24), 60000.0, 0.0]]).half()
    weight = PackedWeight(torch.zeros(4, 6, dtype=torch.int32), torch.full((1, 6), 8, dtype=torch.uint8), scales, 4)
    linear = QuantizedLinear(weight, None)
    linear.log_scale.data.copy_(torch.tensor([[1.0, 1.0, -3.0, -3.0, 3.0, 3.0]]))
    expected = torch.tensor([[0.5 * 2.718281828, -0.5 * 2.718281828, 2.0**-24, -(2.0**-24), 65504.0, 0.0]]).half()
    assert torch.equal(linear.stored_scales(), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "gpt2", "mixtral"])
def test_the_student_computes_what_the_checkpoint_says(quantized, rows, kind):
    source, directory = quantized(kind)
    student = Student(Skeleton(source, **OPTIONS), directory, "cpu")
    input_ids = torch.tensor([rows[0].input_ids])
    with torch.no_grad():
        logits = student.logits(student.hidden(input_ids)[0])
        expected = load_gptq(directory, dtype=torch.float32)(input_ids).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def naive_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL [T] in float64."""
    p, q = teacher_logits.double().log_softmax(-1), student_logits.double().log_softmax(-1)
    return nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def test_the_divergence_and_its_gradient_are_those_of_whole_models(quantized, rows, monkeypatch):
    """Chunks, padding, and positions of weight 0 included."""
    monkeypatch.setattr("qlora.quantization.refine.LOGITS_ELEMENTS", {"cpu": 160 * 7})
    source, directory = quantized("llama")
    chosen = [
        CalibrationRow(row.input_ids, None if index % 2 else tuple(t > 3 for t in range(len(row.input_ids))))
        for index, row in enumerate(rows[:6])
    ]
    (batch,) = make_batches(chosen, 10_000, 160, "cpu", 0.0)
    (lesson,) = teach(partial(Skeleton, **OPTIONS), source, [batch], "cpu")
    student = Student(Skeleton(source, **OPTIONS), directory, "cpu")
    hidden = student.hidden(lesson.input_ids_BT)
    loss, grad = compare(student, hidden, lesson)
    hidden.backward(grad)

    teacher, model = load_plain(source.directory, torch.float32), load_gptq(directory, torch.float32).double()
    expected = 0.0
    for row in chosen:
        input_ids = torch.tensor([row.input_ids])
        counts = torch.tensor(row.loss or (True,) * len(row.input_ids))
        expected += naive_divergence(model(input_ids).logits[0], teacher(input_ids).logits[0].detach())[counts].sum()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-3, atol=1e-5)
    expected.backward()
    prefix = "model.layers.1.mlp.down_proj."
    weight = model.get_submodule(prefix[:-1]).weight
    by_hand = (weight.grad * weight.detach()).T.unflatten(0, (-1, 32)).sum(1)
    found = student.linears[prefix].log_scale.grad.double()
    torch.testing.assert_close(found, by_hand, rtol=1e-2, atol=1e-3 * float(by_hand.abs().max()))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("kind", "sym"), [("llama", True), ("qwen2", False), ("mixtral", True)])
def test_the_divergence_falls_and_only_scales_and_norms_change(
    quantized, similar_rows, kind, sym, recompute, monkeypatch
):
    monkeypatch.setattr("qlora.quantization.student.ACTIVATIONS_SHARE", 0.0 if recompute else 1.0)
    source, directory = quantized(kind, sym=sym, dtype=torch.bfloat16)
    before = stored(directory)
    others = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".safetensors"}
    report = refine_checkpoint(source, directory, similar_rows, SETTINGS, device="cpu")
    assert report.kept and report.kl_after < 0.8 * report.kl_before
    after = stored(directory)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.endswith(".scales")} <= changed
    assert all(name.endswith(".scales") or "norm" in name for name in changed)
    assert any("norm" in name for name in changed)
    for name in before:
        assert before[name].dtype == after[name].dtype and bool(torch.isfinite(after[name]).all())
        if name.endswith(".scales"):
            assert torch.equal(before[name].sign(), after[name].sign())
    assert others == {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".safetensors"}
    assert report.scales == sum(before[name].numel() for name in before if name.endswith(".scales"))
    assert (report.rows, report.held_out_rows, report.steps) == (36, 12, 30)
    json.dumps(asdict(report))


def test_the_report_tells_the_divergence_that_the_loaded_checkpoints_have(quantized, similar_rows):
    source, directory = quantized("llama")
    teacher = load_plain(source.directory, torch.float32)

    def divergence(rows) -> float:
        model = load_gptq(directory, torch.float32)
        total = tokens = 0
        for row in rows:
            input_ids = torch.tensor([row.input_ids])
            with torch.no_grad():
                total += float(naive_divergence(model(input_ids).logits[0], teacher(input_ids).logits[0]).sum())
            tokens += len(row.input_ids)
        return total / tokens

    # All rows are equal, so that every choice of held-back rows is.
    equal_rows = [similar_rows[0]] * 8
    before = divergence(equal_rows[:1])
    report = refine_checkpoint(source, directory, equal_rows, SETTINGS, device="cpu")
    assert report.kl_before == pytest.approx(before, rel=1e-3)
    assert report.kl_after == pytest.approx(divergence(equal_rows[:1]), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_gpu_refines_as_a_cpu_does(quantized, similar_rows, tmp_path, kind, recompute, monkeypatch):
    monkeypatch.setattr("qlora.quantization.student.ACTIVATIONS_SHARE", 0.0 if recompute else 1.0)
    source, directory = quantized(kind)
    shutil.copytree(directory, tmp_path / "gpu")
    on_cpu = refine_checkpoint(source, directory, similar_rows, SETTINGS, device="cpu")
    on_gpu = refine_checkpoint(source, tmp_path / "gpu", similar_rows, SETTINGS, device="cuda")
    assert on_gpu.kept and on_gpu.kl_before == pytest.approx(on_cpu.kl_before, rel=0.02)
    assert on_gpu.kl_after == pytest.approx(on_cpu.kl_after, rel=0.1)


def test_norms_stay_when_asked_to(quantized, similar_rows):
    source, directory = quantized("llama")
    before = stored(directory)
    report = refine_checkpoint(source, directory, similar_rows, replace(SETTINGS, norms=False), device="cpu")
    after = stored(directory)
    assert report.kept and report.norm_weights == 0
    assert all(name.endswith(".scales") for name in before if not torch.equal(before[name], after[name]))


def test_models_whose_layers_return_tuples(tmp_path, output_dir, similar_rows):
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    torch.manual_seed(0)
    FalconForCausalLM(FalconConfig(**sizes, initializer_range=0.15)).save_pretrained(tmp_path / "falcon")
    source = CheckpointReader(tmp_path / "falcon")
    quantize_checkpoint(source, output_dir, similar_rows, GPTQSettings(bits=3, group_size=32), device="cpu")
    report = refine_checkpoint(source, output_dir, similar_rows, SETTINGS, device="cpu")
    assert report.kept and report.kl_after < 0.9 * report.kl_before


def test_models_whose_norms_have_no_weights(tmp_path, output_dir, similar_rows):
    config = OlmoConfig(**SIZES, initializer_range=0.15, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    OlmoForCausalLM(config).save_pretrained(tmp_path / "olmo")
    source = CheckpointReader(tmp_path / "olmo")
    quantize_checkpoint(source, output_dir, similar_rows, GPTQSettings(bits=3, group_size=32), device="cpu")
    report = refine_checkpoint(source, output_dir, similar_rows, SETTINGS, device="cpu")
    assert report.kept and report.norm_weights == 0


def test_what_does_not_help_held_back_rows_is_not_kept(quantized, similar_rows):
    source, directory = quantized("llama")
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).digest()
    report = refine_checkpoint(source, directory, similar_rows, replace(SETTINGS, learning_rate=3.0), device="cpu")
    assert not report.kept and not report.kl_after < report.kl_before
    assert hashlib.sha256((directory / "model.safetensors").read_bytes()).digest() == digest


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_equal_inputs_give_equal_bytes(quantized, similar_rows, tmp_path, device):
    source, directory = quantized("llama", dtype=torch.bfloat16)
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    for target in (directory, other):
        assert refine_checkpoint(source, target, similar_rows, replace(SETTINGS, steps=10), device=device).kept
    assert (directory / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_checkpoint_of_another_model_is_refused(quantized, save_model, rows):
    source, directory = quantized("llama")
    with pytest.raises(UserError, match="packed linears, of which this model has 0"):
        refine_checkpoint(CheckpointReader(save_model("gpt2")), directory, rows, SETTINGS, device="cpu")


def test_groups_out_of_order_are_refused(quantized, rows):
    source, directory = quantized("llama")
    name = "model.layers.0.self_attn.q_proj.g_idx"
    overwrite_tensors(directory, {name: CheckpointReader(directory).read(name).flip(0)})
    with pytest.raises(UserError, match="desc_act"):
        refine_checkpoint(source, directory, rows, SETTINGS, device="cpu")


def test_rows_without_positions_that_count_are_left_out(quantized, similar_rows):
    source, directory = quantized("llama")
    silent = [CalibrationRow(row.input_ids, (False,) * len(row.input_ids)) for row in similar_rows[:8]]
    settings = replace(SETTINGS, prompt_weight=0.0, steps=2)
    report = refine_checkpoint(source, directory, silent + similar_rows[8:16], settings, device="cpu")
    assert (report.rows, report.held_out_rows) == (6, 2)
    with pytest.raises(UserError, match="0 rows with tokens that count"):
        refine_checkpoint(source, directory, silent, settings, device="cpu")


def test_too_few_rows_and_odd_settings_are_refused(quantized, rows):
    source, directory = quantized("llama")
    with pytest.raises(UserError, match="1 rows"):
        refine_checkpoint(source, directory, rows[:1], SETTINGS, device="cpu")
    with pytest.raises(UserError) as error:
        RefineSettings(steps=0, held_out=1.0)
    assert len(error.value.problems) == 2


def test_overwriting_checks_first(save_model):
    directory = save_model("llama")
    before = (directory / "model.safetensors").read_bytes()
    reader = CheckpointReader(directory)
    norm = "model.norm.weight"
    changes = {norm: reader.read(norm) + 1, "model.layers.0.input_layernorm.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match="the file has"):
        overwrite_tensors(directory, changes)
    assert (directory / "model.safetensors").read_bytes() == before
