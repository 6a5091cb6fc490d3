"""Seconds and peak memory of a stage: GPU memory from torch's allocator, host memory from the kernel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass
class Measured:
    """Filled when the measured block ends. Memory in GiB; `gpu_peak_gib` is None without a GPU."""

    seconds: float = 0.0
    host_peak_gib: float | None = None
    gpu_peak_gib: float | None = None


@contextlib.contextmanager
def measured() -> Iterator[Measured]:
    import torch

    result = Measured()
    _reset_host_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    try:
        yield result
    finally:
        result.seconds = round(time.monotonic() - start, 2)
        result.host_peak_gib = host_peak_gib()
        if torch.cuda.is_available():
            result.gpu_peak_gib = round(torch.cuda.max_memory_allocated() / GIB, 3)


def host_peak_gib() -> float | None:
    """Resident high-water mark since the last reset (Linux: VmHWM), None where the kernel does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
    return round(int(line.split()[1]) * 1024 / GIB, 3) if line else None


def _reset_host_peak() -> None:
    with contextlib.suppress(OSError):  # not Linux, or not permitted: the mark then covers the whole process
        Path("/proc/self/clear_refs").write_text("5")


def memory_in_use_gib(device: str) -> float:
    """What the device (or, on a CPU, the process) holds now, for progress lines."""
    import psutil
    import torch

    used = torch.cuda.max_memory_allocated() if device.startswith("cuda") else psutil.Process().memory_info().rss
    return used / GIB
