"""The adapter's part of a product is there after rounding, however small it is."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora.models.adapter_sums import round_once

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


class Three(nn.Module):
    """A linear in 16 bits with a bias, one in 4 bits, and one without an adapter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = nn.Linear(256, 192, dtype=dtype)
        self.quantized = Linear4bit(192, 320, bias=False, compute_dtype=dtype, quant_type="nf4")
        self.quantized.support_avx512bf16_for_cpu = False  # as `load_base` has it
        self.head = nn.Linear(320, 64, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.quantized(self.dense(x)))


def adapted(dtype: torch.dtype, device: str, size: float, **config: object) -> tuple[object, torch.Tensor]:
    torch.manual_seed(0)
    model = Three(dtype).to(device)
    model = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, target_modules=["dense", "quantized"], **config),
        autocast_adapter_dtype=False,
    ).to(device)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape).to(device) * (size if "lora_B" in name else 0.1)
    return model.eval(), torch.randn(3, 50, 256, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "lora_dropout": 0.5}, {"rank_pattern": {"dense": 7}}])
@torch.no_grad()
def test_in_32_bits_it_is_what_peft_computes(config, device) -> None:
    model, x = adapted(torch.float32, device, 0.1, **config)
    expected = model(x)
    before = model.base_model.model.dense.forward
    found = round_once(model)(x)
    assert model.base_model.model.dense.forward != before
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(model(x), found, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["dense", "quantized"])
@torch.no_grad()
def test_what_is_less_than_half_of_the_last_bit_is_kept_on_average(name, device) -> None:
    kept = {}
    for once in (False, True):
        model, x = adapted(torch.bfloat16, device, 2e-5)
        layer = getattr(model.base_model.model, name)
        x = x if name == "dense" else x[..., :192]
        update = x.float() @ layer.lora_A["default"].weight.T @ (2 * layer.lora_B["default"].weight.T)
        base = layer.get_base_layer()(x)
        if once:
            round_once(model)
        change = (layer(x) - base).float()
        assert update.abs().mean() < 0.1 * (base.float().abs().mean() * 2**-8)
        kept[once] = float((change * update).sum() / update.square().sum())
    assert kept[False] < 0.7, "PEFT's sum loses it; if not, there is nothing to do here"
    assert kept[True] == pytest.approx(1, abs=0.25)


@torch.no_grad()
def test_other_variants_stay_what_peft_made_them() -> None:
    model, x = adapted(torch.bfloat16, "cpu", 0.1, use_dora=True)
    expected = model(x)
    assert torch.equal(round_once(model)(x), expected)


def test_training_goes_on_in_pefts_way() -> None:
    model, x = adapted(torch.float32, "cpu", 0.1)
    round_once(model).train()
    model(x).sum().backward()
    assert model.base_model.model.quantized.lora_B["default"].weight.grad.norm() > 0
