"""Seconds and memory of GPTQ: ours, gptqmodel and llmcompressor on the same checkpoint and tokens, a process each.

    python scripts/bench/gptq.py --out DIR --shape llama-2-7b [--layers 32] [--peer-layers 4,8]
    python scripts/bench/gptq.py --out DIR --shape llama-2-70b --layers 1,2 --engines ours [--gpu-memory 22]
    python scripts/bench/gptq.py --out DIR --model MODEL --train gsm8k_train.jsonl --rows 256 --group-size 64
    python scripts/bench/gptq.py --out DIR --model MODEL --train FILE --rows 64 --length 256 --packed --device cpu …

With --shape, a random-weight checkpoint is written to --work (once) and quantized on random tokens. Engines measured on
fewer layers than the shape has are extrapolated linearly, from two depths or in proportion to one, and the table says
so. With --model, the rows are those of a JSONL file (GSM8K's columns, or any format a recipe takes), rendered as in
training; --packed lays them end to end in full rows. --repeat 2 runs everything twice in a process: the first run of a
machine also builds kernels, so the last one is the row and the first one a column.

With --refine, our result is refined with the default settings afterwards, timed and measured apart.

Prints a Markdown table and writes it with all figures to DIR/gptq.json. Checkpoints are read from a warm page cache.
GPU memory is the peak of torch's allocator and of what it reserved, host memory the resident high-water mark. A failed
engine is a row that says so and names its log. Finished jobs are kept in DIR/jobs and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from gptq_engines import PACKAGES, Job, run_job
from merge import as_chat
from random_llama import SHAPES, first_layers, write_checkpoint

from qlora.artifacts import write_json
from qlora.models.loading import pick_device

PARTS = ("load", "quantize", "save", "total")


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.device = pick_device(arguments.device)
    rows = arguments.out / "rows.json"
    rows.write_text(json.dumps(calibration_rows(arguments)))
    measured = [row for engine in arguments.engines for row in measure(arguments, engine, rows)]
    report = {"machine": machine(arguments.device), "work": describe(arguments, rows), "rows": measured}
    write_json(arguments.out / "gptq.json", report)
    print(f"\n{report['machine']}\n{report['work']}\n\n{table(measured)}")
    for row in measured:
        if row.get("parts"):
            print(
                f"\n{row['label']}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row["parts"].items())
            )
        if row.get("refine"):
            print(f"{row['label']}, refinement: {describe_refinement(row['refine'])}")


def measure(arguments: argparse.Namespace, engine: str, rows: Path) -> list[dict[str, Any]]:
    """The rows of one engine: one per depth, and one computed for the whole depth if that was not measured."""
    if arguments.model:
        return [outcome(run(arguments, engine, arguments.model, rows))]
    whole = SHAPES[arguments.shape]["num_hidden_layers"]
    depths = arguments.layers if engine == "ours" else arguments.peer_layers
    source = write_checkpoint(
        arguments.shape, max(deepest(arguments)), arguments.work / arguments.shape, arguments.device
    )
    found = []
    for depth in depths:
        directory = arguments.work / f"{arguments.shape}-{depth}"
        model = first_layers(source, arguments.shape, depth, directory)
        found.append(outcome(run(arguments, engine, model, rows)) | {"layers": depth})
    complete = {row["layers"]: row["seconds"] for row in found if "error" not in row}
    if complete and whole not in complete:
        measured = " and ".join(map(str, sorted(complete)[-2:]))
        # Reading and writing go on beside the computation: what is waited for them does not grow with the depth.
        parts = ("total",) if engine == "ours" else PARTS
        computed = {part: extrapolate({d: s[part] for d, s in complete.items()}, whole) for part in parts}
        label = f"{engine}, {whole} layers, computed from {measured}"
        found.append({"label": label, "engine": engine, "layers": whole, "seconds": computed, "computed": True})
    return found


def deepest(arguments: argparse.Namespace) -> list[int]:
    return arguments.layers + (arguments.peer_layers if set(arguments.engines) - {"ours"} else [])


def run(arguments: argparse.Namespace, engine: str, model: Path, rows: Path) -> dict[str, Any]:
    name = f"{engine}-{model.resolve().name}"
    ragged = bool(arguments.model) and not arguments.packed
    job = Job(
        engine=engine,
        model=str(model.resolve()),
        rows=str(rows.resolve()),
        output=str(arguments.work / f"{name}-out"),
        bits=arguments.bits,
        group_size=arguments.group_size,
        device=arguments.device,
        batch_rows=1 if ragged and engine == "llmcompressor" else arguments.batch_rows,
        repeat=arguments.repeat,
        gpu_memory=arguments.gpu_memory,
        refine=arguments.refine and engine == "ours",
        options=arguments.set if engine == "ours" else {},
    )
    print(f"{name} …", flush=True)
    python = arguments.python.get(engine, sys.executable)
    return run_job(job, arguments.out / "jobs", name, python, arguments.timeout)


def outcome(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of one job's result: the last run, and the total of the first if there were several."""
    job = result["job"]
    label = f"{job['engine']}, {Path(job['model']).name}"
    if "error" in result:
        return {"label": label, "engine": job["engine"], "error": result["error"], "log": result["log"]}
    last, runs = result["runs"][-1], result["runs"]
    return {
        "label": f"{job['engine']} {result['version']}, {Path(job['model']).name}",
        "engine": job["engine"],
        "seconds": seconds(last),
        "first_total": seconds(runs[0])["total"] if len(runs) > 1 else None,
        "gpu_allocated_gib": last["gpu_peak_gib"],
        "gpu_reserved_gib": last["gpu_reserved_gib"],
        "host_gib": last["host_peak_gib"],
        "tokens": result["tokens"],
        "parts": last.get("parts", {}),
        "refine": last.get("refine"),
    }


