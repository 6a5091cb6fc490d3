"""Peak memory and rows per second of data: from a file of rows to the batches of an epoch.

    python scripts/bench/data.py --tokenizer DIR --out DIR [--rows 1000000 | --train FILE] [--max-length 1024]

Rows are chats of three or four sentences, generated from their number, or those of --train. Each start is a process of
its own: the first reads and renders every row, the second finds them in the cache (--out holds both). Prints a line per
part and writes DIR/data.json: seconds, the highest memory of the process that is its own (RssAnon, sampled) and the
highest in all, of which mapped files can be given back at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
ITEMS = ("lamps", "chairs", "books", "maps", "bolts", "kettles", "ropes", "tiles")
SAMPLED_EVERY = 0.05  # seconds


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.start:
        print(json.dumps(start(arguments)))
        return
    path = arguments.train or generated(arguments.out / f"rows-{arguments.rows}.jsonl", arguments.rows)
    found: dict[str, Any] = {"file_bytes": path.stat().st_size, "cores": os.cpu_count()}
    environment = os.environ | {"QLORA_CACHE": str(arguments.out / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), environment.get("PYTHONPATH"))))
    for name in ("first start", "second start"):
        command = [sys.executable, __file__, *sys.argv[1:], "--train", str(path), "--start"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {line(found[name])}", flush=True)
    kept = sum(file.stat().st_size for file in (arguments.out / "cache").rglob("*") if file.is_file())
    found["cache_bytes"] = kept
    print(f"file {found['file_bytes'] / 2**20:,.0f} MiB, cache {kept / 2**20:,.0f} MiB")
    (arguments.out / "data.json").write_text(json.dumps(found, indent=2))


def generated(path: Path, rows: int) -> Path:
    if not path.is_file():
        with path.with_suffix(".partial").open("w") as stream:
            for number in range(rows):
                item, other = ITEMS[number % 8], ITEMS[number // 8 % 8]
                question = f"Order {number}: {number % 97} {item} cost {number % 31} crowns each, {other} twice that. "
                question += f"How much do {number % 13} {other} cost, and how many {item} are left of {number % 211}?"
                answer = f"One of the {other} costs {number % 31 * 2} crowns, so {number % 13} of them cost "
                answer += f"{number % 31 * 2 * (number % 13)} crowns; {number % 211 - number % 97} {item} are left."
                stream.write(json.dumps({"question": question, "answer": answer}) + "\n")
        path.with_suffix(".partial").rename(path)
    return path


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of one process."""
    from qlora.data.preparation import prepare
    from qlora.data.splits import read_splits
    from qlora.models.loading import load_tokenizer
    from qlora.recipe import Data
    from qlora.training.schedule import Forwards, Schedule

    data = Data.model_validate({"train": [{"path": str(arguments.train)}], "max_length": arguments.max_length})
    tokenizer = load_tokenizer(arguments.tokenizer)
    found: dict[str, Any] = {"before": own_memory()}
    with sampled() as peak:
        began = time.perf_counter()
        splits = read_splits(data)
        found["index_seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        rows = prepare(splits.train, tokenizer, data, split_name="train").rows
        assert splits.evaluation is not None
        prepare(splits.evaluation, tokenizer, data, split_name="eval")
        found["rows_seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        tokens = 0
        for batch in Forwards(Schedule(rows.lengths, 16, 1, 1, seed=0), process=0):
            tokens += sum(len(rows[row].labels) for row in batch)
        found["epoch_seconds"] = time.perf_counter() - began
    found |= {"rows": len(rows), "tokens": tokens, "peak_own": peak[0], "peak": status("VmHWM")}
    return found


def line(found: dict[str, Any]) -> str:
    seconds = found["index_seconds"] + found["rows_seconds"]
    return (
        f"{found['rows']:,} rows, {found['tokens']:,} tokens; read in {found['index_seconds']:.1f} s, rows in "
        f"{found['rows_seconds']:.1f} s ({found['rows'] / seconds:,.0f} rows/s), an epoch's batches in "
        f"{found['epoch_seconds']:.1f} s; own memory {found['before'] / 2**20:,.0f} → {found['peak_own'] / 2**20:,.0f} "
        f"MiB, in all {found['peak'] / 2**20:,.0f} MiB"
    )


@contextmanager
def sampled() -> Iterator[list[int]]:
    """The highest memory of this process's own while this lasts."""
    peak, done = [own_memory()], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLED_EVERY):
            peak[0] = max(peak[0], own_memory())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def own_memory() -> int:
    return status("RssAnon")


def status(name: str) -> int:
    """Bytes, from /proc (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(each.split()[1]) * 1024 for each in lines if each.startswith(name))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model's directory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--train", type=Path, help="a file of rows instead of generated ones")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
