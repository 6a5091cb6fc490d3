"""Tokens per second and memory where several GPUs train together: a copy of the 4-bit base on each, and one for all.

    python scripts/bench/scaling.py --out DIR --shape llama-3.1-8b [--processes 1,2] [--shard off,on]
        [--length 4096] [--rows 2] [--layers 32] [--steps 10] [--set train.memory=20]

Each process has --rows rows of random tokens in every step, so that the work of one stays the same. Weights are random
(scripts/bench/train.py, which measures each line), adapters are on all linear layers, and the plan is qlora's own. "of
one" is the speed over that of so many times the first line. Memory is the most that any of the processes took; "by
formula" what the plan expects. Prints a Markdown table and writes DIR/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from random_llama import SHAPES
from train import assignment, random_model, rows_of, run

from qlora.paths import packaged_recipes

HEAD = """| processes | base | tokens/s | of one | GiB of each | by formula | plan |
| --- | --- | --- | --- | --- | --- | --- |"""


def main(options: list[str] | None = None) -> None:
    arguments = parse(options)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = random_model(arguments)
    machine = torch.cuda.get_device_name() if arguments.device != "cpu" else "CPU"
    rows: list[dict[str, Any]] = []
    for shard in arguments.shard:
        for processes in arguments.processes:
            if shard == "on" and processes == 1:
                continue  # one process has nobody to share with
            rows.append(measure(arguments, model, processes, shard == "on"))
            print(line(rows[-1], rows[0]), flush=True)
            report = {"machine": machine, "arguments": options or sys.argv[1:], "rows": rows}
            (arguments.out / "scaling.json").write_text(json.dumps(report, indent=2))
    print(f"\n{machine}\n\n{HEAD}", *(line(row, rows[0]) for row in rows), sep="\n")


def measure(arguments: argparse.Namespace, model: Path, processes: int, shard: bool) -> dict[str, Any]:
    """A run of so many processes, as `train.run` returns it."""
    place = arguments.out / f"{processes}-{'shared' if shard else 'whole'}"
    arguments.rows_per_step = arguments.rows * processes
    rows_file = place.with_suffix(".rows.json")
    rows_file.write_text(json.dumps(rows_of(arguments)))
    job = {key: getattr(arguments, key) for key in ("length", "rows_per_step", "steps", "rank", "device")}
    job |= {"engine": "ours", "checkpointing": "auto", "micro_batch": arguments.rows, "gpu_memory": None}
    job |= {"model": str(model), "rows": str(rows_file), "profile": None, "started": processes}
    job["set"] = arguments.set | {"train.shard": shard}
    launcher = [sys.executable]
    if processes > 1:
        configuration = packaged_recipes() / "accelerate" / "gpus.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(configuration)]
        launcher += ["--num_processes", str(processes)]
    return run(job, place, arguments.timeout, launcher)


def line(row: dict[str, Any], first: dict[str, Any]) -> str:
    head = f"| {row['started']} | {'one for all' if row['set']['train.shard'] else 'on each'} |"
    if "error" in row:
        return f"{head} failed: {row['error']} |"
    if row["processes"] != row["started"]:
        return f"{head} failed: {row['processes']} processes trained |"
    speed, alone = row["tokens_per_second"], first.get("tokens_per_second")
    share = f"{speed / alone * first['started'] / row['started']:.0%}" if alone else ""
    return f"{head} {speed:,.0f} | {share} | {row['allocated']:.2f} | {row['expected']:.1f} | {row['plan']} |"


def parse(options: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-train", help="checkpoints")
    parser.add_argument("--shape", choices=SHAPES, required=True, help="random weights of this shape")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a trial")
    parser.add_argument("--processes", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2])
    parser.add_argument("--shard", type=lambda text: text.split(","), default=["off", "on"])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=2, help="of a step, for each process")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--set", type=assignment, action="append", default=[], help="key=value of our recipe")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for a trial")
    parser.add_argument("--timeout", type=float)
    arguments = parser.parse_args(options)
    arguments.set, arguments.train = dict(arguments.set), None
    return arguments


if __name__ == "__main__":
    main()
