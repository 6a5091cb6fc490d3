"""Which rows each optimizer step learns from, and how they are laid into forward passes.

A step's rows, and so what is learned, follow from the recipe and its seed alone. How many forward passes they take is
a matter of memory: every step of an epoch takes as many, each about as long, and how long the longest of the whole run
is, is known before the first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch.utils.data import Sampler

Rows = list[int]
"""Indices of the rows of one forward pass."""


@dataclass(frozen=True)
class Schedule:
    """The forwards of every step, of all processes."""

    lengths: Sequence[int]
    """Tokens of each row."""
    rows_per_step: int
    forwards: int
    """Forward passes of a step, per process."""
    processes: int
    seed: int
    padded: bool = False
    """Rows of a forward stand in a rectangle as wide as the longest, instead of end to end."""
    multiple: int = 1
    """Of positions, that forwards are filled up to."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.rows_per_step)

    def steps(self, epoch: int) -> Iterator[list[Rows]]:
        """The forwards of each step of an epoch; forward i is that of process i % processes.

        The last step has what rows are left, in fewer forwards if need be; some of them may be empty.
        """
        order_N = self._order(epoch)
        for step in range(self.steps_per_epoch):
            yield self._divided(order_N, step)

    def forwards_of(self, step: int) -> int:
        """Of a step of an epoch, per process."""
        rows = min(self.rows_per_step, len(self.lengths) - step * self.rows_per_step)
        return min(self.forwards, -(-rows // self.processes))

    def _order(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.lengths), generator=generator)

    def _rows(self, order_N: torch.Tensor, step: int) -> Rows:
        rows: Rows = order_N[step * self.rows_per_step : (step + 1) * self.rows_per_step].tolist()
        return rows

    def _divided(self, order_N: torch.Tensor, step: int) -> list[Rows]:
        return self.divided(self._rows(order_N, step), self.forwards_of(step) * self.processes)

    def tokens(self, rows: Rows) -> int:
        """Positions that a forward computes, padding included."""
        lengths = [self.lengths[row] for row in rows]
        positions = len(lengths) * max(lengths, default=0) if self.padded else sum(lengths)
        return -(-positions // self.multiple) * self.multiple

    def longest(self, epochs: int) -> int:
        """Positions of the longest forward of so many epochs."""
        return max(map(self._longest_of, range(epochs)))

    def _longest_of(self, epoch: int) -> int:
        """Of the epoch's steps, those alone are divided that can have it: a set may have a million."""
        order_N, last = self._order(epoch), self.steps_per_epoch - 1
        found = max(map(self.tokens, self._divided(order_N, last)))
        if not last:
            return found
        parts = self.forwards_of(0) * self.processes
        lengths_SR = np.asarray(self.lengths)[order_N[: last * self.rows_per_step].numpy()].reshape(last, -1)
        longest_S = lengths_SR.max(axis=1).astype(np.int64)
        # A forward is filled while no other has less, which is the mean or less (Graham 1969).
        most_S = longest_S + (lengths_SR.sum(axis=1) - longest_S) // parts
        if self.padded:
            most_S = longest_S * -(-self.rows_per_step // parts)
        for step in np.argsort(-most_S, kind="stable").tolist():
            if found >= most_S[step]:
                break
            found = max(found, *map(self.tokens, self._divided(order_N, step)))
        return found

    def work(self, steps: int) -> list[tuple[int, int]]:
        """(tokens, positions computed for them) up to each of the first `steps` steps, [0] before the first."""
        found = [(0, 0)]
        for epoch in count():
            order_N = self._order(epoch)
            for step in range(self.steps_per_epoch):
                if len(found) > steps:
                    return found
                tokens = sum(self.lengths[row] for row in self._rows(order_N, step))
                exact = not self.padded and self.multiple == 1
                positions = tokens if exact else sum(map(self.tokens, self._divided(order_N, step)))
                found.append((found[-1][0] + tokens, found[-1][1] + positions))
        raise AssertionError("epochs do not end")

    def divided(self, rows: Rows, parts: int) -> list[Rows]:
        """Rows in so many forwards of about equal length."""
        by_length = sorted(rows, key=lambda row: (-self.lengths[row], row))
        if self.padded:  # rows of like length together
            each, more = divmod(len(rows), parts)
            ends = [min(part, more) + part * each for part in range(parts + 1)]
            return [by_length[start:stop] for start, stop in zip(ends, ends[1:], strict=False)]
        # The longest row that is left goes where there is least so far (Graham 1969, longest processing time first).
        filled: list[tuple[int, int]] = [(0, part) for part in range(parts)]
        found: list[Rows] = [[] for _ in range(parts)]
        for row in by_length:
            tokens, part = heapq.heappop(filled)
            found[part].append(row)
            heapq.heappush(filled, (tokens + self.lengths[row], part))
        return found


def plan_schedule(
    lengths: Sequence[int],
    *,
    rows_per_step: int,
    processes: int,
    seed: int,
    epochs: int,
    most_tokens: int,
    padded: bool = False,
) -> Schedule:
    """The schedule of fewest forwards, none longer than `most_tokens` unless it is a single row."""
    most_forwards = max(1, rows_per_step // processes)

    def schedule(forwards: int) -> Schedule:
        return Schedule(lengths, rows_per_step, forwards, processes, seed, padded)

    if max(lengths) > most_tokens:
        return schedule(most_forwards)
    whole = Schedule(lengths, rows_per_step, 1, 1, seed).longest(epochs)
    forwards = min(most_forwards, -(-whole // (processes * most_tokens)))
    while forwards < most_forwards and schedule(forwards).longest(epochs) > most_tokens:
        forwards += 1
    return schedule(forwards)


class Forwards(Sampler[Rows]):
    """One process's forwards, epoch after epoch, as the batch sampler of a data loader."""

    def __init__(self, schedule: Schedule, process: int) -> None:
        self.schedule, self.process, self._epoch = schedule, process, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(map(self.schedule.forwards_of, range(self.schedule.steps_per_epoch)))

    def __iter__(self) -> Iterator[Rows]:
        for step in self.schedule.steps(self._epoch):
            yield from self._own(step)

    def _own(self, step: list[Rows]) -> list[Rows]:
        return step[self.process :: self.schedule.processes]
