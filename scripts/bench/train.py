"""Tokens per second and memory of QLoRA training: ours, TRL and unsloth on one checkpoint and the same rows.

    python scripts/bench/train.py --out DIR --shape llama-3.1-8b --length 4096 --micro-batch 2 [--layers 32]
        [--engines ours,trl,unsloth] [--checkpointing off,on,auto] [--set train.kernels=plain] [--rank 16]
    python scripts/bench/train.py --out DIR --shape llama-3.1-8b --train gsm8k_train.jsonl --tokenizer MODEL
        --micro-batch 8 --rows-per-step 64 --checkpointing auto
    python scripts/bench/train.py --out DIR --model MODEL --train gsm8k_train.jsonl …

With --shape, a random-weight checkpoint is written to --work (once). Rows are random tokens of one length, or those of
a JSONL file (GSM8K's columns, or any format a recipe takes), rendered as in training. Adapters are on all linear
layers. A line of the table is a process of its own. Seconds are the median of the steps after the fourth (or the last,
if there are fewer), on the GPU's clock; tokens are real ones, memory is the peak from the first step on, "by formula"
what our plan expects of it. Peers take --micro-batch rows a forward, padded; ours as many tokens with checkpointing on
or off, and what it plans with auto. Loss and gradient norm are logged every fifth step; a run whose gradient norm is
zero then is a failure: it did not train.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from gptq_engines import limit_gpu
from merge import as_chat
from random_llama import SHAPES, first_layers, write_checkpoint

from qlora.cli import with_allocator
from qlora.measure import host_peak_gib
from qlora.reporting.console import is_main_process
from qlora.training.profile import ProfileStep

REPOSITORY = Path(__file__).resolve().parents[2]
WARM_UP = 4
LOG_EVERY = 5
GIB = 2**30


def main(options: list[str] | None = None) -> None:
    arguments = parse(options)
    if arguments.job:
        found = one(json.loads(Path(arguments.job).read_text()))
        if is_main_process():
            print("RESULT", json.dumps(found))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = arguments.model or random_model(arguments)
    rows_file = arguments.out / "rows.json"
    rows_file.write_text(json.dumps(rows_of(arguments)))
    machine = torch.cuda.get_device_name() if arguments.device != "cpu" else "CPU"
    rows: list[dict[str, Any]] = []
    for engine in arguments.engines:
        for checkpointing in arguments.checkpointing:
            job = {
                key: getattr(arguments, key)
                for key in ("length", "micro_batch", "rows_per_step", "steps", "rank", "set", "device", "gpu_memory")
            }
            job |= {"engine": engine, "checkpointing": checkpointing, "model": str(model), "rows": str(rows_file)}
            place = arguments.out / f"{engine}-{checkpointing}-profile"
            job |= {"profile": str(place) if arguments.profile else None}
            rows.append(run(job, arguments.out / f"{engine}-{checkpointing}", arguments.timeout))
            print(line(rows[-1]), flush=True)
            report = {"machine": machine, "arguments": options or sys.argv[1:], "rows": rows}
            (arguments.out / "train.json").write_text(json.dumps(report, indent=2))
    print(f"\n{machine}\n\n{HEAD}", *map(line, rows), sep="\n")


def random_model(arguments: argparse.Namespace) -> Path:
    layers = arguments.layers or SHAPES[arguments.shape]["num_hidden_layers"]
    source = write_checkpoint(arguments.shape, layers, arguments.work / f"{arguments.shape}-source", arguments.device)
    return first_layers(source, arguments.shape, layers, arguments.work / f"{arguments.shape}-{layers}")


def rows_of(arguments: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Token ids and labels of as many rows as the steps take."""
    count = arguments.rows_per_step * arguments.steps
    if not arguments.train:
        generator = torch.Generator().manual_seed(0)
        vocabulary = SHAPES[arguments.shape]["vocab_size"] if arguments.shape else 1000
        rows = torch.randint(10, vocabulary, (count, arguments.length), generator=generator).tolist()
        return [{"input_ids": row, "labels": row} for row in rows]
    from qlora.data.preparation import prepare
    from qlora.data.splits import all_rows
    from qlora.models.loading import load_tokenizer
    from qlora.recipe import Data

    path = as_chat(arguments.train, arguments.out, count)
    data = Data.model_validate({"train": [{"path": str(path)}], "max_length": arguments.length, "loss_on": "all"})
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    found = prepare(all_rows(data.train[0]), tokenizer, data, split_name="train").rows
    return [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in found]


