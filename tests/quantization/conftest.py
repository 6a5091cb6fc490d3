"""Tiny random models of several architectures, saved as checkpoints, and a process that has gptqmodel."""

import importlib.util
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import resident
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from qlora.data.calibration import CalibrationRow

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    # Two of three layers look back 8 tokens only, with rotary embeddings of their own.
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=2),
    "gpt2": lambda: GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Matrices this small gain nothing from threads, and lose much to them where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def save_model(tmp_path):
    """`save_model(kind, dtype, change)` saves a random model, `change(model)` applied first; returns its directory."""

    def save(kind: str, dtype: torch.dtype = torch.float32, change=lambda model: None):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
        # Biases and norms start at 0 and 1, where a forgotten one would not be noticed.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
        change(model)
        directory = tmp_path / kind
        model.to(dtype).save_pretrained(directory)
        return directory

    return save


@pytest.fixture
def output_dir(tmp_path):
    directory = tmp_path / "gptq"
    directory.mkdir()
    return directory


@pytest.fixture(scope="session")
def rows() -> list[CalibrationRow]:
    """Calibration rows of 5 to 40 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 41, (24,), generator=generator).tolist()
    return [CalibrationRow(tuple(torch.randint(0, 160, (length,), generator=generator).tolist())) for length in lengths]


@pytest.fixture(scope="session")
def through_gptqmodel():
    """`through_gptqmodel(code, *arguments, folder=…, VARIABLE=…)`: what a program prints as JSON behind RESULT.

    gptqmodel prints and changes settings of the process it is imported in, so that is another one; imported once for
    all programs, since it takes longer than most of them. What a program changes in it, it has to put back.
    """
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip('needs pip install "qlora[gptq]"')
    options = {"initializer": resident.set_variables, "initargs": (resident.GPTQMODEL,)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **options) as process:

        def run(code: str, *arguments: object, folder: Path | str = ".", **variables: str):
            given = [str(each) for each in arguments]
            printed = process.submit(resident.run, code, given, str(folder), variables).result()
            return json.loads(printed.split("RESULT ")[1].splitlines()[0])

        yield run
