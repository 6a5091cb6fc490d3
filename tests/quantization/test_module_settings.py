"""Settings that differ between modules, through our own engine: written, read back by our loader and by gptqmodel."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora.errors import UserError
from qlora.models.checkpoint import CheckpointReader
from qlora.models.gptq_format import read_quantization_config
from qlora.models.loading import load_gptq
from qlora.quantization import GPTQSettings, quantize_checkpoint

SETTINGS = GPTQSettings(
    group_size=32, modules={r"layers\.1\.mlp": {"bits": 8}, r"\.(q|k|v)_proj": {"bits": 3}}, skip=(r"layers\.2\.",)
)
THROUGH_GPTQMODEL = """
import json, sys
import torch
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
bits = {name: module.bits for name, module in model.named_modules() if hasattr(module, "qweight")}
print("RESULT", json.dumps([bits, model(torch.tensor([json.loads(sys.argv[2])])).logits[0].float().tolist()]))
"""


@pytest.fixture
def checkpoint(save_model, output_dir, rows):
    quantize_checkpoint(CheckpointReader(save_model("llama", torch.float16)), output_dir, rows, SETTINGS, device="cpu")
    return output_dir


def expected_bits(names: set[str]) -> dict[str, int]:
    kinds = {"mlp": 4, "q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 4}
    found = {name: next(bits for kind, bits in kinds.items() if kind in name) for name in names}
    return found | {name: 8 for name in names if "layers.1.mlp" in name}


def test_every_module_has_its_own_settings(checkpoint, save_model):
    reader, original = CheckpointReader(checkpoint), CheckpointReader(save_model("llama", torch.float16))
    packed = {name.removesuffix(".qweight") for name in reader.names() if name.endswith(".qweight")}
    assert len(packed) == 14 and not any("layers.2." in name for name in packed)
    for name, bits in expected_bits(packed).items():
        words, inputs = reader.spec(f"{name}.qweight").shape[0], reader.spec(f"{name}.g_idx").shape[0]
        assert words * 32 == inputs * bits
        assert read_quantization_config(checkpoint).for_module(name).bits == bits
    skipped = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(reader.read(skipped), original.read(skipped))
    assert load_gptq(checkpoint, torch.float32).model.layers[2].mlp.up_proj.weight.dtype == torch.float32


def test_gptqmodel_reads_the_same(checkpoint, rows, through_gptqmodel):
    # gptqmodel wants a tokenizer beside every model.
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a", pad_token="a").save_pretrained(checkpoint)
    ids = list(rows[0].input_ids)
    bits, logits = through_gptqmodel(THROUGH_GPTQMODEL, checkpoint, json.dumps(ids))
    assert len(bits) == 14 and bits == expected_bits(set(bits))
    with torch.no_grad():
        ours = load_gptq(checkpoint, torch.float16)(torch.tensor([ids])).logits[0].float()
    torch.testing.assert_close(ours, torch.tensor(logits), rtol=0.01, atol=0.01)


def test_what_engines_fuse_is_not_parted(save_model, output_dir, rows):
    settings = GPTQSettings(group_size=32, modules={"q_proj": {"bits": 8}})
    with pytest.raises(UserError, match="as one module .qkv_proj."):
        quantize_checkpoint(CheckpointReader(save_model("llama")), output_dir, rows, settings, device="cpu")
    assert not list(output_dir.iterdir())
