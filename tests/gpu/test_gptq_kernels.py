"""Our checkpoints through the CUDA kernels that serve them: gptqmodel's Marlin, ExLlamaV2, Triton and plain torch, and
ExLlamaV2's own loader. Each follows our dequantized model token for token up to the first tie.

    pytest -m gpu tests/gpu/test_gptq_kernels.py

Marlin and ExLlamaV2 are built with nvcc at first use, minutes each. A kernel that cannot be built is skipped with the
builder's words; everything else that goes wrong fails. Each runs in a process of its own, since they print and patch.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.data.calibration import CalibrationRow
from qlora.models.loading import load_gptq
from qlora.quantization import GPTQSettings, quantize_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = "cuda:0"
VOCABULARY = 512
STEPS = 24
# ExLlamaV2 has kernels of its own for fewer than 50 tokens.
PROMPT_LENGTHS = (7, 90)
# Of the spread of the logits: kernels multiply, and ExLlamaV2 also adds, in fp16.
NOISE = 0.03
SERVED = ((4, 128), (4, 64), (4, 32))
"""(bits, group size) of every kernel."""
# Engines that find no base and no scaling in config.json, for want of the keys that they read, take others in silence.
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BACKENDS = {
    "gptq_marlin": ("marlin_fp16", (*SERVED, (8, 128))),
    "gptq_exllama_v2": ("exllamav2", SERVED),
    "gptq_triton": ("", (*SERVED, (8, 128), (2, 32))),
    "gptq_torch": ("", (*SERVED, (8, 128), (3, 64), (2, 32))),
}
"""gptqmodel's kernels: the extension that each builds, if any, and the formats that it is tried on."""

# Greedy continuation without a cache, with the logits of every step; the same words for both sides.
GREEDY = """
import torch
@torch.inference_mode()
def greedy(logits_of, prompt, steps):
    ids, seen = list(prompt), []
    for _ in range(steps):
        seen.append(logits_of(torch.tensor([ids]))[0, -1].float().cpu())
        ids.append(int(seen[-1].argmax()))
    return torch.tensor(ids[len(prompt):]), torch.stack(seen)
"""
THROUGH_GPTQMODEL = (
    GREEDY
    + """
import json, sys
from gptqmodel import BACKEND, GPTQModel, extension
from safetensors.torch import save_file
backend, builds, device, steps, prompts, runs = json.loads(sys.argv[1])
if builds and not extension.is_available(builds):
    print("UNAVAILABLE", " ".join(extension.error(builds).split())[-500:])
    sys.exit()
kinds = set()
for directory, output in runs:
    model = GPTQModel.load(directory, backend=BACKEND(backend), device=device, dtype=torch.float16).model.eval()
    kinds |= {type(module).__name__ for module in model.modules() if hasattr(module, "SUPPORTS_BACKENDS")}
    found = [greedy(lambda ids: model(ids.to(device)).logits, prompt, steps) for prompt in prompts]
    tensors = {f"tokens.{i}": tokens for i, (tokens, _) in enumerate(found)}
    save_file(tensors | {f"logits.{i}": logits for i, (_, logits) in enumerate(found)}, output)
print("RESULT", json.dumps(sorted(kinds)))
"""
)
THROUGH_EXLLAMAV2 = (
    GREEDY
    + """
import json, sys
_, _, device, steps, prompts, runs = json.loads(sys.argv[1])
try:
    from exllamav2 import ExLlamaV2, ExLlamaV2Config
except (ImportError, OSError, RuntimeError) as error:
    print("UNAVAILABLE", " ".join(str(error).split())[-500:])
    sys.exit()
from safetensors.torch import save_file
for directory, output in runs:
    config = ExLlamaV2Config(directory)
    config.max_seq_len = config.max_input_len = 256
    # Of ExLlamaV2 0.3.2's attention without flash-attn and xformers, the one with SDPA takes no causal mask.
    config.no_flash_attn = config.no_xformers = config.no_sdpa = True
    model = ExLlamaV2(config)
    model.load()
    found = [greedy(lambda ids: model.forward(ids), prompt, steps) for prompt in prompts]
    tensors = {f"tokens.{i}": tokens for i, (tokens, _) in enumerate(found)}
    save_file(tensors | {f"logits.{i}": logits for i, (_, logits) in enumerate(found)}, output)
print("RESULT", json.dumps(["ExLlamaV2"]))
"""
)
exec(GREEDY)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def checkpoints(tiny_model, tmp_path_factory) -> dict[tuple[int, int], Path]:
    """A small Llama whose shapes every kernel takes (outputs by 64, inputs by 128), in every format."""
    source = tmp_path_factory.mktemp("kernels") / "source"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.1,
        rope_parameters=ROPE,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / name, source)
    generator = torch.Generator().manual_seed(1)
    rows = [
        CalibrationRow(tuple(torch.randint(3, VOCABULARY, (128,), generator=generator).tolist()), None)
        for _ in range(16)
    ]
    found = {}
    for bits, group_size in dict.fromkeys(form for _, forms in BACKENDS.values() for form in forms):
        output = source.with_name(f"w{bits}g{group_size}")
        output.mkdir()
        quantize_checkpoint(source, output, rows, GPTQSettings(bits=bits, group_size=group_size), device=DEVICE)
        found[bits, group_size] = output
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_gptqmodel_kernels_follow_our_dequantized_model(backend, checkpoints, prompts, tmp_path):
    pytest.importorskip("gptqmodel", reason='needs pip install "qlora[gptq]"')
    builds, forms = BACKENDS[backend]
    kinds = compare(THROUGH_GPTQMODEL, backend, builds, {form: checkpoints[form] for form in forms}, prompts, tmp_path)
    assert len(kinds) == 1  # the kernel that was asked for, everywhere


