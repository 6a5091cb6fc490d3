"""What a setting of training does to the model that comes out of it: held-out loss by seed, and training's speed.

    python scripts/bench/loss.py --model DIR --train train.jsonl --eval test.jsonl --out DIR
        --settings model.compute_dtype=bfloat16 model.compute_dtype=float8 [--seeds 0,1,2] [--set section.key=value ...]

Files have rows of `question` and `answer`, as GSM8K. Every setting trains with every seed, through `qlora train`; the
adapter is then loaded by PEFT on the 4-bit base and measured on the answers' tokens, as on the ladder, the same way for
all settings. KL is to the model that the first setting gave with that seed; the difference between seeds of one setting
says how much of it is noise. Prints a Markdown table and writes DIR/loss.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from merge import as_chat

from qlora.evaluation.ladder import TRAINED, Rung, Settings, climb
from qlora.models.loading import load_base, load_trained
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe
from qlora.stages import Run


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in arguments.seeds:
        runs = [trained(arguments, seed, number) for number in range(len(arguments.settings))]
        first = runs[0]
        section = first.recipe.evaluate
        settings = Settings(section.batch_size, section.max_new_tokens, first.tokenizer.pad_token_id)
        rungs = [
            Rung(TRAINED if number == 0 else setting, setting, loader(run))
            for number, (setting, run) in enumerate(zip(arguments.settings, runs, strict=True))
        ]
        ladder = climb(rungs, first.eval_rows.rows, first.tokenizer, settings, arguments.out, lambda *_: None)
        for setting, run, score in zip(arguments.settings, runs, ladder.scores, strict=True):
            metrics = json.loads(run.dirs.lineage.read_text())["stages"]["train"]["metrics"]
            speed = metrics["tokens_per_second"]
            rows.append({"setting": setting, "seed": seed, "loss": score.loss, "kl": score.kl, "speed": speed})
            print(f"seed {seed} {setting}: loss {score.loss:.4f}, KL {score.kl:.4f}", flush=True)
        machine = "CPU" if first.device == "cpu" else torch.cuda.get_device_name()
        report = {"machine": machine, "arguments": arguments.given, "rows": rows}
        (arguments.out / "loss.json").write_text(json.dumps(report, indent=2))
    print("\n| setting | held-out loss | KL to the first setting | tokens/s |\n| --- | --- | --- | --- |")
    for setting in arguments.settings:
        print(line(setting, [row for row in rows if row["setting"] == setting]))


def trained(arguments: argparse.Namespace, seed: int, number: int) -> Run:
    source = arguments.out / f"setting-{number}-seed-{seed}.json"
    recipe = {
        "name": source.stem,
        "seed": seed,
        "output_dir": str(arguments.out),
        "model": {"base": str(arguments.model)},
        "data": {
            "train": [{"path": str(as_chat(arguments.train, arguments.out, None))}],
            "eval": {"path": str(as_chat(arguments.eval, arguments.out, arguments.rows))},
            "max_length": arguments.length,
        },
    }
    source.write_text(json.dumps(recipe))
    loaded = load_recipe(source, [*arguments.set, arguments.settings[number]])
    Pipeline(loaded).run_stage("train")
    return Run(loaded)


def loader(run: Run) -> Any:
    base = run.base.directory
    return lambda: load_trained(load_base(base, run.recipe.model, run.device, quantized=True), run.dirs.adapter, base)


def line(setting: str, rows: list[dict[str, Any]]) -> str:
    losses = [row["loss"] for row in rows]
    spread = f" ± {statistics.stdev(losses) / math.sqrt(len(losses)):.4f}" if len(losses) > 1 else ""
    kl, speed = (statistics.mean(row[key] or 0.0 for row in rows) for key in ("kl", "speed"))
    return f"| {setting} | {statistics.mean(losses):.4f}{spread} | {kl:.4f} | {speed:,.0f} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--length", type=int, default=1024)
    arguments = parser.parse_args()
    arguments.given = {key: str(value) for key, value in vars(arguments).items()}
    return arguments


if __name__ == "__main__":
    main()
