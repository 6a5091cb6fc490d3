"""Reading the next layer and writing the last one while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from qlora.models.checkpoint import CheckpointWriter, TensorSource, TensorSpec


class PrefetchingSource:
    """A TensorSource that reads announced tensors in the background and keeps them until they are released."""

    def __init__(self, source: TensorSource, device: str) -> None:
        self._source = source
        # From pinned memory a copy to the GPU is several times as fast.
        self._pin = device.startswith("cuda")
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._coming: dict[str, Future[torch.Tensor]] = {}

    @property
    def directory(self) -> Path:
        return self._source.directory

    def names(self) -> list[str]:
        return self._source.names()

    def spec(self, name: str) -> TensorSpec:
        return self._source.spec(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to read these."""
        for name in names:
            self._coming[name] = self._pool.submit(self._read, name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor; equal calls return one tensor until it is released, so it must not be written to."""
        return self._coming[name].result() if name in self._coming else self._source.read(name)

    def release(self, names: Iterable[str]) -> None:
        """Forget what was read."""
        for name in names:
            self._coming.pop(name, None)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        return tensor.pin_memory() if self._pin else tensor


class BackgroundWriter:
    """Copies tensors from the device and writes them in one thread, in order, at most `backlog` behind.

    A context manager; `finish` inside the block waits for everything, closes the file, and raises what went wrong in
    the thread. Leaving the block without it gives up what was not written.
    """

    def __init__(self, writer: CheckpointWriter, backlog: int = 64) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(1, "write")
        self._pending: deque[Future[None]] = deque()
        self._backlog = backlog

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor, which must not change any more."""
        self.then(lambda: self._writer.write(name, tensor))

    def then(self, action: Callable[[], None]) -> None:
        """Do this when everything before it is written."""
        self._pending.append(self._pool.submit(action))
        while self._pending and (len(self._pending) > self._backlog or self._pending[0].done()):
            self._pending.popleft().result()

    def finish(self) -> None:
        """Wait until everything is on the disk."""
        while self._pending:
            self._pending.popleft().result()
        self._writer.close()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        if kind is not None:
            self._writer.__exit__(kind, error, trace)