def run(
    job: dict[str, Any], place: Path, timeout: float | None, launcher: Sequence[str] = (sys.executable,)
) -> dict[str, Any]:
    environment = dict(os.environ, HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), environment.get("PYTHONPATH"))))
    environment = with_allocator(environment)
    if job["device"] == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    job_file = place.with_suffix(".job.json")
    job_file.write_text(json.dumps(job))
    command = [*launcher, __file__, "--out", str(place.parent), "--job", str(job_file)]
    with place.with_suffix(".log").open("w") as log:
        try:
            done = subprocess.run(
                command, env=environment, timeout=timeout, stdout=subprocess.PIPE, stderr=log, text=True
            )
        except subprocess.TimeoutExpired:
            return job | {"error": f"no result after {timeout} s"}
    results = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if done.returncode or not results:
        last = (place.with_suffix(".log").read_text().strip().splitlines() or ["no output"])[-1]
        return job | {"error": last[:300]}
    return job | json.loads(results[-1].removeprefix("RESULT "))


HEAD = """| engine | checkpointing | tokens/s | real tokens | GiB | by formula | reserved | first loss | plan |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(row: dict[str, Any]) -> str:
    head = f"| {row['engine']} | {row['checkpointing']} |"
    if "error" in row:
        return f"{head} failed: {row['error']} |"
    expected = f"{row['expected']:.1f}" if row["expected"] else ""
    figures = f"{row['tokens_per_second']:,.0f} | {row['share']:.0%} | {row['allocated']:.2f} | {expected}"
    return f"{head} {figures} | {row['reserved']:.1f} | {row['losses'][0]:.3f} | {row['plan'] or ''} |"


def one(job: dict[str, Any]) -> dict[str, Any]:
    """Train in this process; raises unless every step that was logged had a gradient."""
    if job["gpu_memory"]:
        limit_gpu(job["gpu_memory"])
    trainer = {"ours": ours, "trl": trl, "unsloth": unsloth}[job["engine"]](job)
    on_gpu = job["device"] != "cpu"
    if job["profile"]:
        trainer.add_callback(ProfileStep(Path(job["profile"]), on_gpu=on_gpu))
    times, logs = run_steps(trainer, on_gpu=on_gpu)
    plan = getattr(trainer, "plan", None)
    tokens = sum(len(row["input_ids"]) for row in token_rows(job))
    positions = plan.schedule.work(job["steps"])[-1][1] if plan else padded_positions(job)
    memory = peak_memory(on_gpu=on_gpu)
    if trainer.args.world_size > 1:
        memory["allocated"] = max(gather_object([memory["allocated"]]))
    return {
        "processes": trainer.args.world_size,
        "tokens_per_second": tokens / job["steps"] / statistics.median(times[min(WARM_UP, len(times) - 1) :]),
        "share": tokens / positions,
        "step_seconds": times,
        **memory,
        "expected": sum(plan.parts.values()) / GIB if plan else None,
        "parts": plan.parts if plan else None,
        "plan": plan.text if plan else None,
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [float(entry["grad_norm"]) for entry in logs],
    }


def run_steps(trainer: Any, *, on_gpu: bool) -> tuple[list[float], list[dict[str, Any]]]:
    """Train; seconds of each step, and what was logged. Raises unless every step that was logged had a gradient."""
    times: list[float] = []
    trainer.add_callback(_timer(times, on_gpu))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    if not logs or any(not float(entry["grad_norm"]) > 0 for entry in logs):
        raise RuntimeError("a step without a gradient")
    return times, logs


def peak_memory(*, on_gpu: bool) -> dict[str, float | None]:
    """GiB since training began; of the process, where there is no GPU."""
    if not on_gpu:
        return {"allocated": host_peak_gib(), "reserved": 0.0}
    return {
        "allocated": torch.cuda.max_memory_allocated() / GIB,
        "reserved": torch.cuda.max_memory_reserved() / GIB,
    }


def padded_positions(job: dict[str, Any]) -> int:
    """Of a peer, were its batches those of the file's order; it shuffles."""
    lengths = [len(row["input_ids"]) for row in token_rows(job)]
    batches = [lengths[start : start + job["micro_batch"]] for start in range(0, len(lengths), job["micro_batch"])]
    return sum(len(batch) * max(batch) for batch in batches)


