"""The packed layout: exact round trips, an independent decoder, and what is refused."""

import json

import numpy as np
import pytest
import torch

from qlora.errors import UserError
from qlora.models.gptq_format import (
    QUANTIZE_CONFIG_NAME,
    SUPPORTED_BITS,
    GPTQFormat,
    GPTQTensors,
    check_group_size,
    check_tensors,
    dequantize,
    pack,
    pack_rows,
    pack_zeros,
    packed_specs,
    quantization_config,
    read_quantization_config,
    unpack_rows,
    unpack_zeros,
)

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return request.param


def random_layer(seed: int, bits: int, *, sym: bool, device: str = "cpu"):
    """(codes [K, N], zeros [G, N], scales, g_idx) of a layer of random size."""
    generator = torch.Generator().manual_seed(seed)
    group_size = 32
    groups = int(torch.randint(1, 5, (), generator=generator))
    outputs = 32 * int(torch.randint(1, 4, (), generator=generator))
    codes = torch.randint(0, 2**bits, (groups * group_size, outputs), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (groups, outputs), generator=generator, dtype=torch.uint8)
    if sym:
        zeros.fill_(2 ** (bits - 1))
    scales = (torch.rand(groups, outputs, generator=generator) + 0.1).half()
    g_idx = torch.arange(groups * group_size) // group_size
    return tuple(tensor.to(device) for tensor in (codes, zeros, scales, g_idx))


def decode_bit_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of each column of int32 words, by unpacking every bit: nothing in common with the code under test."""
    stream = np.unpackbits(np.ascontiguousarray(words.T).astype("<i4").view(np.uint8), axis=1, bitorder="little")
    digits = stream.reshape(words.shape[1], -1, bits)
    return (digits * (1 << np.arange(bits))).sum(-1).T


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("seed", range(4))
def test_packed_layers_decode_to_what_went_in(seed, bits, sym, device):
    codes, zeros, scales, g_idx = random_layer(seed, bits, sym=sym, device=device)
    packed = pack(codes, zeros, scales, g_idx, bits)
    check_tensors("layer", packed, GPTQFormat(bits, 32, sym))

    assert torch.equal(unpack_rows(packed.qweight, bits), codes)
    assert torch.equal(unpack_zeros(packed.qzeros, bits), zeros)
    np.testing.assert_array_equal(decode_bit_stream(packed.qweight.cpu().numpy(), bits), codes.cpu().numpy())
    stored = decode_bit_stream(packed.qzeros.T.cpu().numpy(), bits).T
    np.testing.assert_array_equal((stored + 1) % 2**bits, zeros.cpu().numpy())

    difference = codes.float() - zeros.float().repeat_interleave(32, 0)
    expected = scales.float().repeat_interleave(32, 0) * difference
    assert torch.equal(dequantize(packed, bits), expected.T)
    assert torch.equal(dequantize(packed, bits, torch.bfloat16), expected.T.bfloat16())


@pytest.mark.parametrize(
    ("element", "words"),
    [
        (9, [0x38000000, 0, 0]),
        (10, [0xC0000000, 0x1, 0]),
        (21, [0, 0x80000000, 0x3]),
        (31, [0, 0, 0xE0000000]),
    ],
)
def test_three_bits_straddle_words(element, words):
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[element] = 7
    assert pack_rows(codes, 3)[:, 0].numpy().view(np.uint32).tolist() == words


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zeros_are_those_of_v1(bits, word):
    qzeros = pack_zeros(torch.full((2, 32), 2 ** (bits - 1)), bits)
    assert qzeros.unique().tolist() == [word]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_zero_point_zero_wraps(bits):
    zeros = torch.zeros(1, 32, dtype=torch.uint8)
    qzeros = pack_zeros(zeros, bits)
    assert qzeros.unique().tolist() == [-1]
    assert torch.equal(unpack_zeros(qzeros, bits), zeros)


def test_any_assignment_to_groups_is_dequantized():
    codes, zeros, scales, g_idx = random_layer(5, 4, sym=False)
    g_idx = g_idx[torch.randperm(len(g_idx), generator=torch.Generator().manual_seed(0))]
    expected = scales.float()[g_idx] * (codes.float() - zeros.float()[g_idx])
    assert torch.equal(dequantize(pack(codes, zeros, scales, g_idx, 4), 4), expected.T)


def test_scales_must_be_rounded_before_packing():
    codes, zeros, scales, g_idx = random_layer(0, 4, sym=True)
    with pytest.raises(ValueError, match="float16"):
        pack(codes, zeros, scales.float(), g_idx, 4)


def test_codes_must_fill_words():
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_rows(torch.zeros(12, 1, dtype=torch.uint8), 4)


def test_group_sizes_that_do_not_fit_are_named_with_those_that_do():
    shapes = {"layers.0.q_proj": (576, 576), "layers.0.k_proj": (192, 576), "layers.0.down_proj": (576, 1536)}
    check_group_size(shapes, 64)
    check_group_size(shapes, -1)
    with pytest.raises(UserError) as caught:
        check_group_size(shapes, 128)
    (problem,) = caught.value.problems
    assert problem.where == "layers.0.q_proj" and "576" in problem.what and "64, 32, -1" in problem.fix


def test_outputs_that_fill_no_word_are_refused():
    with pytest.raises(UserError, match="9 outputs"):
        check_group_size({"q_proj": (9, 64)}, 32)


def write_config(directory, **changes):
    config = quantization_config(GPTQFormat(4, 64)) | changes
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))


def test_config_says_what_engines_read(tmp_path):
    write_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["meta"].pop("quantizer").startswith("qlora:")
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "meta": {},
    }
    assert read_quantization_config(tmp_path) == GPTQFormat(bits=4, group_size=64, sym=True, desc_act=False)


def test_config_is_found_in_quantize_config_json(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / QUANTIZE_CONFIG_NAME).write_text('{"bits": 3, "group_size": 128, "desc_act": true, "sym": false}')
    assert read_quantization_config(tmp_path) == GPTQFormat(bits=3, group_size=128, sym=False, desc_act=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"bits": 5}, "bits is 5"),
        ({"dynamic": {"+:mlp": {"rotation": "hadamard"}}}, "dynamic changes rotation"),
    ],
)
def test_other_formats_are_refused(tmp_path, changes, message):
    write_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read_quantization_config(tmp_path)


def test_a_plain_checkpoint_is_not_gptq(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="not a quantized checkpoint"):
        read_quantization_config(tmp_path)


def test_settings_of_modules_are_read_from_dynamic(tmp_path):
    dynamic = {"-:.*layers\\.0": {}, ".*layers\\.1\\.": {"bits": 8}, "+:.*": {"group_size": 32}}
    write_config(tmp_path, dynamic=dynamic)
    settings = read_quantization_config(tmp_path)
    assert settings.for_module("model.layers.0.mlp.up_proj") is None
    assert settings.for_module("model.layers.1.mlp.up_proj") == GPTQFormat(8, 64)
    assert settings.for_module("model.layers.12.mlp.up_proj") == GPTQFormat(4, 32)


def test_v2_zeros_under_a_v1_name_are_found():
    codes, zeros, scales, g_idx = random_layer(0, 4, sym=True)
    packed = pack(codes, zeros + 1, scales, g_idx, 4)
    with pytest.raises(UserError, match="v2 zeros"):
        check_tensors("layer", packed, GPTQFormat(4, 32))


def test_tensors_of_wrong_shape_are_named():
    codes, zeros, scales, g_idx = random_layer(0, 4, sym=True)
    packed = pack(codes, zeros, scales, g_idx, 4)
    broken = GPTQTensors(packed.qweight[1:], packed.qzeros, packed.scales, packed.g_idx)
    with pytest.raises(UserError, match="qweight"):
        check_tensors("layer", broken, GPTQFormat(4, 32))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_specs_are_those_of_packed_tensors(bits):
    codes, zeros, scales, g_idx = random_layer(1, bits, sym=True)
    packed = pack(codes, zeros, scales, g_idx, bits)
    for name, spec in packed_specs("layer.", *codes.shape, GPTQFormat(bits, 32)).items():
        tensor = getattr(packed, name.removeprefix("layer."))
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