def seconds(run: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each part and their sum; importing the engine is no part of it."""
    parts = {part: run[part] for part in PARTS if part != "total"}
    return parts | {"total": sum(parts.values())}


def extrapolate(measured: Mapping[int, float], layers: int) -> float:
    """Seconds for `layers`, from those of the two largest depths measured, or in proportion to a single one."""
    *others, most = sorted(measured)
    if not others:
        return measured[most] * layers / most
    slope = (measured[most] - measured[others[-1]]) / (most - others[-1])
    return measured[most] + slope * (layers - most)


def table(rows: list[dict[str, Any]]) -> str:
    """The measured rows as a Markdown table."""
    head = [
        "engine, model",
        "load s",
        "quantize s",
        "save s",
        "total s",
        "first run s",
        "GPU GiB",
        "reserved",
        "host GiB",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        if "error" in row:
            lines.append([row["label"], f"failed: {row['error']} (see {row['log']})"] + [""] * (len(head) - 2))
            continue
        times = [row["seconds"].get(part) for part in PARTS] + [row.get("first_total")]
        sizes = [row.get(key) for key in ("gpu_allocated_gib", "gpu_reserved_gib", "host_gib")]
        lines.append([row["label"], *("" if t is None else f"{t:.1f}" for t in times)])
        lines[-1] += ["" if size is None else f"{size:.2f}" for size in sizes]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def calibration_rows(arguments: argparse.Namespace) -> list[list[int]]:
    """Token ids: random ones, or the rendered rows of --train, each cut to --length or laid end to end."""
    if not arguments.model:
        generator = torch.Generator().manual_seed(0)
        vocabulary = SHAPES[arguments.shape]["vocab_size"]
        return torch.randint(10, vocabulary, (arguments.rows, arguments.length), generator=generator).tolist()
    from qlora.data.preparation import prepare
    from qlora.data.splits import all_rows
    from qlora.models.loading import load_tokenizer
    from qlora.recipe import Data

    # Packed rows are made of enough examples: none is shorter than a few dozen tokens.
    count = arguments.rows if not arguments.packed else None
    path = str(as_chat(arguments.train, arguments.out, count))
    data = Data.model_validate({"train": [{"path": path}], "max_length": arguments.length})
    prepared = prepare(all_rows(data.train[0]), load_tokenizer(arguments.model), data, split_name="train")
    rows = [list(row.input_ids) for row in prepared.rows]
    if not arguments.packed:
        return rows
    stream = [token for row in rows for token in row]
    starts = range(0, arguments.rows * arguments.length, arguments.length)
    return [stream[start : start + arguments.length] for start in starts]


def describe_refinement(refine: Mapping[str, Any]) -> str:
    peak = f", {refine['gpu_peak_gib']:.2f} GiB of GPU memory" if refine["gpu_peak_gib"] is not None else ""
    kl = f"KL on held-back rows {refine['kl_before']:.4f} → {refine['kl_after']:.4f}"
    return f"{refine['steps']} steps, {refine['seconds']:.1f} s{peak}; {kl}"


def describe(arguments: argparse.Namespace, rows: Path) -> str:
    lengths = [len(row) for row in json.loads(rows.read_text())]
    what = f"{arguments.shape} shape, random weights" if arguments.shape else arguments.model.name
    kind = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(lengths[0])
    tokens = f"{len(lengths)} rows of {kind} tokens ({sum(lengths):,})"
    return f"{what} · {arguments.bits} bits, group {arguments.group_size} · {tokens}"


def machine(device: str) -> str:
    import transformers

    gpu = f"{torch.cuda.get_device_name()}, " if device.startswith("cuda") else ""
    cores = f"{os.cpu_count()} cores {platform.processor() or platform.machine()}"
    return f"{gpu}{cores} · torch {torch.__version__}, transformers {transformers.__version__}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    what.add_argument("--model", type=Path, help="directory of a 16-bit checkpoint")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-gptq", help="checkpoints")
    parser.add_argument(
        "--layers", type=numbers, help="depths of the shape for ours, such as 1,2 (default: all layers)"
    )
    parser.add_argument("--peer-layers", type=numbers, default=[4, 8], help="depths of the shape for the peers")
    parser.add_argument("--train", type=Path, help="calibration rows for --model")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048, help="tokens per row, at most")
    parser.add_argument("--packed", action="store_true", help="lay the rows of --train end to end in full rows")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(PACKAGES))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--batch-rows", type=int, default=8, help="rows per forward pass of the peers")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--gpu-memory", type=float, help="GiB that torch may take, to see what a smaller GPU can do")
    parser.add_argument("--refine", action="store_true", help="refine our result too, with the defaults")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--timeout", type=float, help="seconds after which an engine is given up")
    parser.add_argument("--set", type=assignment, action="append", default=[], help="key=value of GPTQSettings, ours")
    parser.add_argument("--python", type=assignment, action="append", default=[], help="engine=interpreter of a peer")
    arguments = parser.parse_args()
    unknown = set(arguments.engines) - set(PACKAGES)
    if unknown:
        parser.error(f"--engines: {', '.join(sorted(unknown))}; there are {', '.join(PACKAGES)}")
    if arguments.model and not arguments.train:
        parser.error("--model needs --train")
    arguments.set, arguments.python = dict(arguments.set), dict(arguments.python)
    if arguments.shape and not arguments.layers:
        arguments.layers = [SHAPES[arguments.shape]["num_hidden_layers"]]
    return arguments


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def assignment(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


if __name__ == "__main__":
    main()
