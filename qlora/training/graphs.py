"""Small models, whose kernels end before the next one is launched: whole passes recorded as CUDA graphs.

A graph replays thousands of launches as one, with tensors where they were when it was recorded. So batches are filled
up to a few sizes, and for each of these a forward with its backward is recorded when it first comes. The very first
batch runs as it is, and builds kernels; what it took is given back, since all recordings share memory of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qlora.training.flat import Flat
from qlora.training.packed import IGNORED
from qlora.training.schedule import Schedule

log = logging.getLogger(__name__)

# Sizes that batches are filled up to: so many between nothing and a mean batch.
SIZES = 8
SMALLEST = 64


@dataclass(frozen=True)
class Room:
    """What packed batches are filled up to."""

    tokens: int
    """A multiple of this."""
    rows: int
    longest: int
    """Odd, so that rows are not taken for a batch of this length each."""

    @classmethod
    def of(cls, schedule: Schedule) -> Room:
        """For all batches of a schedule."""
        mean = sum(schedule.lengths) / len(schedule.lengths) * schedule.rows_per_step
        mean /= schedule.forwards * schedule.processes
        tokens = max(SMALLEST, 2 ** round(mean / SIZES).bit_length() // 2)
        return cls(tokens, schedule.rows_per_step, max(tokens, max(schedule.lengths)) | 1)

    def filled(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of `packed.pack` with one more row, of nothing to learn from, and rows without tokens behind it."""
        ends: torch.Tensor = batch["cu_seq_lens_q"]
        tokens, predicted = batch["input_ids"].shape[1], len(batch["targets"])
        total = _multiple(tokens, self.tokens)
        rest = total - tokens
        ends = torch.cat([ends, ends.new_full((self.rows + 2 - len(ends),), total)])
        # Positions that nothing is predicted from, each once: what is learned there is nothing.
        free = torch.ones(total, dtype=torch.bool)
        free[batch["predicting"]] = False
        others = free.nonzero()[: _multiple(predicted, self.tokens) - predicted, 0]
        return {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, rest)),
            "position_ids": torch.cat([batch["position_ids"], torch.arange(rest)[None]], dim=1),
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "targets": torch.cat([batch["targets"], torch.full_like(others, IGNORED)]),
            "predicting": torch.cat([batch["predicting"], others]),
        }


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    loss: torch.Tensor


class Graphs:
    """Forwards with their backwards, from recordings where there are any; on a CPU there are none."""

    def __init__(self, run: Callable[[dict[str, Any]], torch.Tensor], flat: Flat) -> None:
        """run: from inputs on the device to a loss, of which every launch follows from the inputs' shapes alone."""
        self._run, self._flat, self._device = run, flat, flat.whole.device
        self._gradient = torch.zeros_like(flat.whole.data)
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._records = self._device.type == "cuda"
        self._first = True
        self._pool: Any = torch.cuda.graph_pool_handle() if self._records else None

    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss; gradients are added to those of the parameters, as `backward` does."""
        key = tuple(tuple(each.shape) if isinstance(each, torch.Tensor) else each for each in inputs.values())
        if self._records and not self._first and key not in self._recorded:
            self._record(key, self._on_device(inputs))
        if key not in self._recorded:
            self._first = False
            loss = self._run(self._on_device(inputs))
            self._flat.backward(loss)
            return loss.detach()
        recorded = self._recorded[key]
        for name, tensor in recorded.inputs.items():
            tensor.copy_(inputs[name], non_blocking=True)
        recorded.graph.replay()
        self._flat.add(self._gradient)
        return recorded.loss.clone()

    def _record(self, key: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        graph = torch.cuda.CUDAGraph()
        # While a recording is made the allocator gives no memory back.
        torch.cuda.empty_cache()
        try:
            with (
                self._flat.set_aside(),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                loss = self._run(inputs)
                loss.backward()  # not `grad`, which does not see gradients of layers that are computed again
                for part, each in zip(self._flat.parts(self._gradient), self._flat.parameters, strict=True):
                    part.zero_() if each.grad is None else part.copy_(each.grad)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.info("training does without CUDA graphs: %s", str(error).splitlines()[0])
            self._records = False
            return
        tensors = {name: each for name, each in inputs.items() if isinstance(each, torch.Tensor)}
        self._recorded[key] = _Recorded(graph, tensors, loss.detach())

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Each tensor a copy of its own, so that a recording may keep it."""
        return {
            name: each.to(self._device, non_blocking=True, copy=True) if isinstance(each, torch.Tensor) else each
            for name, each in inputs.items()
        }