def test_exllamav2s_own_loader_follows_our_dequantized_model(checkpoints, prompts, tmp_path):
    if importlib.util.find_spec("exllamav2") is None:  # its import builds the kernels
        pytest.skip("needs pip install exllamav2")
    compare(THROUGH_EXLLAMAV2, "", "", {form: checkpoints[form] for form in SERVED}, prompts, tmp_path)


def compare(code, backend, builds, checkpoints, prompts, folder) -> list[str]:
    """Run `code` on the checkpoints and hold what it says against our loader; the kernels' class names."""
    outputs = {form: folder / f"w{form[0]}g{form[1]}.safetensors" for form in checkpoints}
    runs = [(str(checkpoints[form]), str(outputs[form])) for form in checkpoints]
    command = [sys.executable, "-c", code, json.dumps([backend, builds, DEVICE, STEPS, prompts, runs])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    if "UNAVAILABLE " in result.stdout:
        pytest.skip(f"cannot be built here: {result.stdout.split('UNAVAILABLE ')[1].splitlines()[0]}")
    for form, directory in checkpoints.items():
        model, theirs = load_gptq(directory, torch.float16, DEVICE), load_file(outputs[form])
        for index, prompt in enumerate(prompts):
            tokens, logits = greedy(lambda ids, model=model: model(ids.to(DEVICE)).logits, prompt, STEPS)  # noqa: F821
            same_until_a_tie(form, tokens, logits, theirs[f"tokens.{index}"], theirs[f"logits.{index}"])
    return json.loads(result.stdout.split("RESULT ")[1].splitlines()[0])


def same_until_a_tie(form, tokens, logits, their_tokens, their_logits) -> None:
    """Equal tokens up to the first step at which our two best are within the noise; logits within it up to there.

    Behind another token the texts differ, and so do the logits: the first other token ends the comparison.
    """
    allowed = NOISE * logits.std()
    others = (tokens != their_tokens).nonzero().flatten().tolist()
    if others:
        best, second = logits[others[0]].topk(2).values
        assert best - second < 2 * allowed, f"{form}: another token at step {others[0]}, and it is no tie"
    compared = others[0] + 1 if others else len(tokens)
    assert (their_logits[:compared] - logits[:compared]).abs().max() < allowed, form
