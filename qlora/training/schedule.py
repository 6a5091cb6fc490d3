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
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        for start in range(0, len(order), self.rows_per_step):
            rows = order[start : start + self.rows_per_step].tolist()
            forwards = min(self.forwards, -(-len(rows) // self.processes))
            yield self.divided(rows, forwards * self.processes)

    def tokens(self, rows: Rows) -> int:
        """Positions that a forward computes, padding included."""
        lengths = [self.lengths[row] for row in rows]
        positions = len(lengths) * max(lengths, default=0) if self.padded else sum(lengths)
        return -(-positions // self.multiple) * self.multiple

    def longest(self, epochs: int) -> int:
        """Positions of the longest forward of so many epochs."""
        return max(self.tokens(rows) for epoch in range(epochs) for step in self.steps(epoch) for rows in step)

    def work(self, steps: int) -> list[tuple[int, int]]:
        """(tokens, positions computed for them) up to each of the first `steps` steps, [0] before the first."""
        found = [(0, 0)]
        for epoch in count():
            for step in self.steps(epoch):
                if len(found) > steps:
                    return found
                tokens, positions = found[-1]
                tokens += sum(self.lengths[row] for rows in step for row in rows)
                found.append((tokens, positions + sum(map(self.tokens, step))))
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
        return sum(len(self._own(step)) for step in self.schedule.steps(0))

    def __iter__(self) -> Iterator[Rows]:
        for step in self.schedule.steps(self._epoch):
            yield from self._own(step)

    def _own(self, step: list[Rows]) -> list[Rows]:
        return step[self.process :: self.schedule.processes]
