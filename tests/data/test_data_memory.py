"""Memory does not grow with a set: reading, splits, rendering, checks, calibration and batches under a limit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import warm

ROWS, WORDS = 3_000, 250
ROOM = 16 * 2**20  # as Python's integers, the tokens of these rows would take several times as much

PROGRAM = """
import json, resource, sys
from transformers import AutoTokenizer
from qlora.data.calibration import calibration_rows
from qlora.data.lint import lint
from qlora.data.preparation import prepare
from qlora.data.splits import read_splits
from qlora.recipe import Calibration, Data
from qlora.training.columns import IDS, on_disk
from qlora.training.schedule import Forwards, Schedule

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])

def use(path):
    data = Data(train=[{"path": path, "weight": 1.5}], eval_share=0.01)
    splits = read_splits(data)
    train, held_out = (
        prepare(selection, tokenizer, data, split_name=name)
        for selection, name in ((splits.train, "train"), (splits.evaluation, "eval"))
    )
    lint(train, held_out, tokenizer)
    calibration_rows(Calibration(samples=64), train.rows, tokenizer, seed=0, exclude=held_out.rows)
    tokens = 0
    for batch in Forwards(Schedule(train.rows.lengths, 16, 1, 1, 0), 0):
        tokens += sum(len(train.rows[index].input_ids) for index in batch)
    assert len(on_disk({"ids": IDS}, ((row.input_ids,) for row in train.rows))) == len(train.rows)
    assert tokens == train.statistics.tokens
    return train

use(sys.argv[2])  # what libraries allocate once
now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + int(sys.argv[4]), resource.RLIM_INFINITY))
train = use(sys.argv[3])
print(train.statistics.rows, train.statistics.tokens)
try:
    everything = list(train.rows)
except (MemoryError, SystemError):  # numpy says it so
    print("rows as Python's objects do not fit")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc (Linux)")
def test_memory_is_bounded_whatever_the_set(tmp_path: Path, chatml_tokenizer) -> None:
    chatml_tokenizer.save_pretrained(tmp_path / "tokenizer")
    files = [tmp_path / "few.jsonl", tmp_path / "many.jsonl"]
    for file, count in zip(files, (512, ROWS), strict=True):
        with file.open("w") as stream:
            for number in range(count):
                row = {"prompt": f"What is {number}? " + "yes " * WORDS, "completion": f"no, {number} is 9"}
                stream.write(json.dumps(row) + "\n")
    environment = os.environ | {"QLORA_CACHE": str(tmp_path / "cache"), "RAYON_NUM_THREADS": "2"}
    result = warm.python("-c", PROGRAM, tmp_path / "tokenizer", *files, ROOM, env=environment)
    assert result.returncode == 0, result.stderr
    figures, last = result.stdout.splitlines()
    rows, tokens = map(int, figures.split())
    assert rows > 1.4 * ROWS and tokens * 28 > ROOM, "an integer takes 28 bytes"
    assert last == "rows as Python's objects do not fit"
