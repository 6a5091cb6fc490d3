"""What the merge refuses: another base, and anything in an adapter that would not arrive in the merged model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import UserError
from qlora.merging import merge_adapter


def merge(base_dir: Path, adapter: Path, output: Path, **options: Any) -> None:
    output.mkdir()
    merge_adapter(base_dir, adapter, output, **{"base": "dequantized", "dtype": torch.bfloat16} | options)


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def base_copy(tmp_path: Path) -> Callable[[Any], Path]:
    return lambda trained: Path(shutil.copytree(trained.base, tmp_path / "tampered"))


Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("merge_base", ["dequantized", "original"])
def test_another_base_is_refused_by_the_layer_that_differs(
    train: Callable[..., Any], base_copy: Callable[..., Path], tmp_path: Path, merge_base: str
) -> None:
    trained = train()
    base = base_copy(trained)
    edit_tensors(base, lambda tensors: tensors[f"{Q_PROJ}.weight"][3, 5].neg_())
    with pytest.raises(UserError, match=f"{Q_PROJ}: 4-bit codes differ") as error:
        merge(base, trained.adapter, tmp_path / "merged", base=merge_base)
    assert "merge into tiny/base at revision abc" in str(error.value)


def test_scaled_weights_have_the_same_codes_and_are_refused_all_the_same(
    train: Callable[..., Any], base_copy: Callable[..., Path], tmp_path: Path
) -> None:
    trained = train()
    base = base_copy(trained)
    edit_tensors(base, lambda tensors: tensors[f"{Q_PROJ}.weight"].mul_(2))
    with pytest.raises(UserError, match=f"{Q_PROJ}: block scales"):
        merge(base, trained.adapter, tmp_path / "merged")


def test_a_tampered_digest_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train()
    path = trained.adapter / "base.json"
    text = path.read_text()
    sha256 = json.loads(text)["quantized"][Q_PROJ]["sha256"]
    path.write_text(text.replace(sha256, "0" * 64))
    with pytest.raises(UserError, match=Q_PROJ):
        merge(trained.base, trained.adapter, tmp_path / "merged")


def test_a_base_of_another_shape_or_architecture_is_refused(
    train: Callable[..., Any], base_copy: Callable[..., Path], tmp_path: Path
) -> None:
    trained = train()
    base = base_copy(trained)
    edit_tensors(base, lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.zeros(64, 32)}))
    with pytest.raises(UserError, match=r"q_proj has the shape \[64, 32\], training saw \[64, 64\]"):
        merge(base, trained.adapter, tmp_path / "shape")
    edit_tensors(base, lambda tensors: tensors.pop(f"{Q_PROJ}.weight"))
    with pytest.raises(UserError, match=f"{Q_PROJ}.weight: the checkpoint has no tensor"):
        merge(base, trained.adapter, tmp_path / "missing")


def test_an_already_quantized_base_is_refused(
    train: Callable[..., Any], base_copy: Callable[..., Path], tmp_path: Path
) -> None:
    trained = train()
    base = base_copy(trained)
    codes = torch.zeros(2048, 1, dtype=torch.uint8)
    edit_tensors(base, lambda tensors: tensors.update({f"{Q_PROJ}.weight": codes}))
    with pytest.raises(UserError, match="quantized already"):
        merge(base, trained.adapter, tmp_path / "merged")


def test_missing_provenance_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train()
    (trained.adapter / "base.json").unlink()
    with pytest.raises(UserError, match="which base the adapter was trained on"):
        merge(trained.base, trained.adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "base_model.model.model.norm.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "prompt_embeddings",
    ],
)
def test_an_unknown_tensor_is_refused_by_name(train: Callable[..., Any], tmp_path: Path, key: str) -> None:
    trained = train(target_modules=["k_proj"])
    edit_tensors(trained.adapter, lambda tensors: tensors.update({key: torch.zeros(4, 4)}))
    with pytest.raises(UserError, match=key):
        merge(trained.base, trained.adapter, tmp_path / "merged")


def test_an_incomplete_pair_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train()
    key = f"base_model.model.{Q_PROJ}.lora_B.weight"
    edit_tensors(trained.adapter, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match="not a complete set"):
        merge(trained.base, trained.adapter, tmp_path / "merged")


def test_a_rank_other_than_the_configured_is_refused(
    train: Callable[..., Any], tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    trained = train()
    edit_json(trained.adapter / "adapter_config.json", rank_pattern={"q_proj": 3})
    with pytest.raises(UserError, match="with rank 3"):
        merge(trained.base, trained.adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [3, 4]),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("use_qalora", True),
        ("a_setting_of_the_future", {"on": True}),
    ],
)
def test_a_setting_that_cannot_be_merged_is_refused_by_name(
    train: Callable[..., Any], tmp_path: Path, edit_json: Callable[..., None], setting: str, value: Any
) -> None:
    trained = train(target_modules=["k_proj"])
    edit_json(trained.adapter / "adapter_config.json", **{setting: value})
    with pytest.raises(UserError, match=setting):
        merge(trained.base, trained.adapter, tmp_path / "merged")


def test_a_resized_vocabulary_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(target_modules=["k_proj"], modules_to_save=["lm_head"])
    key = "base_model.model.lm_head.weight"
    edit_tensors(trained.adapter, lambda tensors: tensors.update({key: torch.zeros(81, 64)}))
    with pytest.raises(UserError, match="resize the base first"):
        merge(trained.base, trained.adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"embed_tokens": [3, 4], "lm_head": [5]}, "of which more is trained than some rows"),
        ([3, 4], "with gaps behind"),
    ],
    ids=["other rows of a tied head", "rows that nobody trained"],
)
def test_rows_that_do_not_fit_are_refused(
    train: Callable[..., Any], tmp_path: Path, edit_json: Callable[..., None], tokens: Any, message: str
) -> None:
    trained = train(tied=True, target_modules=["k_proj"], trainable_token_indices=tokens)
    if tokens == [3, 4]:
        edit_json(trained.adapter / "adapter_config.json", trainable_token_indices=[3, 90])
    with pytest.raises(UserError, match=message):
        merge(trained.base, trained.adapter, tmp_path / "merged")


def test_a_lora_bias_without_a_bias_in_the_base_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(target_modules=["o_proj"], lora_bias=True)
    with pytest.raises(UserError, match=r"o_proj\.bias: the checkpoint has no tensor"):
        merge(trained.base, trained.adapter, tmp_path / "merged")


def test_values_beyond_float16_are_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(target_modules=["k_proj"])
    key = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    edit_tensors(trained.adapter, lambda tensors: tensors[key].mul_(1e7))
    with pytest.raises(UserError, match=r"infinite or not a number in float16(?s:.)*use bfloat16"):
        merge(trained.base, trained.adapter, tmp_path / "merged", dtype=torch.float16)


def test_the_adapters_tokenizer_replaces_that_of_the_base(
    train: Callable[..., Any], base_copy: Callable[..., Path], tmp_path: Path
) -> None:
    trained = train(target_modules=["k_proj"])
    base = base_copy(trained)
    for name in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer.model"):
        (base / name).write_text("of the base")
    for name in ("tokenizer_config.json", "tokenizer.json", "README.md", "training_args.bin"):
        (trained.adapter / name).write_text("as trained")
    merge(base, trained.adapter, tmp_path / "merged")
    texts = {path.name: path.read_text() for path in (tmp_path / "merged").iterdir() if "token" in path.name}
    assert texts == {
        "tokenizer_config.json": "as trained",
        "tokenizer.json": "as trained",
        "tokenizer.model": "of the base",
    }
    assert not {"chat_template.jinja", "README.md", "training_args.bin"} & set(
        path.name for path in (tmp_path / "merged").iterdir()
    )


def test_progress_counts_every_tensor(train: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(target_modules=["k_proj"])
    seen: list[tuple[int, int, str]] = []
    merge(trained.base, trained.adapter, tmp_path / "merged", progress=lambda *step: seen.append(step))
    names = list(load_file(tmp_path / "merged" / "model.safetensors"))
    assert [done for done, _, _ in seen] == list(range(1, len(names) + 1))
    assert {total for _, total, _ in seen} == {len(names)} and {name for _, _, name in seen} == set(names)