def _timer(times: list[float], on_gpu: bool) -> Any:
    """Writes to `times` from the beginning of a step to that of the next, on the GPU's clock: nobody waits for it."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[Any] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                self.marks.append(torch.cuda.Event(enable_timing=True))
                self.marks[-1].record()
            else:
                self.marks.append(time.perf_counter())

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == state.max_steps:
                self.on_step_begin()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            for begin, end in zip(self.marks, self.marks[1:], strict=False):
                times.append(begin.elapsed_time(end) / 1000 if on_gpu else end - begin)

    return Timer()


def token_rows(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    found: list[dict[str, list[int]]] = json.loads(Path(job["rows"]).read_text())
    return found


def ours(job: dict[str, Any]) -> Any:
    from qlora.data.rendering import RenderedRow
    from qlora.data.store import Rows
    from qlora.models.base import resolve_base
    from qlora.models.loading import load_tokenizer, pick_device
    from qlora.recipe import Recipe
    from qlora.training.sft import build_trainer

    document: dict[str, Any] = {
        "name": "bench",
        "model": {"base": job["model"]},
        "data": {"train": [{"path": "unused.jsonl"}], "max_length": job["length"]},
        "lora": {"r": job["rank"], "alpha": job["rank"]},
        "train": {
            "max_steps": job["steps"],
            "batch_size": job["rows_per_step"],
            "scheduler": "constant",
            "learning_rate": 1e-4,
            "checkpoint_every": 10**6,
            "log_every": min(LOG_EVERY, job["steps"]),
        },
    }
    if job["checkpointing"] != "auto":
        document["train"]["micro_batch_tokens"] = job["micro_batch"] * job["length"]
        document["train"]["gradient_checkpointing"] = job["checkpointing"] == "on"
    if job["gpu_memory"]:
        document["train"]["memory"] = job["gpu_memory"]
    for key, value in job["set"].items():
        section, _, name = key.partition(".")
        document.setdefault(section, {})[name] = value
    recipe = Recipe.model_validate(document)
    rows = Rows.of(RenderedRow(row["input_ids"], row["labels"], 0, False, "") for row in token_rows(job))
    return build_trainer(
        recipe,
        resolve_base(job["model"], None),
        load_tokenizer(Path(job["model"])),
        rows,
        None,
        device=pick_device(job["device"]),
        checkpoints=Path(tempfile.mkdtemp()),
    )


def _sft_config(job: dict[str, Any], checkpointing: bool) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["rows_per_step"] // job["micro_batch"],
        max_steps=job["steps"],
        logging_steps=min(LOG_EVERY, job["steps"]),
        report_to=[],
        bf16=True,
        max_length=job["length"],
        gradient_checkpointing=checkpointing,
        optim="adamw_torch_fused",
        save_strategy="no",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )


def _dataset(job: dict[str, Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(token_rows(job))


def trl(job: dict[str, Any]) -> Any:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTTrainer

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    return SFTTrainer(
        model=model,
        args=_sft_config(job, job["checkpointing"] != "off"),
        train_dataset=_dataset(job),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", r=job["rank"], lora_alpha=job["rank"]
        ),
    )


def unsloth(job: dict[str, Any]) -> Any:
    from unsloth import FastLanguageModel  # before everything that it changes

    model, tokenizer = FastLanguageModel.from_pretrained(
        job["model"], max_seq_length=job["length"], dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=job["rank"],
        lora_alpha=job["rank"],
        target_modules=names,
        use_gradient_checkpointing="unsloth" if job["checkpointing"] != "off" else False,
    )
    from trl import SFTTrainer

    return SFTTrainer(
        model=model, args=_sft_config(job, False), train_dataset=_dataset(job), processing_class=tokenizer
    )


def parse(options: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-train", help="checkpoints")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    what.add_argument("--model", type=Path, help="directory of a 16-bit checkpoint")
    parser.add_argument("--train", type=Path, help="real rows, in place of random tokens")
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer for --train, if not --model's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a trial")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row, at most")
    parser.add_argument("--micro-batch", type=int, default=2, help="rows of a forward")
    parser.add_argument("--rows-per-step", type=int, help="default: --micro-batch")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["ours", "trl", "unsloth"])
    parser.add_argument("--checkpointing", type=lambda text: text.split(","), default=["off", "on", "auto"])
    parser.add_argument("--set", type=assignment, action="append", default=[], help="key=value of our recipe")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: ours alone, for a trial")
    parser.add_argument("--gpu-memory", type=float, help="GiB that torch may take, to see what a smaller GPU can do")
    parser.add_argument(
        "--profile", action="store_true", help="a trace and a table of one step; steps after it are what is timed"
    )
    parser.add_argument("--timeout", type=float)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args(options)
    arguments.set = dict(arguments.set)
    arguments.rows_per_step = arguments.rows_per_step or arguments.micro_batch
    if not arguments.job and not (arguments.shape or arguments.model):
        parser.error("give --shape or --model")
    return arguments


def assignment(text: str) -> tuple[str, Any]:
    import yaml

    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


if __name__ == "__main__":
    main()
