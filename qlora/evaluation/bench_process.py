"""The process in which `qlora bench` measures one model: `python -m qlora.evaluation.bench_process JOB.json`.

It writes a line of JSON for every batch size and prompt length to a file as soon as it is measured, so that whatever
happens to the process later is one row's matter. Libraries may print what they like.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

LIBRARIES = "torch", "transformers", "bitsandbytes", "gptqmodel"
REPEATS = 3
ENOUGH_SECONDS = 3.0
"""Of measuring: what takes longer is not repeated."""


def main(path: Path) -> None:
    """Do a job: its rows, and one before them that says how loading went."""
    import torch

    from qlora.doctor import installed_versions
    from qlora.evaluation.bench_models import Subject, load

    job = json.loads(path.read_text(encoding="utf-8"))
    rows = Path(job["rows"])
    device = job["device"]
    try:
        loaded = load(Subject(**job["subject"]), job["dtype"], device)
    except Exception as error:
        _write(rows, {"load_error": in_a_line(error)})
        raise
    weights = torch.cuda.memory_allocated() if device.startswith("cuda") else _resident("VmRSS")
    load_peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else _resident("VmHWM")
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    found = {"load_seconds": loaded.seconds, "build_seconds": loaded.build_seconds, "machine": machine}
    versions = installed_versions()
    found["versions"] = {name: versions[name] for name in LIBRARIES if name in versions}
    _write(rows, {"loaded": found | {"weights_bytes": weights, "load_peak_bytes": load_peak}})
    for batch, prompt in job["combinations"]:
        where = {"batch": batch, "prompt": prompt}
        _write(rows, {"begun": where})
        try:
            _write(rows, {"row": where | measure(loaded.model, batch, prompt, job["new"], loaded.eager_because)})
        except Exception as error:  # memory above all
            _write(rows, {"row": where | {"error": in_a_line(error)}})
            if device.startswith("cuda") and not isinstance(error, torch.OutOfMemoryError):
                raise  # CUDA may be broken from here on
        # With the traceback, the caches of the failed attempt are gone.
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def measure(model: Any, batch: int, prompt: int, new: int, eager_because: str | None = None) -> dict[str, Any]:
    """Times and memory of `batch` random prompts of a length, and `new` tokens for each."""
    import torch

    from qlora.evaluation.decoding import Decoder

    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    _reset_peak(on_gpu)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids_BT = torch.randint(vocabulary, (batch, prompt), generator=generator).to(device)
    decoder = Decoder(model, batch, prompt + new, graphs=None if eager_because is None else False)
    decoder.prefill(ids_BT)
    decoder.capture()
    decoder.step()
    prefills = _seconds(lambda: decoder.prefill(ids_BT), on_gpu)
    decodes: list[float] = []
    began = time.perf_counter()
    while len(decodes) < REPEATS and (not decodes or time.perf_counter() - began < ENOUGH_SECONDS):
        decoder.prefill(ids_BT)
        decodes += _seconds(lambda: _steps(decoder, new - 1), on_gpu, repeats=1)
    seconds = statistics.median(decodes)
    return {
        "new": new,
        "prefill_seconds": statistics.median(prefills),
        "step_seconds": seconds / (new - 1),
        "tokens_per_second": batch * (new - 1) / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM"),
        "graph": decoder.has_graph,
        "eager_because": eager_because or decoder.eager_because,
    }


def _steps(decoder: Any, count: int) -> None:
    for _ in range(count):
        decoder.step()


def _seconds(work: Any, on_gpu: bool, repeats: int = REPEATS) -> list[float]:
    import torch

    found: list[float] = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
        if sum(found) > ENOUGH_SECONDS:
            break
    return found


def _reset_peak(on_gpu: bool) -> None:
    import torch

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident(key: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_line(error: BaseException) -> str:
    return (f"{type(error).__name__}: " + " ".join(str(error).split()))[:800]


def _write(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
