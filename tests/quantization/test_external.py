"""gptqmodel behind the interface of our own engine, on a tiny Llama: what it writes is what our loader measures.

gptqmodel prints and changes settings of the process it is imported in; it quantizes in another one here.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from qlora.data.calibration import CalibrationRow
from qlora.errors import UserError
from qlora.models.checkpoint import CheckpointReader
from qlora.models.gptq_format import quantization_method, read_quantization_config
from qlora.models.loading import load_gptq, load_plain
from qlora.quantization import GPTQSettings
from qlora.quantization.external import check_options, quantize_with_gptqmodel

QUANTIZE = """
import json, sys
from pathlib import Path
from qlora.data.calibration import CalibrationRow
from qlora.models.checkpoint import CheckpointReader
from qlora.quantization import GPTQSettings
from qlora.quantization.external import quantize_with_gptqmodel
source, output, method, settings, rows = sys.argv[1:]
rows = [CalibrationRow(tuple(ids), None) for ids in json.loads(rows)]
settings, output = GPTQSettings(**json.loads(settings)), Path(output)
output.mkdir()
report = quantize_with_gptqmodel(
    CheckpointReader(Path(source)), output, rows, settings, method=method, device="cpu"
)
print("RESULT", json.dumps(report.to_dict()))
"""
# Logits of a checkpoint through a library, with the plain PyTorch kernel.
LOGITS = """
import json, sys
import torch
how, directory, ids = sys.argv[1:]
ids = torch.tensor([json.loads(ids)])
if how == "transformers":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", dtype=torch.bfloat16)
else:
    from gptqmodel import BACKEND, GPTQModel
    method = json.load(open(directory + "/quantize_config.json"))["quant_method"]
    backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(directory, device="cpu", backend=backend, dtype=torch.bfloat16).model
kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "qweight")}
print("RESULT", json.dumps([kinds, model(ids).logits[0].float().tolist()]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random bf16 Llama with a tied head and a tokenizer, sizes as gptqmodel's AWQ takes them."""
    directory = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    alphabet = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:150])}
    backend = Tokenizer(models.BPE(alphabet, []))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def token_rows(rows) -> list[list[int]]:
    return [list(row.input_ids) for row in rows]


@pytest.fixture
def quantized(source, token_rows, through_gptqmodel):
    """`quantized(output, method, **settings)`: the report, and what the checkpoint says of itself."""

    def quantize(output, method, **settings):
        arguments = source, output.name, method, json.dumps(settings), json.dumps(token_rows)
        report = through_gptqmodel(QUANTIZE, *arguments, folder=output.parent)
        assert [path.name for path in output.parent.iterdir()] == [output.name]  # no folder `logs` beside it
        config = json.loads((output / "config.json").read_text())["quantization_config"]
        return report, config

    return quantize


def test_gptq_by_gptqmodel_is_a_checkpoint_like_ours(
    source, tmp_path, token_rows, quantized, through_gptqmodel, supported
):
    output = tmp_path / "gptq"
    report, config = quantized(
        output, "gptq", group_size=32, modules={r"layers\.0\.mlp": {"bits": 8}}, skip=["o_proj$"]
    )
    assert [module["name"] for module in report["modules"]][:3] == [
        f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"
    ]
    assert len(report["modules"]) == 12 and report["tokens"] == sum(map(len, token_rows))
    assert report["parameters"] == 2 * (3 * 64 * 64 + 3 * 64 * 128)
    assert len(report["warnings"]) == 1
    assert "no counterpart for asymmetric_calibration, prompt_weight" in report["warnings"][0]

    settings = read_quantization_config(output)
    assert (settings.bits, settings.group_size, settings.sym, settings.desc_act) == (4, 32, True, False)
    assert settings.for_module("model.layers.0.mlp.up_proj").bits == 8
    assert settings.for_module("model.layers.1.self_attn.o_proj") is None
    assert config["modules_in_block_to_quantize"] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    ]
    written = "".join(path.read_text() for path in output.glob("*.json"))
    assert str(tmp_path) not in written and "/tmp" not in written
    assert sorted(path.name for path in output.iterdir()) == sorted(
        {path.name for path in source.iterdir()} | {"quantize_config.json"}
    )
    kept, original = CheckpointReader(output), CheckpointReader(source)
    assert "lm_head.weight" not in kept.names()
    for name in ("model.norm.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert torch.equal(kept.read(name), original.read(name))

    ids = token_rows[0]
    kinds, theirs = through_gptqmodel(LOGITS, "gptqmodel", output, json.dumps(ids))
    assert len(kinds) == 12
    assert_measured(output, source, ids, theirs)
    supported({"features": ["GPTQ by gptqmodel", "into the dequantized base"], "refused": None})


def test_awq_by_gptqmodel_is_measured_as_it_is_served(
    source, tmp_path, token_rows, quantized, through_gptqmodel, supported
):
    output = tmp_path / "awq"
    report, config = quantized(output, "awq", group_size=32, sym=False)
    assert (config["quant_method"], config["zero_point"], config["version"]) == ("awq", True, "gemm")
    assert quantization_method(output) == "awq"
    assert len(report["modules"]) == 14
    for reader in ("gptqmodel", "transformers"):
        kinds, theirs = through_gptqmodel(LOGITS, reader, output, json.dumps(token_rows[0]))
        assert len(kinds) == 14
        assert_measured(output, source, token_rows[0], theirs)
    supported({"features": ["AWQ by gptqmodel", "into the dequantized base"], "refused": None})


def assert_measured(output, source, ids, theirs):
    """Our loader's logits are the library's up to bf16, and both are off the source's by more than that."""
    expected = torch.tensor(theirs)
    with torch.no_grad():
        ours = load_gptq(output)(torch.tensor([ids])).logits[0].float()
        full = load_plain(source)(torch.tensor([ids])).logits[0].float()
    noise = (ours - expected).norm() / expected.norm()
    error = (ours - full).norm() / full.norm()
    assert noise < 0.03 and 4 * noise < error < 0.3, (noise, error)


def test_awq_words_are_unpacked_as_gptqmodel_does(through_gptqmodel):
    code = """
import json, torch
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq
from qlora.models.awq_format import AWQTensors, dequantize, unpack
generator = torch.Generator().manual_seed(0)
codes = torch.randint(0, 16, (96, 64), generator=generator, dtype=torch.int32)
zeros = torch.randint(0, 16, (3, 64), generator=generator, dtype=torch.int32)
scales = torch.rand(3, 64, generator=generator).half()
qweight, qzeros = pack_awq(codes, zeros, 4)
ours = dequantize(AWQTensors(qweight, qzeros, scales), torch.float16)
theirs = dequantize_gemm(qweight, qzeros, scales, 4, 32).T
print("RESULT", json.dumps([torch.equal(unpack(qweight).int(), codes), torch.equal(ours, theirs.half())]))
"""
    assert through_gptqmodel(code) == [True, True]


def test_options_without_counterpart_are_refused():
    assert "asymmetric_calibration" in check_options(GPTQSettings(), "gptq")
    with pytest.raises(UserError, match="quantize.prompt_weight: gptqmodel has no counterpart for it in gptq"):
        check_options(GPTQSettings(prompt_weight=0.25), "gptq")
    with pytest.raises(UserError, match="quantize.damp: .* in awq"):
        check_options(GPTQSettings(damp=0.05), "awq")


def test_only_a_checkpoint_on_disk_can_be_quantized(tmp_path):
    with pytest.raises(UserError, match="merge.write"):
        quantize_with_gptqmodel(object(), tmp_path, [CalibrationRow((1,), None)], GPTQSettings(), device="cpu")
