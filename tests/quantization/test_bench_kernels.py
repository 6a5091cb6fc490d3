"""gptqmodel's kernels as `qlora bench` loads them: the one that was asked for, and the same model as ours."""

import json

import pytest
import torch

from qlora.evaluation.bench_models import Subject, load

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
THROUGH_GPTQMODEL = """
import json, sys
import torch
from qlora.evaluation.bench_models import Subject, load
directory, form, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
loaded = load(Subject(directory, form, "torch"), "float16", "cpu")
kinds = {type(module).__name__ for module in loaded.model.modules() if hasattr(module, "SUPPORTS_BACKENDS")}
with torch.no_grad():
    logits = loaded.model(torch.tensor([ids])).logits[0, -1].float()
print("RESULT", json.dumps([sorted(kinds), loaded.build_seconds, logits.tolist()]))
"""


@pytest.mark.parametrize(("form", "kind"), [("gptq", "TorchLinear"), ("awq", "AwqTorchLinear")])
def test_a_kernel_of_gptqmodel_is_the_same_model(form, kind, save_packed, through_gptqmodel):
    directory = str(save_packed(form))
    kinds, built, theirs = through_gptqmodel(THROUGH_GPTQMODEL, directory, form, json.dumps(IDS))
    assert kinds == [kind] and built == 0
    ours = load(Subject(directory, form, "qlora"), "float16", "cpu").model
    with torch.no_grad():
        logits = ours(torch.tensor([IDS])).logits[0, -1].float()
    assert (torch.tensor(theirs) - logits).abs().max() < 0.01 * logits.std()  # both compute in fp16
