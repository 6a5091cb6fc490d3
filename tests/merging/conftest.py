"""Tiny models, quantized by bitsandbytes and adapted by PEFT as in training, with random adapters for trained ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, Qwen2Config

from qlora.models.loading import train_as_measured
from qlora.models.provenance import FILE_NAME, QuantizationSettings, write_provenance

THRESHOLD = 6.0  # of int8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Trained:
    """A model as it stands at the end of training, and the directories a merge reads."""

    model: PeftModel
    base: Path
    adapter: Path

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model.eval()(tokens).logits.float()


def tiny_config(**changes: Any) -> Qwen2Config:
    """Qwen2: biases on q, k and v, none elsewhere."""
    sizes = {"vocab_size": 80, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2Config(**sizes | heads | changes)


@pytest.fixture(scope="session")
def save_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint of a configuration with random weights; made once, so tests must not write into it."""

    @functools.cache
    def cached(config: str, dtype: torch.dtype) -> Path:
        directory = tmp_path_factory.mktemp("base")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.to(dtype).save_pretrained(directory)
        return directory

    return lambda config, dtype=torch.bfloat16: cached(json.dumps(config.to_dict(), sort_keys=True), dtype)


def load_base(directory: Path, quant_type: str, compute_dtype: torch.dtype, device: str) -> torch.nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    if quant_type == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=THRESHOLD)
    options = {} if quant_type == "none" else {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=compute_dtype, device_map={"": device}, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise the first forward in eval mode repacks the weights.
            module.support_avx512bf16_for_cpu = False
    train_as_measured(model)
    return model


@pytest.fixture
def train(tmp_path: Path, save_base: Callable[..., Path]) -> Callable[..., Trained]:
    """Build base and adapter; keyword arguments other than those named go to PEFT's LoraConfig."""

    def build(
        config: PretrainedConfig | None = None,
        *,
        tied: bool = False,
        quant_type: str = "nf4",
        compute_dtype: torch.dtype = torch.float32,
        base_dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        **lora: Any,
    ) -> Trained:
        base = save_base(config or tiny_config(tie_word_embeddings=tied), base_dtype)
        model = load_base(base, quant_type, compute_dtype, device)
        options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
        peft_model = get_peft_model(model, LoraConfig(**options))
        torch.manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter)
                scale = 0.1 * parameter.detach().abs().mean() if "magnitude" in name else 0.1
                parameter.data.add_(noise * scale)
        adapter = tmp_path / "adapter"
        peft_model.save_pretrained(adapter)
        threshold = THRESHOLD if quant_type == "int8" else None
        settings = QuantizationSettings(quant_type, quant_type != "none", compute_dtype, int8_threshold=threshold)
        write_provenance(peft_model, adapter / FILE_NAME, base_id="tiny/base", revision="abc", settings=settings)
        return Trained(peft_model, base, adapter)

    return build


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Change keys of a JSON file in place."""

    def edit(path: Path, **changes: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit
