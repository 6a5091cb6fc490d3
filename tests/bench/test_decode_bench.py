"""The benchmark of decoding: its packed checkpoints are its 16-bit checkpoint rounded to the nearest level."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import decode

from qlora.evaluation.bench_models import Subject, load
from qlora.evaluation.bench_process import measure
from qlora.models.gptq_format import read_quantization_config
from qlora.models.loading import load_gptq, load_plain


def test_checkpoints_are_of_one_model_and_written_once(tmp_path):
    folders = decode.write_checkpoints("tiny", 2, tmp_path, "cpu")
    plain, packed = folders["16bit"], folders["gptq"]
    written = (packed / "config.json").stat().st_mtime_ns
    assert decode.write_checkpoints("tiny", 2, tmp_path, "cpu") == folders
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
    logits = {}
    for form in ("gptq", "awq"):
        model = load(Subject(str(folders[form]), form, "qlora"), "bfloat16", "cpu").model
        assert measure(model, 1, 8, 3)["tokens_per_second"] > 0
        with torch.no_grad():
            logits[form] = model(torch.arange(8)[None]).logits
    assert torch.equal(logits["gptq"], logits["awq"])
