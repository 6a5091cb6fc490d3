"""Checkpoints: what the writer writes, the safetensors library and transformers read, and the other way round."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, Phi3Config

from qlora.errors import UserError, WillNotFit
from qlora.models.checkpoint import DTYPES, CheckpointReader, CheckpointWriter, TensorSpec, total_bytes
from qlora.models.side_files import copy_side_files, edit_config, older_spellings


def random_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed.weight": torch.randn(7, 5, generator=generator).bfloat16(),
        "model.codes": torch.randint(0, 255, (3,), dtype=torch.uint8, generator=generator),
        "model.norm.weight": torch.randn(5, generator=generator),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.empty(0, 4),
        "g_idx": torch.arange(9, dtype=torch.int32),
        "mask": torch.tensor([True, False, True]),
    }
    return tensors


def plan_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(directory: Path, tensors: dict[str, torch.Tensor], order: list[str] | None = None, **options: int) -> None:
    directory.mkdir()
    with CheckpointWriter(directory, plan_of(tensors), **options) as writer:
        for name in order or list(tensors):
            writer.write(name, tensors[name])


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = random_tensors()
    write(tmp_path / "out", tensors)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = random_tensors()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = CheckpointReader(tmp_path)
    assert sorted(reader.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert reader.spec(name) == TensorSpec(tensor.dtype, tuple(tensor.shape))
        assert same(reader.read(name), tensor)


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    write(tmp_path / "out", random_tensors())
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % DTYPES[entry["dtype"]].itemsize == 0


def test_shards_and_index_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    tensors = model.state_dict()
    with CheckpointWriter(tmp_path, plan_of(tensors), max_shard_bytes=20_000) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / shard).stat().st_size < 30_000 for shard in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total_bytes(plan_of(tensors))
    assert set(index["weight_map"]) == set(tensors)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    reader = CheckpointReader(tmp_path)
    assert all(same(reader.read(name), tensor) for name, tensor in tensors.items())


def test_bytes_do_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    tensors = random_tensors()
    write(tmp_path / "one", tensors, max_shard_bytes=60)
    write(tmp_path / "two", tensors, order=list(reversed(tensors)), max_shard_bytes=60)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) > 2
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


@settings(max_examples=30, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text("abc.é", min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        min_size=1,
        max_size=8,
    ),
    max_shard_bytes=st.integers(1, 400),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, tensors: dict, max_shard_bytes: int) -> None:
    values = {name: torch.arange(math.prod(shape)).to(dtype).reshape(shape) for name, (dtype, shape) in tensors.items()}
    directory = tmp_path_factory.mktemp("trip") / "out"
    write(directory, values, max_shard_bytes=max_shard_bytes)
    reader = CheckpointReader(directory)
    assert all(same(reader.read(name), value) for name, value in values.items())
    loaded = {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}
    assert loaded.keys() == values.keys() and all(same(loaded[name], value) for name, value in values.items())


def test_a_read_tensor_owns_its_memory(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    tensor = CheckpointReader(tmp_path).read("w")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 200)
    assert torch.equal(tensor, torch.ones(4))


def test_writer_refuses_what_is_not_planned(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {"w": TensorSpec(torch.float32, (2, 2))})
    with pytest.raises(ValueError, match="not in the plan"):
        writer.write("v", torch.ones(2, 2))
    with pytest.raises(ValueError, match="planned"):
        writer.write("w", torch.ones(4))
    with pytest.raises(ValueError, match="planned"):
        writer.write("w", torch.ones(2, 2).half())
    with pytest.raises(RuntimeError, match="never written"):
        writer.close()


def test_writer_refuses_the_same_tensor_twice(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, {"w": TensorSpec(torch.float32, (2,))}) as writer:
        writer.write("w", torch.ones(2))
        with pytest.raises(ValueError, match="twice"):
            writer.write("w", torch.ones(2))


def test_an_interrupted_writer_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    tensors = random_tensors()
    write(tmp_path / "whole", tensors, max_shard_bytes=60)
    done = list(tensors)[::2]
    (tmp_path / "out").mkdir()
    first = CheckpointWriter(tmp_path / "out", plan_of(tensors), max_shard_bytes=60)
    for name in done:
        first.write(name, tensors[name])
    with CheckpointWriter(tmp_path / "out", plan_of(tensors), max_shard_bytes=60, written=done) as second:
        with pytest.raises(ValueError, match="twice"):
            second.write(done[0], tensors[done[0]])
        for name in set(tensors) - set(done):
            second.write(name, tensors[name])
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir()) and len(files) > 2
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in files)


@pytest.mark.parametrize("damage", ["another plan", "cut short", "missing"])
def test_files_of_another_writer_are_not_continued(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.safetensors"
    plan = {name: TensorSpec(torch.float32, (4,)) for name in ("v", "w")}
    CheckpointWriter(tmp_path, plan).write("v", torch.ones(4))
    if damage == "another plan":
        plan = {"v": plan["v"], "x": plan["w"]}
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    before = file.read_bytes() if file.exists() else None
    with pytest.raises(UserError, match="not the file that an interrupted run"):
        CheckpointWriter(tmp_path, plan, written=["v"])
    assert (file.read_bytes() if file.exists() else None) == before


def test_too_large_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(WillNotFit, match="free on the disk"):
        CheckpointWriter(tmp_path, {"w": TensorSpec(torch.float32, (10**9, 10**9))})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    save_file({"w": torch.ones(100)}, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:kept])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        CheckpointReader(tmp_path)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"not json" + b"\0" * 8)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        CheckpointReader(tmp_path)


def test_missing_directory_weights_and_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        CheckpointReader(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no safetensors weights"):
        CheckpointReader(tmp_path)
    index = {"metadata": {}, "weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00001-of-00002.safetensors is missing"):
        CheckpointReader(tmp_path)
    save_file({"v": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="the first is w"):
        CheckpointReader(tmp_path)


def test_side_files(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "onnx").mkdir()
    destination.mkdir()
    kept = ["generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "modeling_x.py", "LICENSE"]
    left = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md", ".gitattributes"]
    for name in [*kept, *left, "additional_chat_templates/tool.jinja", "onnx/model.json"]:
        (source / name).write_text(name)
    config = {"model_type": "llama", "rope_theta": 1.0, "quantization_config": {"bits": 4}, "dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))

    copy_side_files(source, destination)
    found = sorted(str(path.relative_to(destination)) for path in destination.rglob("*") if path.is_file())
    assert found == sorted([*kept, "config.json", "additional_chat_templates/tool.jinja"])
    assert json.loads((destination / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}

    copy_side_files(source, destination, drop_quantization_config=True)
    assert "quantization_config" not in json.loads((destination / "config.json").read_text())
    edit_config(destination, {"dtype": "float16"})
    assert list(json.loads((destination / "config.json").read_text()).items()) == [
        ("model_type", "llama"),
        ("rope_theta", 1.0),
        ("dtype", "float16"),
        ("torch_dtype", "bfloat16"),
    ]


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {"rope_theta": 5e5}),
        (
            LlamaConfig(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3),
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        ),
        (
            Phi3Config(
                pad_token_id=0,
                rope_parameters={"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5},
            ),
            {"rope_theta": 3e4, "partial_rotary_factor": 0.5},
        ),
        (
            Gemma3TextConfig(
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
                }
            ),
            {
                "rope_theta": 2e6,
                "rope_local_base_freq": 2e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
    ids=["default", "llama3", "partial", "by layer"],
)
def test_older_spellings_of_rotary_parameters(config, expected, tmp_path: Path) -> None:
    """As transformers 4 wrote them, and transformers 5 reads the same configuration from both together."""
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path / "new")
    (tmp_path / "both").mkdir()
    copy_side_files(tmp_path / "new", tmp_path / "both")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert older_spellings(written) == expected | {"torch_dtype": "bfloat16"}
    assert json.loads((tmp_path / "both" / "config.json").read_text()) == written | older_spellings(written)
    new, both = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("new", "both"))
    for found in (new, both):  # the factor is compared in rope_parameters
        found.pop("_name_or_path")
        found.pop("partial_rotary_factor", None)
    assert both == new
    assert older_spellings({"text_config": written, "model_type": "x"}) == {
        "text_config": written | older_spellings(written)
    }
