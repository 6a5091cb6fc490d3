"""Decoding on a GPU: tokens of the graph are those of steps one by one and of `generate`, in every form and kernel.

    pytest -m gpu tests/gpu/test_bench_gpu.py

Marlin and ExLlamaV2 are built with nvcc at first use, minutes each; one that cannot be built is skipped with the
builder's words. Each runs in a process of its own, since gptqmodel prints and patches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FORMS = [
    ("16bit", None), ("nf4", None), ("nf4-double", None), ("int8", None),
    ("gptq", "qlora"), ("gptq", "marlin"), ("gptq", "exllamav2"), ("gptq", "triton"), ("gptq", "torch"),
    ("awq", "qlora"), ("awq", "marlin"), ("awq", "exllamav2"),
]  # fmt: skip
EAGER = {"int8", "exllamav2"}
"""What no graph holds: LLM.int8 asks the GPU for its outliers, ExLlamaV2 launches on a stream of its own."""
TIE = 0.05
"""Of the deviation of logits: two tokens nearer than this are as good as each other in bf16."""
COMPARE = """
import json, sys
import torch
from qlora.evaluation.bench_models import Subject, load
from qlora.evaluation.decoding import Decoder
subject, prompt, new = json.loads(sys.argv[1])
try:
    loaded = load(Subject(**subject), "bfloat16", "cuda:0")
except RuntimeError as error:
    if "cannot build" not in str(error):
        raise
    print("UNAVAILABLE", " ".join(str(error).split())[-500:])
    sys.exit()
model, found = loaded.model, []
# Attention over a cache of another length may add in another order, and texts differ behind a tie. Of the rows that
# differ, the largest difference of the two tokens' logits where they begin to, in deviations.
@torch.inference_mode()
def gap(model, ids, one, other):
    worst = 0.0
    for row in range(len(ids)):
        apart = (one[row] != other[row]).nonzero().flatten().tolist()
        if apart:
            seen = torch.cat([ids[row], one[row, : apart[0]]])[None]
            logits = model(seen).logits[0, -1].float()
            pair = logits[torch.stack([one[row, apart[0]], other[row, apart[0]]])]
            worst = max(worst, float((pair[0] - pair[1]).abs() / logits.std()))
    return worst
for batch in (1, 3):
    ids = torch.randint(512, (batch, prompt), generator=torch.Generator().manual_seed(batch)).cuda()
    with torch.inference_mode():
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
            eos_token_id=None, pad_token_id=0,
        )[:, prompt:]
    decoder = Decoder(model, batch, prompt + new, graphs=None if loaded.eager_because is None else False)
    graph = decoder.greedy(ids, new)
    eager = Decoder(model, batch, prompt + new, graphs=False).greedy(ids, new)
    why = decoder.eager_because or loaded.eager_because
    found.append([decoder.has_graph, why, graph.tolist(), eager.tolist(), gap(model, ids, graph, expected)])
print("RESULT", json.dumps(found))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    from decode import write_checkpoints

    return write_checkpoints("tiny", 2, tmp_path_factory.mktemp("decode"), "cuda")


@pytest.mark.parametrize(("form", "kernel"), FORMS)
def test_a_graph_says_what_steps_and_generate_say(form, kernel, checkpoints):
    if kernel not in (None, "qlora"):
        pytest.importorskip("gptqmodel", reason='needs pip install "qlora[gptq]"')
    subject = {"directory": str(checkpoints.get(form, checkpoints["16bit"])), "form": form, "kernel": kernel}
    command = [sys.executable, "-c", COMPARE, json.dumps([subject, 37, 24])]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    if "UNAVAILABLE " in result.stdout:
        pytest.skip(f"cannot be built here: {result.stdout.split('UNAVAILABLE ')[1].splitlines()[0]}")
    for has_graph, why, graph, eager, gap in json.loads(result.stdout.split("RESULT ")[1].splitlines()[0]):
        assert has_graph == ((kernel or form) not in EAGER), why
        assert graph == eager
        assert gap < TIE


def test_the_command_measures_graphs(checkpoints, tmp_path, monkeypatch):
    from qlora.cli import main

    options = [str(checkpoints["16bit"]), str(checkpoints["gptq"]), "--batch", "1,4", "--prompt", "16", "--new", "8"]
    options += ["--as", "16bit,nf4,gptq", "--kernel", "qlora", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["qlora", "bench", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        assert "error" not in row, row
        assert row["graph"], row["eager_because"]
        assert 0 < row["weights_bytes"] <= row["peak_bytes"]
