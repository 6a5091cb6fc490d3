"""Seconds and peak memory of a stage: GPU memory from torch's allocator, host memory from the kernel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


class Stopwatch:
    """Seconds per part of a computation. On a GPU by events in its queue, so that measuring makes nobody wait."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what the block does, on the GPU or, without one, on the CPU, as `name`. Parts must not be nested."""
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            return
        import torch

        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count the CPU's own time in the block, whatever the GPU does."""
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Name → seconds; waits for the GPU."""
        for name, first, last in self._events:
            last.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + first.elapsed_time(last) / 1e3
        self._events.clear()
        return {name: round(seconds, 4) for name, seconds in self._seconds.items()}


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


def free_for_training(device: str) -> int:
    """Bytes of the device that are free or this process's own already."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss
