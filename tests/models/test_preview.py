"""What a base is told apart by before any of its weights are read; what cannot be read is refused."""

import json

import pytest

from qlora.errors import UserError
from qlora.models.preview import preview_base


@pytest.fixture
def base(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    return tmp_path


def test_a_16_bit_directory_is_found(base):
    found = preview_base(str(base))
    assert (found.directory, found.gguf_file, found.weight_bytes) == (base, None, len(b"not read"))


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "fp8"])
def test_a_base_that_cannot_be_read_is_refused_by_the_name_of_its_method(base, method):
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, "bits": 4}}))
    with pytest.raises(UserError, match=rf"{base}: this base is quantized already \({method}\)"):
        preview_base(str(base))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_packed_base_is_known_from_its_config(base, method):
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, "bits": 4}}))
    assert preview_base(str(base)).quantized == method


@pytest.mark.parametrize(("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_a_base_of_an_older_tool_says_so_in_a_file_of_its_own(base, file, method):
    (base / file).write_text(json.dumps({"bits": 4, "group_size": 128}))
    assert preview_base(str(base)).quantized == method


def test_a_gguf_base_that_was_converted_is_read_from_where_it_is(smollm2, tmp_path, monkeypatch) -> None:
    from qlora.models.base import as_converted
    from qlora.paths import cache_dir

    found = preview_base(str(cache_dir() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    converted = as_converted(found)
    assert (converted.directory, converted.gguf_file) == (smollm2, None)
    assert (converted.id, converted.weight_bytes) == (found.id, found.weight_bytes)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    assert as_converted(found) == found
