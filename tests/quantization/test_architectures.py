"""Every supported architecture: NF4 training → merge → GPTQ → reload, ours and gptqmodel's, on tiny random models."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from qlora.data.calibration import CalibrationRow
from qlora.errors import UserError
from qlora.merging import MergedSource, merge_adapter
from qlora.models.checkpoint import CheckpointReader
from qlora.models.gptq_format import TENSOR_NAMES, GPTQTensors, dequantize
from qlora.models.loading import attach_adapter, load_base, load_gptq, load_plain
from qlora.models.provenance import FILE_NAME, QuantizationSettings, write_provenance
from qlora.quantization import GPTQSettings, quantize_checkpoint
from qlora.quantization.experts import Experts, fused_experts
from qlora.quantization.skeleton import Skeleton
from qlora.recipe import Lora, Model

SETTINGS = GPTQSettings(bits=4, group_size=32)
BASIC = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Rows of 64·n inputs: bitsandbytes on CPUs dequantizes others wrongly.
SIZES = BASIC | {"intermediate_size": 128, "max_position_embeddings": 64, "initializer_range": 0.1}
GROUPED = SIZES | {"num_key_value_heads": 2}
CONFIGS = {
    # Its vocabulary fills no whole words of packed codes, as that of a base with added tokens.
    "llama": lambda: LlamaConfig(**GROUPED | {"vocab_size": 163}, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**GROUPED, pad_token_id=0),
    "gpt2": lambda: GPT2Config(
        vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=128, initializer_range=0.1
    ),
    "opt": lambda: OPTConfig(**BASIC, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64, init_std=0.1),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "falcon": lambda: FalconConfig(
        **BASIC, multi_query=True, parallel_attn=True, new_decoder_architecture=False, initializer_range=0.1
    ),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **GROUPED,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    ),
}
# transformers 5 + gptqmodel 7.6 leave these in 16 bits, or cannot build them; GPTQModel.load reads them.
NOT_THROUGH_TRANSFORMERS = {"gpt2", "falcon", "mixtral", "qwen3_moe"}
TOKENS = torch.randint(0, 160, (4, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def calibration() -> list[CalibrationRow]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 160, (16, 32), generator=generator).tolist()
    return [CalibrationRow(tuple(row), None) for row in rows]


def save_base(config, directory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    # Biases start at 0 and norms at 1, where a forgotten one would not be noticed.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def train(base, adapter, quantization="nf4", **lora):
    """Two steps of training in fp32 compute, so that what is compared is the merge and no rounding."""
    settings = Model(base=str(base), compute_dtype="float32", quantization=quantization)
    model = attach_adapter(load_base(base, settings, "cpu", quantized=True), Lora(r=4, alpha=8, **lora))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(adapter)
    write_provenance(
        model,
        adapter / FILE_NAME,
        base_id="tiny",
        revision=None,
        settings=QuantizationSettings(quantization, quantization != "none", torch.float32),
    )
    return model.eval()


def merge(base, adapter, output):
    output.mkdir()
    merge_adapter(base, adapter, output, base="dequantized", dtype=torch.float32)
    return output


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits.float()


def dequantized_by_hand(gptq, merged, output):
    """`merged` with the weights that `gptq` stands for: an ordinary checkpoint, made without our loader."""
    tensors, packed = load_file(merged / "model.safetensors"), load_file(gptq / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")]
    for name in names:
        weight = dequantize(GPTQTensors(*(packed[f"{name}.{kind}"] for kind in TENSOR_NAMES)), 4)
        held = tensors[f"{name}.weight"]
        # Of a square weight the shape does not say whether it is transposed, closeness does.
        ways = [way for way in (weight, weight.T) if way.shape == held.shape]
        tensors[f"{name}.weight"] = min(ways, key=lambda way: (way - held).norm()).contiguous()
    output.mkdir()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text((merged / "config.json").read_text())
    return output, names


@pytest.mark.parametrize("kind", CONFIGS)
def test_train_merge_quantize_reload(kind, tmp_path, calibration):
    base = save_base(CONFIGS[kind](), tmp_path / "base")
    trained = train(base, tmp_path / "adapter")
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged")
    plain = load_plain(merged, torch.float32)
    expected = logits(trained)
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)
    assert (logits(load_plain(base, torch.float32)) - expected).abs().max() > 0.01, "the adapter has an effect"

    gptq = tmp_path / "gptq"
    gptq.mkdir()
    report = quantize_checkpoint(merged, gptq, calibration, SETTINGS, device="cpu")
    oracle, names = dequantized_by_hand(gptq, merged, tmp_path / "oracle")
    assert set(names) == {module.name for module in report.modules} == every_linear(merged)
    reloaded = logits(load_gptq(gptq, torch.float32))
    assert torch.equal(reloaded, logits(load_plain(oracle, torch.float32)))
    assert (reloaded - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "mixtral"])
def test_a_merge_that_is_never_written_gives_the_same_checkpoint(kind, tmp_path, calibration):
    base = save_base(CONFIGS[kind](), tmp_path / "base")
    train(base, tmp_path / "adapter")
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged")
    computed = MergedSource(base, tmp_path / "adapter", merged, base="dequantized", dtype=torch.float32, device="cpu")
    files = []
    for source in (merged, computed):
        gptq = tmp_path / type(source).__name__
        gptq.mkdir()
        quantize_checkpoint(source, gptq, calibration, SETTINGS, device="cpu")
        files.append((gptq / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def every_linear(directory):
    """Names of all matrices inside the layers of a checkpoint but routers."""
    inside = [
        name.removesuffix(".weight")
        for name, tensor in load_file(directory / "model.safetensors").items()
        if tensor.ndim == 2 and any(f".{index}." in name for index in range(2))
    ]
    return {name for name in inside if not name.endswith(".gate")}


def test_every_linear_of_the_base_is_in_four_bits(tmp_path):
    from bitsandbytes.nn import Linear4bit

    for kind in ("gpt2", "falcon"):
        base = save_base(CONFIGS[kind](), tmp_path / kind)
        model = load_base(base, Model(base=str(base)), "cpu", quantized=True)
        assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 8, kind


def test_the_adapter_of_a_16_bit_gpt2_merges(tmp_path):
    base = save_base(CONFIGS["gpt2"](), tmp_path / "base")
    trained = train(base, tmp_path / "adapter", "none", dora=True)
    merged = load_plain(merge(base, tmp_path / "adapter", tmp_path / "merged"), torch.float32)
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_head_that_is_stored_under_another_name_merges(tied, tmp_path):
    config = CONFIGS["gpt_neox"]()
    config.tie_word_embeddings = tied
    base = save_base(config, tmp_path / "base")
    trained = train(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merged = load_plain(merge(base, tmp_path / "adapter", tmp_path / "merged"), torch.float32)
    assert "embed_out.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-4, rtol=1e-4)


def test_gpt2_without_the_prefix_of_its_decoder(tmp_path, calibration):
    base = save_base(CONFIGS["gpt2"](), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    trained = train(base, tmp_path / "adapter")
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load_plain(merged, torch.float32)), logits(trained), atol=1e-4, rtol=1e-4)
    gptq = tmp_path / "gptq"
    gptq.mkdir()
    quantize_checkpoint(merged, gptq, calibration, SETTINGS, device="cpu")
    oracle, names = dequantized_by_hand(gptq, merged, tmp_path / "oracle")
    assert "h.1.mlp.c_proj" in names
    assert torch.equal(logits(load_gptq(gptq, torch.float32)), logits(load_plain(oracle, torch.float32)))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_all_linear_leaves_experts_and_routers_out(kind, tmp_path):
    base = save_base(CONFIGS[kind](), tmp_path / "base")
    trained = train(base, tmp_path / "adapter")
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert names and all(".self_attn." in name for name in names)
    with pytest.raises(UserError, match="experts cannot have an adapter"):
        train(base, tmp_path / "other", target_modules=["q_proj", "gate_proj", "up_proj", "w1", "w3"])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_taken_apart_compute_the_same(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), experts_implementation="eager")
    fused = next(iter(fused_experts(model).values()))
    apart = Experts(fused)
    inner = fused.down_proj.shape[2]
    for expert, gate_up, down in zip(apart, fused.gate_up_proj, fused.down_proj, strict=True):
        state = {"gate_proj.weight": gate_up[:inner], "up_proj.weight": gate_up[inner:], "down_proj.weight": down}
        expert.load_state_dict(state, assign=True)
    seen = []
    apart[2].down_proj.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), apart.tokens.clone())))
    x = torch.randn(10, 64)
    chosen = torch.tensor([[0, 2], [2, 3], [0, 3], [3, 0], [0, 2], [0, 3], [0, 3], [3, 2], [0, 3], [0, 3]])
    weights = torch.rand(10, 2)
    torch.testing.assert_close(apart(x, chosen, weights), fused(x, chosen, weights), atol=1e-6, rtol=1e-5)
    assert [(count, tokens.tolist()) for count, tokens in seen] == [(4, [0, 1, 4, 7])]


def test_experts_that_no_token_chose_are_rounded_and_named(tmp_path):
    base = save_base(CONFIGS["mixtral"](), tmp_path / "base")
    gptq = tmp_path / "gptq"
    gptq.mkdir()
    report = quantize_checkpoint(base, gptq, [CalibrationRow((5,), None)], SETTINGS, device="cpu")
    unreached = [module.name for module in report.modules if not module.tokens]
    assert len(unreached) == 2 * 2 * 3 and all(".block_sparse_moe.experts." in name for name in unreached)
    assert any("no calibration token reached" in warning for warning in report.warnings)
    assert torch.isfinite(logits(load_gptq(gptq, torch.float32))).all()


def test_experts_of_another_kind_are_refused_by_name(tmp_path, calibration):
    base = save_base(GptOssConfig(**GROUPED, head_dim=16, num_local_experts=4), tmp_path / "base")
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts: the experts of GptOssExperts compute"):
        quantize_checkpoint(base, tmp_path, calibration, SETTINGS, device="cpu", attn_implementation="eager")


def test_modules_that_are_stored_under_other_names(tmp_path):
    config = Gemma3Config(
        text_config=CONFIGS["gemma3"]().to_dict(),
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    names = {
        "gemma3": (save_base(config, tmp_path / "gemma3"), "language_model.model.layers.1.", "mlp.up_proj."),
        "mixtral": (save_base(CONFIGS["mixtral"](), tmp_path / "mixtral"), "model.layers.1.", "mlp.experts.3.up_proj."),
    }
    for kind, (base, layer, linear) in names.items():
        skeleton = Skeleton(CheckpointReader(base), attn_implementation="sdpa", trust_remote_code=False)
        assert skeleton.checkpoint_name(f"{skeleton.layers_name}.1.") == layer
        expected = "block_sparse_moe.experts.3.w3." if kind == "mixtral" else linear
        assert skeleton.checkpoint_name(f"{skeleton.layers_name}.1.{linear}") == layer + expected
        assert skeleton.checkpoint_name(f"{skeleton.layers_name}.1.{linear}weight") == f"{layer}{expected}weight"


THROUGH_GPTQMODEL = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, GPTQConfig
from gptqmodel import BACKEND, GPTQModel
tokens = torch.load(sys.argv[1])
for way, directory in (item.split("=") for item in sys.argv[2:]):
    if way == "transformers":
        options = dict(dtype=torch.float32, quantization_config=GPTQConfig(bits=4, backend="gptq_torch"))
        model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", **options)
    else:
        model = GPTQModel.load(directory, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model.float()
    packed = sum(hasattr(module, "qweight") for module in model.modules())
    with torch.no_grad():
        torch.save((packed, model.eval()(tokens).logits), Path(directory) / "theirs.pt")
print("RESULT", len(sys.argv) - 2)
"""


