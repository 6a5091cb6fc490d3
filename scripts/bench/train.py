"""Tokens per second and memory of QLoRA training: ours, TRL and unsloth on one checkpoint and the same rows.

    python scripts/bench/train.py --out DIR --shape llama-3.1-8b --length 4096 --micro-batch 2 [--layers 32]
        [--engines ours,trl,unsloth] [--checkpointing off,on] [--set train.kernels=plain]

Writes a random-weight checkpoint of the shape to --work (once) and trains r=16 adapters on all linear layers on rows of
random tokens, a process for each line of the table. Seconds are the median of the steps after the fourth; memory is the
peak from the first step on. A run whose gradient norm is zero at any step is a failure: it did not train.
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
from pathlib import Path
from typing import Any

import torch
from random_llama import SHAPES, first_layers, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
WARM_UP = 4
GIB = 2**30


def main() -> None:
    arguments = parse()
    if arguments.job:
        print("RESULT", json.dumps(one(json.loads(arguments.job))))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    layers = arguments.layers or SHAPES[arguments.shape]["num_hidden_layers"]
    source = write_checkpoint(arguments.shape, layers, arguments.work / f"{arguments.shape}-source", "cuda")
    model = first_layers(source, arguments.shape, layers, arguments.work / f"{arguments.shape}-{layers}")
    rows = []
    for engine in arguments.engines:
        for checkpointing in arguments.checkpointing:
            job = {key: getattr(arguments, key) for key in ("length", "micro_batch", "steps", "set")}
            job |= {"engine": engine, "checkpointing": checkpointing == "on", "model": str(model)}
            job |= {"vocabulary": SHAPES[arguments.shape]["vocab_size"]}
            rows.append(run(job, arguments.out / f"{engine}-{checkpointing}.log", arguments.timeout))
            print(line(rows[-1]), flush=True)
    (arguments.out / "train.json").write_text(json.dumps({"machine": torch.cuda.get_device_name(), "rows": rows}))


def run(job: dict[str, Any], log: Path, timeout: float | None) -> dict[str, Any]:
    environment = dict(os.environ, HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), environment.get("PYTHONPATH"))))
    command = [sys.executable, __file__, "--out", str(log.parent), "--job", json.dumps(job)]
    try:
        done = subprocess.run(command, env=environment, timeout=timeout, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return job | {"error": f"no result after {timeout} s"}
    log.write_text(done.stdout + done.stderr)
    results = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if done.returncode or not results:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return job | {"error": last[:300]}
    return job | json.loads(results[-1].removeprefix("RESULT "))


def line(row: dict[str, Any]) -> str:
    head = f"| {row['engine']} | {'on' if row['checkpointing'] else 'off'} |"
    if "error" in row:
        return f"{head} failed: {row['error']} |"
    return f"{head} {row['tokens_per_second']:,.0f} | {row['allocated']:.1f} | {row['reserved']:.1f} |"


def one(job: dict[str, Any]) -> dict[str, Any]:
    """Train in this process; raises unless every step had a gradient."""
    trainer = {"ours": ours, "trl": trl, "unsloth": unsloth}[job["engine"]](job)
    times: list[float] = []
    trainer.add_callback(_timer(times))
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    if not logs or any(not float(entry["grad_norm"]) > 0 for entry in logs):
        raise RuntimeError("a step without a gradient")
    seconds = statistics.median(times[WARM_UP:])
    return {
        "tokens_per_second": job["micro_batch"] * job["length"] / seconds,
        "step_seconds": times,
        "allocated": torch.cuda.max_memory_allocated() / GIB,
        "reserved": torch.cuda.max_memory_reserved() / GIB,
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [float(entry["grad_norm"]) for entry in logs],
    }


def _timer(times: list[float]) -> Any:
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter() - self.begun)

    return Timer()


def token_rows(job: dict[str, Any]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    count = job["micro_batch"] * (job["steps"] + 2)
    return torch.randint(10, job["vocabulary"], (count, job["length"]), generator=generator).tolist()


def ours(job: dict[str, Any]) -> Any:
    from qlora.data.rendering import RenderedRow
    from qlora.models.base import resolve_base
    from qlora.models.loading import load_tokenizer
    from qlora.recipe import Recipe
    from qlora.training.sft import build_trainer

    document: dict[str, Any] = {
        "name": "bench",
        "model": {"base": job["model"]},
        "data": {"train": [{"path": "unused.jsonl"}], "max_length": job["length"]},
        "lora": {"r": 16, "alpha": 16},
        "train": {
            "max_steps": job["steps"],
            "batch_size": job["micro_batch"],
            "micro_batch_tokens": job["micro_batch"] * job["length"],
            "scheduler": "constant",
            "learning_rate": 1e-4,
            "gradient_checkpointing": job["checkpointing"],
            "checkpoint_every": 10**6,
        },
    }
    for key, value in job["set"].items():
        section, _, name = key.partition(".")
        document.setdefault(section, {})[name] = value
    recipe = Recipe.model_validate(document)
    rows = [RenderedRow(ids, ids) for ids in token_rows(job)]
    return build_trainer(
        recipe,
        resolve_base(job["model"], None),
        load_tokenizer(Path(job["model"])),
        rows,
        [],
        device="cuda:0",
        checkpoints=Path(tempfile.mkdtemp()),
    )


def _sft_config(job: dict[str, Any], checkpointing: bool) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["micro_batch"],
        max_steps=job["steps"],
        logging_steps=1,
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

    rows = token_rows(job)
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": [[1] * job["length"]] * len(rows)})


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
        args=_sft_config(job, job["checkpointing"]),
        train_dataset=_dataset(job),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16, lora_alpha=16),
    )


def unsloth(job: dict[str, Any]) -> Any:
    from unsloth import FastLanguageModel  # before everything that it changes

    model, tokenizer = FastLanguageModel.from_pretrained(
        job["model"], max_seq_length=job["length"], dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        target_modules=names,
        use_gradient_checkpointing="unsloth" if job["checkpointing"] else False,
    )
    from trl import SFTTrainer

    return SFTTrainer(
        model=model, args=_sft_config(job, False), train_dataset=_dataset(job), processing_class=tokenizer
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-train", help="checkpoints")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a trial")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["ours", "trl", "unsloth"])
    parser.add_argument("--checkpointing", type=lambda text: text.split(","), default=["off", "on"])
    parser.add_argument("--set", type=assignment, action="append", default=[], help="key=value of our recipe")
    parser.add_argument("--timeout", type=float)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.set = dict(arguments.set)
    return arguments


def assignment(text: str) -> tuple[str, Any]:
    import yaml

    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


if __name__ == "__main__":
    main()
