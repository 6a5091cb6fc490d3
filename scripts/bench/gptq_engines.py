"""One quantization by one engine in a process of its own: ours, gptqmodel or llmcompressor, on the same token rows.

    python scripts/bench/gptq_engines.py JOB.json RESULT.json

is what `run_job` starts; JOB.json holds the fields of `Job`. A process per engine keeps memory, patches and crashes
apart, and an interpreter of its own serves peers whose requirements differ. Loading, quantizing and saving are timed
apart; of peers everything that is not named here stays at its default.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora.artifacts import read_json, write_json
from qlora.cli import with_allocator
from qlora.measure import GIB, measured

PACKAGES = {"ours": "qlora", "gptqmodel": "gptqmodel", "llmcompressor": "llmcompressor"}
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """What one process quantizes, and how."""

    engine: str
    """A key of `PACKAGES`."""
    model: str
    """Directory of a 16-bit Hugging Face checkpoint."""
    rows: str
    """JSON file with the calibration rows, a list of token ids each."""
    output: str
    """Directory of the result; replaced by every repetition."""
    bits: int
    group_size: int
    device: str
    batch_rows: int = 1
    """Rows per forward pass of a peer. llmcompressor cuts the rows of a batch to the shortest: ragged rows want 1."""
    repeat: int = 1
    """Repetitions in the same process; the first one of a machine also builds kernels."""
    dense: bool = False
    """Write llmcompressor's result once more as plain 16-bit weights, `<output>-dense`, for measuring; not timed."""
    gpu_memory: float | None = None
    """GiB of GPU memory that torch may take, for a smaller GPU than there is."""
    refine: bool = False
    """Refine our last result with the defaults; timed apart."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further settings of the engine: fields of GPTQSettings, of gptqmodel's QuantizeConfig, of GPTQModifier."""


