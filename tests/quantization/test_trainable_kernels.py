"""A GPTQ checkpoint in training: only kernels with a backward pass, whose gradients are the dequantized model's.

ExLlama's and Marlin's kernels have no backward pass: gradients stop at them, in silence or with an error. gptqmodel
prints and compiles at import, so that it runs in a process of its own. On a machine without a GPU the choice for CUDA
is asked of gptqmodel's selector with every kernel's own check of the machine switched off.
"""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from qlora.models.loading import load_gptq
from qlora.quantization import GPTQSettings, quantize_checkpoint

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]]

THROUGH_GPTQMODEL = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig
directory, adapter, tokens, output = *sys.argv[1:3], json.loads(sys.argv[3]), sys.argv[4]
options = dict(dtype=torch.float32, device_map="cpu")
options["quantization_config"] = GPTQConfig(bits=4, backend="auto_trainable")
base = AutoModelForCausalLM.from_pretrained(directory, **options)
kernels = {type(module) for module in base.modules() if hasattr(module, "SUPPORTS_TRAINING")}
model = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
ids = torch.tensor(tokens)
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
save_file({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, output)
print("RESULT", json.dumps([loss.item(), {kernel.__name__: kernel.SUPPORTS_TRAINING for kernel in kernels}]))
"""

CHOICE_FOR_CUDA = """
import json
from contextlib import ExitStack
from unittest.mock import patch
import torch
from gptqmodel import BACKEND
from gptqmodel.models._const import DEVICE
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils import importer
kernels = importer.AUTO_BACKEND_KERNEL_MAPPING[METHOD.GPTQ][FORMAT.GPTQ].values()
options = dict(group_size=128, desc_act=False, sym=True, device=DEVICE.CUDA, format=FORMAT.GPTQ, pack=False)
options |= dict(quant_method=METHOD.GPTQ, pack_dtype=torch.int32, multi_select=True)
select = lambda backend: [k.__name__ for k in importer.select_quant_linear(bits=4, backend=backend, **options)]
with ExitStack() as built:
    for kernel in kernels:  # as if every kernel were built and every device were there
        validate_device = BaseQuantLinear.validate_device.__func__.__get__(kernel)
        built.enter_context(patch.object(kernel, "validate_once", classmethod(lambda cls: (True, None))))
        built.enter_context(patch.object(kernel, "validate_device", validate_device))
    print("RESULT", json.dumps([select(BACKEND.AUTO), select(BACKEND.AUTO_TRAINABLE)]))
"""


def test_gradients_through_the_chosen_kernels_are_those_of_the_dequantized_model(
    save_model, output_dir, rows, tmp_path, through_gptqmodel
):
    quantize_checkpoint(save_model("llama"), output_dir, rows, GPTQSettings(group_size=32), device="cpu")
    torch.manual_seed(0)
    ours = get_peft_model(load_gptq(output_dir, torch.float16).float(), LoraConfig(**LORA)).train()
    ours.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor(TOKENS)
    expected_loss = ours(input_ids=ids, labels=ids).loss
    expected_loss.backward()

    output = tmp_path / "gradients.safetensors"
    arguments = output_dir, tmp_path / "adapter", json.dumps(TOKENS), output
    loss, kernels = through_gptqmodel(THROUGH_GPTQMODEL, *arguments)
    assert kernels and all(kernels.values())
    assert loss == pytest.approx(expected_loss.item(), rel=1e-3)
    found = load_file(output)
    expected = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) == 2 * 7 * 3
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.01 * gradient.norm(), name


def test_no_kernel_without_a_backward_pass_is_chosen_for_cuda(through_gptqmodel):
    for_serving, for_training = through_gptqmodel(CHOICE_FOR_CUDA)
    assert {"MarlinLinear", "ExllamaV2Linear"} <= set(for_serving)  # the test would notice them
    assert "TritonV2Linear" in for_training
    assert not [name for name in for_training if "Exllama" in name or "Marlin" in name or "Machete" in name]