def names_of_gptqmodel(directory):
    """Rename: gptqmodel 7.6 reads Mixtral under the names of transformers 5's modules, not of its checkpoints."""
    renamed = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_gptqmodel_computes_what_our_loader_does(tmp_path, calibration, through_gptqmodel):
    """Packed linears in place of every linear, and the logits of the dequantized model, for every architecture."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = models.WordLevel({str(token): token for token in range(160)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), eos_token="1", pad_token="1")
    ours, jobs = {}, []
    for kind, config in CONFIGS.items():
        base = save_base(config(), tmp_path / f"base-{kind}")
        tokenizer.save_pretrained(base)
        gptq = tmp_path / kind
        gptq.mkdir()
        report = quantize_checkpoint(base, gptq, calibration, SETTINGS, device="cpu")
        # gptqmodel's plain kernel holds dequantized weights in fp16.
        ours[kind] = len(report.modules), logits(load_gptq(gptq, torch.float16).float())
        if kind == "mixtral":
            names_of_gptqmodel(gptq)
        jobs.append(f"{'gptqmodel' if kind in NOT_THROUGH_TRANSFORMERS else 'transformers'}={gptq}")
    torch.save(TOKENS, tmp_path / "tokens.pt")
    done = through_gptqmodel(THROUGH_GPTQMODEL, tmp_path / "tokens.pt", *jobs, GPTQ_TORCH_CACHE_WEIGHTS="1")
    assert done == len(CONFIGS)
    for kind, (modules, expected) in ours.items():
        packed, found = torch.load(tmp_path / kind / "theirs.pt")
        assert packed == modules, kind
        # GPTQModel.load computes its products in fp16.
        tolerance = 1e-3 if kind in NOT_THROUGH_TRANSFORMERS else 1e-6
        assert (found - expected).norm() < tolerance * expected.norm(), kind
