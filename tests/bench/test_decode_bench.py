"""The benchmark of decoding: its GPTQ checkpoint is its 16-bit checkpoint rounded to the nearest level."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import decode

from qlora.evaluation.bench_models import Subject, load
from qlora.evaluation.bench_process import measure
from qlora.models.gptq_format import read_quantization_config
from qlora.models.loading import load_gptq, load_plain


def test_both_checkpoints_are_of_one_model_and_written_once(tmp_path):
    plain, packed = decode.write_checkpoints("tiny", 2, tmp_path, "cpu")
    written = (packed / "config.json").stat().st_mtime_ns
    assert decode.write_checkpoints("tiny", 2, tmp_path, "cpu") == (plain, packed)
    assert (packed / "config.json").stat().st_mtime_ns == written
    assert read_quantization_config(packed) == decode.FORMAT
    exact = dict(load_plain(plain, torch.float32).named_parameters())
    for name, rounded in load_gptq(packed, torch.float32).named_parameters():
        if not name.endswith("_proj.weight"):
            assert torch.equal(rounded, exact[name])
            continue
        groups = exact[name].unflatten(1, (-1, decode.FORMAT.group_size))
        step = groups.abs().amax(-1, keepdim=True) / 7.5
        assert ((rounded.view_as(groups) - groups).abs() <= 0.52 * step).all(), name
    model = load(Subject(str(packed), "gptq", "qlora"), "bfloat16", "cpu").model
    assert measure(model, 1, 8, 3)["tokens_per_second"] > 0
