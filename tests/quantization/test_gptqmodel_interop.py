"""A checkpoint of the real SmolLM2, run by transformers + gptqmodel and by our dequantizing loader: the same text.

gptqmodel's plain kernel forms scale·(q − zero) in fp16 before it multiplies, so the reference is loaded in fp16 and
computes in fp32 as the kernel then does. gptqmodel prints and compiles at import; it runs in another process.
"""

import json

import pytest
import torch

from qlora.data.calibration import CalibrationRow
from qlora.models.loading import load_gptq, load_tokenizer
from qlora.quantization import GPTQSettings, quantize_checkpoint

PROMPTS = ("What is the capital of France?", "Write a haiku about the sea.", "Count from one to ten.")
THROUGH_GPTQMODEL = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, GPTQConfig
directory, prompts = sys.argv[1], json.loads(sys.argv[2])
options = dict(dtype=torch.float32, device_map="cpu", quantization_config=GPTQConfig(bits=4, backend="gptq_torch"))
model = AutoModelForCausalLM.from_pretrained(directory, **options)
kinds = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
options = dict(max_new_tokens=32, min_new_tokens=32, do_sample=False)
out = [model.generate(torch.tensor([ids]), **options)[0].tolist() for ids in prompts]
print("RESULT", json.dumps([sorted(kinds), out]))
"""


@pytest.fixture(scope="module")
def checkpoint(through_gptqmodel, smollm2, tmp_path_factory):
    """SmolLM2, 4 bits in groups of 64, calibrated on a few sentences."""
    output = tmp_path_factory.mktemp("gptq") / "smollm2"
    output.mkdir()
    tokenizer = load_tokenizer(smollm2)
    texts = ["The river bends twice before it meets the sea.", "Twelve apples and three pears make fifteen fruits."]
    rows = [CalibrationRow(tuple(tokenizer(text)["input_ids"])) for text in texts]
    quantize_checkpoint(smollm2, output, rows, GPTQSettings(group_size=64), device="cpu")
    return output


def test_gptqmodel_generates_token_for_token_what_our_loader_does(checkpoint, through_gptqmodel):
    tokenizer = load_tokenizer(checkpoint)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in PROMPTS
    ]
    arguments = checkpoint, json.dumps(prompts)
    kinds, theirs = through_gptqmodel(THROUGH_GPTQMODEL, *arguments, GPTQ_TORCH_CACHE_WEIGHTS="1")
    assert kinds == ["TorchLinear"]

    ours = load_gptq(checkpoint, torch.float16).float()
    for prompt, expected in zip(prompts, theirs, strict=True):
        options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
        assert ours.generate(torch.tensor([prompt]), **options)[0].tolist() == expected
