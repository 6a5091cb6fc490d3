"""Five ways to merge a QLoRA adapter, beside each other: distance to the trained model, seconds, peak memory.

    python scripts/bench/merge.py --model MODEL --train train.jsonl --eval test.jsonl --out DIR
        [--rows N] [--eval-rows N] [--epochs E] [--learning-rate R] [--seed S] [--device auto|cpu|cuda]
        [--evaluate-in float32]

MODEL is a local directory, a .gguf file or a hub id of a chat model. The JSONL files hold GSM8K's columns `question`
and `answer`, or any format that a recipe takes. Trains with `qlora train`, then merges
  1. ours, into the dequantized base (fp32, one stochastic rounding), as `qlora merge`
  2. the same, rounded to nearest
  3. ours, into the original 16-bit base
  4. PEFT's merge_and_unload into `model.dequantize()`
  5. PEFT's merge_and_unload into the NF4 layers, its default
Prints a Markdown table and writes it with all figures to DIR/merge.json. Memory is the process's high-water mark while
merging: on a GPU the allocator's, on a CPU the resident set. All models compute in bf16, as in training; in float32
they differ by their weights alone, not by where each rounds its activations.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from qlora.artifacts import write_json
from qlora.evaluation.ladder import Rung, Settings, climb, release_memory
from qlora.measure import measured
from qlora.merging import merge_adapter
from qlora.models.loading import DTYPES, load_base, load_plain, load_trained
from qlora.pipeline import Pipeline
from qlora.recipe import Recipe
from qlora.stages import Run


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.model_validate(recipe_for(arguments))
    pipeline = Pipeline(recipe)
    pipeline.run_stage("train")
    run = Run(recipe)
    adapter, device, costs = run.dirs.adapter, run.device, {}

    exactly = {"compute_dtype": arguments.evaluate_in or recipe.model.compute_dtype}
    dtype = DTYPES[exactly["compute_dtype"]]

    def base(quantized: bool, model=recipe.model):
        return load_base(run.base.directory, model, device, quantized=quantized)

    def ours(kind: str, rounding: str = "stochastic"):
        target = arguments.out / f"merged-{kind}-{rounding}"
        target.mkdir(exist_ok=True)
        options = {"base": kind, "dtype": torch.bfloat16, "rounding": rounding, "device": device}
        with measured() as costs[f"ours {kind}" if rounding == "stochastic" else f"ours {rounding}"]:
            merge_adapter(run.base.directory, adapter, target, **options)
        return load_plain(target, dtype, device)

    def peft(kind: str):
        with measured() as costs[f"peft {kind}"]:
            model = base(quantized=True)
            model = model.dequantize() if kind == "dequantized" else model
            merged = load_trained(model, adapter, run.base.directory).merge_and_unload()
        return merged.to(dtype).eval() if kind == "dequantized" else merged.eval()

    measured_base = partial(base, model=recipe.model.model_copy(update=exactly))

    def trained():
        return load_trained(measured_base(quantized=True), adapter, run.base.directory)

    rungs = [
        Rung("base", "base, bf16", lambda: measured_base(quantized=False).eval()),
        Rung("nf4", "base, NF4 + double quantization", lambda: measured_base(quantized=True).eval()),
        Rung("trained", "trained: NF4 + LoRA", trained),
        Rung("ours dequantized", "qlora merge (dequantized base)", lambda: ours("dequantized")),
        Rung("ours nearest", "the same, merge.rounding: nearest", lambda: ours("dequantized", "nearest")),
        Rung("peft dequantized", "PEFT merge into model.dequantize()", lambda: peft("dequantized")),
        Rung("ours original", "qlora merge, merge.base: original", lambda: ours("original")),
        Rung("peft nf4", "PEFT merge into the NF4 layers (its default)", lambda: peft("nf4")),
    ]
    settings = Settings(16, 0, run.tokenizer.pad_token_id)
    rows = run.eval_rows.rows
    ladder = climb(rungs, rows, run.tokenizer, settings, arguments.out, lambda done, total, text: print(text))
    release_memory()

    machine = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    print(f"\n{machine} · {len(rows)} rows, {sum(row.supervised_tokens for row in rows)} answer tokens\n")
    print("| model | loss | KL to trained | top-1 | seconds | peak GiB |\n| --- | --- | --- | --- | --- | --- |")
    for score in ladder.scores:
        cost = costs.get(score.name)
        peak = (cost.gpu_peak_gib or cost.host_peak_gib) if cost else None
        spent = f"{cost.seconds:.1f} | {peak:.2f}" if cost else " | "
        print(f"| {score.label} | {score.loss:.4f} | {score.kl:.5f} | {score.top1:.4f} | {spent} |")
    figures = [
        asdict(score) | {"cost": asdict(costs[score.name]) if score.name in costs else None} for score in ladder.scores
    ]
    write_json(arguments.out / "merge.json", {"machine": machine, "rows": len(rows), "rungs": figures})


def recipe_for(arguments: argparse.Namespace) -> dict:
    """A recipe in the peers' setting: r=16, alpha 32, all linear layers, 16 rows a step."""
    return {
        "name": "bench-merge",
        "output_dir": str(arguments.out / "runs"),
        "seed": arguments.seed,
        "device": arguments.device,
        "model": {"base": str(arguments.model)},
        "data": {
            "train": [{"path": str(as_chat(arguments.train, arguments.out, arguments.rows))}],
            "eval": {"path": str(as_chat(arguments.eval, arguments.out, arguments.eval_rows))},
            "max_length": 512,
        },
        "train": {
            "epochs": arguments.epochs,
            "batch_size": 16,
            "learning_rate": arguments.learning_rate,
            "warmup_steps": min(20, max(1, (arguments.rows or 7473) // 160)),
            "gradient_checkpointing": False,
            "log_every": 10,
        },
    }


def as_chat(path: Path, out: Path, rows: int | None, skip: int = 0) -> Path:
    """GSM8K's question and answer as messages; other columns as they are. The first `rows` after `skip` others."""
    target = out / f"{path.stem}.{skip}.{rows or 'all'}.jsonl"
    with path.open(encoding="utf-8") as source, target.open("w", encoding="utf-8") as file:
        for line in islice(source, skip, None if rows is None else skip + rows):
            row = json.loads(line)
            if "question" in row:
                roles = (("user", row["question"]), ("assistant", row["answer"]))
                row = {"messages": [{"role": role, "content": text} for role, text in roles]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return target


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="training rows (default: all)")
    parser.add_argument("--eval-rows", type=int, default=400)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--evaluate-in", choices=("float32",))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