def run_job(job: Job, folder: Path, name: str, python: str = sys.executable, timeout: float | None = None) -> dict:
    """Run a job in its own process; its result as a dictionary, with `error` and `log` if it failed.

    Files go to `folder`: `<name>.json` (the result) and `<name>.log`. A complete result found there is used again if it
    came from an equal job.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_file, result_file, log = (folder / f"{name}{suffix}" for suffix in (".job.json", ".json", ".log"))
    if result_file.is_file() and (found := read_json(result_file))["job"] == asdict(job):
        return found
    write_json(job_file, asdict(job))
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), environment.get("PYTHONPATH"))))
    environment.setdefault("HF_HUB_OFFLINE", "1")
    if job.engine == "ours":
        environment = with_allocator(environment)  # as our commands have it
    if (os.cpu_count() or 1) < 4:
        environment.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # gptqmodel 7.6 starts none on two cores and then fails
    with log.open("w", encoding="utf-8") as file:
        command = [python, __file__, str(job_file), str(result_file)]
        try:
            subprocess.run(command, stdout=file, stderr=file, env=environment, timeout=timeout, check=True)
        except subprocess.TimeoutExpired:
            return {"job": asdict(job), "error": f"no result after {timeout:.0f} s", "log": str(log)}
        except subprocess.CalledProcessError as error:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            what = lines[-1] if error.returncode > 0 and lines else f"ended with signal {-error.returncode}"
            return {"job": asdict(job), "error": what[:300], "log": str(log)}
    return read_json(result_file)


def main() -> None:
    job = Job(**read_json(Path(sys.argv[1])))
    rows = json.loads(Path(job.rows).read_text())
    output, runs = Path(job.output), []
    if job.gpu_memory:
        limit_gpu(job.gpu_memory)
    for repetition in range(1, job.repeat + 1):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        with measured() as cost:
            parts = ENGINES[job.engine](job, rows)
        runs.append(parts | asdict(cost) | {"gpu_reserved_gib": reserved_gib()})
        release()
        if job.refine and repetition == job.repeat:
            with measured() as cost:
                report = refine(job, rows)
            runs[-1]["refine"] = report | asdict(cost)
            release()
    if job.dense:
        write_dense(output, dense(output), job.device)
    version = importlib.metadata.version(PACKAGES[job.engine]) if job.engine != "ours" else own_version()
    tokens = sum(map(len, rows))
    write_json(
        Path(sys.argv[2]), {"job": asdict(job), "version": version, "rows": len(rows), "tokens": tokens, "runs": runs}
    )


def ours(job: Job, rows: list[list[int]]) -> dict[str, Any]:
    from qlora.data.calibration import CalibrationRow
    from qlora.quantization import GPTQSettings, quantize_checkpoint

    settings = GPTQSettings(bits=job.bits, group_size=job.group_size, **job.options)
    calibration = [CalibrationRow(tuple(row), None) for row in rows]
    report = quantize_checkpoint(Path(job.model), Path(job.output), calibration, settings, device=job.device)
    # Reading and writing run beside the computation; what is counted as loading and saving is the time waited for them.
    load, save = (sum(report.timings.get(part, 0.0) for part in parts) for parts in (("load",), ("write",)))
    return {"load": load, "quantize": report.seconds - load - save, "save": save, "parts": report.timings}


def refine(job: Job, rows: list[list[int]]) -> dict[str, Any]:
    from qlora.data.calibration import CalibrationRow
    from qlora.models.checkpoint import CheckpointReader
    from qlora.quantization.refine import RefineSettings, refine_checkpoint

    calibration = [CalibrationRow(tuple(row), None) for row in rows]
    source = CheckpointReader(Path(job.model))
    report = refine_checkpoint(source, Path(job.output), calibration, RefineSettings(), device=job.device)
    return {key: getattr(report, key) for key in ("kept", "kl_before", "kl_after", "teacher_seconds", "steps")}


def gptqmodel(job: Job, rows: list[list[int]]) -> dict[str, Any]:
    from gptqmodel import GPTQModel, QuantizeConfig

    settings = {"desc_act": False, "sym": True, "offload_to_disk": False} | job.options
    config = QuantizeConfig(bits=job.bits, group_size=job.group_size, **settings)
    clock = Clock()
    model = GPTQModel.load(job.model, config, device=job.device)
    clock.lap("load")
    model.quantize(with_masks(rows), batch_size=job.batch_rows, calibration_data_min_length=1)
    clock.lap("quantize")
    model.save(job.output)
    clock.lap("save")
    return clock.laps


def llmcompressor(job: Job, rows: list[list[int]]) -> dict[str, Any]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = QuantizationArgs(
        num_bits=job.bits, type="int", symmetric=True, strategy="group", group_size=job.group_size
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16, device_map={"": job.device})
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    clock.lap("load")
    oneshot(
        model=model,
        dataset=Dataset.from_list(with_masks(rows)),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"], **job.options),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        batch_size=job.batch_rows,
    )
    clock.lap("quantize")
    model.save_pretrained(job.output, save_compressed=True)
    tokenizer.save_pretrained(job.output)
    clock.lap("save")
    return clock.laps


ENGINES: dict[str, Callable[[Job, list[list[int]]], dict[str, Any]]] = {
    "ours": ours,
    "gptqmodel": gptqmodel,
    "llmcompressor": llmcompressor,
}


class Clock:
    """Seconds between laps, the GPU's queue included."""

    def __init__(self) -> None:
        self.laps: dict[str, Any] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def write_dense(compressed: Path, target: Path, device: str) -> None:
    """A compressed-tensors directory as plain bf16 weights, decompressed by its own library."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        compressed,
        dtype=torch.bfloat16,
        device_map={"": device},
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_scale")}
    config = type(model.config).from_pretrained(compressed)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)._from_config(config, dtype=torch.bfloat16)
    plain.save_pretrained(target, state_dict={name: state[name] for name in plain.state_dict()})
    AutoTokenizer.from_pretrained(compressed).save_pretrained(target)


def dense(output: Path) -> Path:
    """Where the plain weights of a compressed result lie."""
    return output.with_name(f"{output.name}-dense")


def with_masks(rows: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]


def reserved_gib() -> float | None:
    """Peak of the memory that torch's allocator took from the GPU; None without one."""
    import torch

    return round(torch.cuda.max_memory_reserved() / GIB, 3) if torch.cuda.is_available() else None


def limit_gpu(gib: float) -> None:
    import torch

    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)


def release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def own_version() -> str:
    from qlora import __version__

    return __version__


if __name__ == "__main__":
    main()
