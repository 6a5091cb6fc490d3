"""What GPTQ costs in quality: ours in variants, gptqmodel and llmcompressor, over seeds, on task and general text.

    python scripts/bench/gptq_quality.py train reference quantize table --out DIR --model MODEL
        --train gsm8k_train.jsonl --test gsm8k_test.jsonl --general-valid wikitext2_valid.txt
        --general-test wikitext2_test.txt [--seeds 0,1,2] [--parallel 3] [--only ours-4bit,gptqmodel-4bit]

Phases, each callable alone, each continuing where it was killed:
  train      QLoRA and the exact merge (dequantized base) of every seed, through `qlora train` and `qlora merge`
  reference  loss, KL, top-1 and perplexity of base, NF4 base, trained (keeps its log-probabilities) and merged model
  quantize   every variant of --variants (gptq_quality.yaml) on every seed: quantize, load, measure; to results.jsonl
  table      mean ± standard deviation over seeds, printed as Markdown and written to DIR/table.md and DIR/table.json

Every variant of a seed calibrates on the rows that `quantize.calibration` draws from the training rows and, if a mix
asks for it, from --general-valid; no window of 64 tokens of them may occur in the test files. Loss, KL and top-1 are
those of the ladder, on the answer tokens of --test; gain kept is (base − quantized) / (base − trained) of the loss;
perplexity is over the first --chunks chunks of --general-test. Variants and seeds run in --parallel processes on one
GPU: small models are bound by kernel launches, so that seconds are comparable among themselves, not with a lone run.
Free disk: about 5 GB per seed for 400 test rows and a vocabulary of 49,152. To move a study to another machine, keep
seed-*/adapter, seed-*/lineage.json, results.jsonl and settings.json: training is then up to date there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml
from gptq_engines import PACKAGES
from gptq_report import Results, summary, table
from merge import as_chat

from qlora.artifacts import read_json, write_json
from qlora.errors import UserError
from qlora.models.loading import pick_device
from qlora.recipe import Quantize

PHASES = ("train", "reference", "quantize", "table")
GENERAL = "${general}"


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = study_settings(arguments)
    variants = read_variants(arguments.variants, settings["general_valid"], arguments.only)
    results = Results(arguments.out / "results.jsonl")
    if "train" in arguments.phases:
        train(settings, arguments.parallel)
    if "reference" in arguments.phases:
        tasks: list[tuple[Any, ...]] = [(seed,) for seed in settings["seeds"] if not results.has(seed, "merged")]
        in_processes(measure_references, tasks, settings, results, arguments.parallel)
    if "quantize" in arguments.phases:
        tasks = [(seed, v) for v in variants for seed in settings["seeds"] if not results.has(seed, v["name"])]
        in_processes(measure_variant, tasks, settings, results, arguments.parallel)
    if "table" in arguments.phases:
        rows = summary(results.records)
        text = table(rows)
        print(text)
        (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
        write_json(arguments.out / "table.json", {"settings": settings["decisive"], "rows": rows})


# -- training ---------------------------------------------------------------------------------------------------------


def train(settings: dict[str, Any], parallel: int) -> None:
    """Adapter and merged model of every seed; what is up to date is skipped by qlora itself."""

    def one(seed: int) -> None:
        folder = Path(settings["out"]) / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        recipe = folder.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(recipe_document(settings, seed)), encoding="utf-8")
        for stage in ("train", "merge"):
            with folder.with_suffix(".log").open("a", encoding="utf-8") as log:
                command = [sys.executable, "-m", "qlora", stage, str(recipe)]
                code = subprocess.run(command, stdout=log, stderr=log).returncode
            if code:
                raise UserError(f"`qlora {stage}` of seed {seed} ended with exit code {code}", log.name, "see the log")
        print(f"seed {seed} trained and merged", flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(one, settings["seeds"]))


def recipe_document(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """The recipe of one seed, without its quantize section: the setting of the peers' ladder."""
    return {
        "name": f"seed-{seed}",
        "output_dir": settings["out"],
        "seed": seed,
        "device": settings["device"].partition(":")[0],
        "model": {"base": settings["model"]},
        "data": {
            "train": [{"path": settings["train_rows"]}],
            "eval": {"path": settings["test_rows"]},
            "max_length": 512,
        },
        "lora": {"r": 16, "alpha": 32},
        "train": {
            "epochs": settings["epochs"],
            "max_steps": settings["max_steps"],
            "batch_size": 16,
            "learning_rate": 4e-4,
            "warmup_steps": 20,
            "gradient_checkpointing": False,
            "log_every": 20,
            "checkpoint_every": 200,
        },
    }


# -- work in processes ------------------------------------------------------------------------------------------------


def in_processes(
    work: Callable[..., list[dict[str, Any]]],
    tasks: Sequence[tuple[Any, ...]],
    settings: dict[str, Any],
    results: Results,
    parallel: int,
) -> None:
    """Call `work(settings, *task)` for every task, several at a time; its records go to `results` as they come.

    A task that raises is one record with an `error`, tried again by the next call of the phase.
    """
    if not tasks:
        return
    with ProcessPoolExecutor(min(parallel, len(tasks)), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(guarded, work, settings, task) for task in tasks]
        for number, future in enumerate(as_completed(futures), start=1):
            for record in future.result():
                results.add(record | {"parallel": min(parallel, len(tasks))})
                print(f"{number}/{len(tasks)} {line(record)}", flush=True)


def guarded(work: Callable[..., list[dict[str, Any]]], settings: dict[str, Any], task: tuple[Any, ...]) -> Any:
    try:
        return work(settings, *task)
    except Exception as error:
        name = task[1]["name"] if len(task) > 1 else "reference"
        folder = Path(settings["out"]) / "logs"
        folder.mkdir(exist_ok=True)
        log = folder / f"{name}-seed-{task[0]}.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        return [{"seed": task[0], "name": name, "error": str(error)[:300] or type(error).__name__, "log": str(log)}]


def measure_references(settings: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    from gptq_study import open_seed

    return open_seed(seed, settings, recipe_document(settings, seed)).references()


def measure_variant(settings: dict[str, Any], seed: int, variant: dict[str, Any]) -> list[dict[str, Any]]:
    from gptq_study import open_seed

    return [open_seed(seed, settings, recipe_document(settings, seed)).variant(variant)]


def line(record: dict[str, Any]) -> str:
    head = f"{record['name']} seed {record['seed']}: "
    if "error" in record:
        return f"{head}failed: {record['error']} (see {record['log']})"
    figures = ("loss", "kl", "top1", "perplexity", "quantize_seconds", "refine_seconds")
    return head + ", ".join(f"{name} {record[name]:.4f}" for name in figures if record.get(name) is not None)


# -- settings ---------------------------------------------------------------------------------------------------------


def read_variants(path: Path, general: str, only: Sequence[str] | None) -> list[dict[str, Any]]:
    """name, engine, quantize section and options of every variant, checked before any of them costs time."""
    document = yaml.safe_load(path.read_text(encoding="utf-8").replace(GENERAL, general))
    unknown = set(only or ()) - set(document["variants"])
    if unknown:
        raise UserError(
            f"no variant {', '.join(sorted(unknown))}", "--only", f"{path} has {', '.join(document['variants'])}"
        )
    found = []
    for name, given in document["variants"].items():
        if only and name not in only:
            continue
        section = overlaid(document["quantize"], given.get("quantize", {}))
        Quantize.model_validate(section)
        engine = given.get("engine", "ours")
        if engine not in PACKAGES:
            raise UserError(f"engine {engine}", f"{path}: {name}", f"choose from {', '.join(PACKAGES)}")
        found.append({"name": name, "engine": engine, "quantize": section, "options": given.get("options", {})})
    return found


def overlaid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = overlaid(result[key], value) if nested else value
    return result


# What decides the figures and so stays the same for every call on one --out; of files, their names.
DECISIVE = ("rows", "test_skip", "test_rows", "epochs", "max_steps", "chunks", "chunk_length")
FILES = ("model", "train", "test", "general_valid", "general_test")


def study_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that processes get, with absolute paths. Raises UserError if --out holds a study with others."""
    decisive = {key: getattr(arguments, key) for key in DECISIVE}
    decisive |= {key: getattr(arguments, key).name for key in FILES}
    file = arguments.out / "settings.json"
    if file.is_file() and (found := read_json(file)) != decisive:
        changed = [key for key in decisive if found.get(key) != decisive[key]]
        raise UserError(f"this folder holds a study with other {', '.join(changed)}", str(file), "use another --out")
    write_json(file, decisive)
    settings = {key: str(getattr(arguments, key).resolve()) for key in ("out", *FILES)}
    settings |= {
        "train_rows": str(as_chat(arguments.train, arguments.out.resolve(), arguments.rows)),
        "test_rows": str(as_chat(arguments.test, arguments.out.resolve(), arguments.test_rows, arguments.test_skip)),
    }
    settings |= {key: getattr(arguments, key) for key in DECISIVE if key not in ("rows", "test_skip", "test_rows")}
    settings |= {"device": pick_device(arguments.device), "python": arguments.python, "seeds": arguments.seeds}
    return settings | {"batch_size": arguments.batch_size, "decisive": decisive}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="+", choices=PHASES, metavar="PHASE", help=" ".join(PHASES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="directory or .gguf file of a chat model")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--general-valid", type=Path, required=True, help="general text to calibrate on (.txt)")
    parser.add_argument("--general-test", type=Path, required=True, help="general text to measure on (.txt)")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="training rows (default: all)")
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--test-skip", type=int, default=0, help="leave out so many rows of --test before them")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, help="stop training early, for a trial")
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--chunk-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=16, help="test rows per forward pass")
    parser.add_argument("--variants", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of variants")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
