"""How training is divided into steps, forwards and layers that are computed again, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qlora.errors import UserError
from qlora.models.resources import Machine, Pass
from qlora.models.shapes import AdapterShapes, ModelShapes
from qlora.models.training_memory import Plan, Probe, Trained, plan
from qlora.recipe import Recipe
from qlora.training.schedule import Schedule, plan_schedule

if TYPE_CHECKING:
    from qlora.data.store import Rows

# Work of a step, in that of a forward and a backward: one more forward of what answers are measured against, and for
# KTO two of answers to other prompts.
PASSES = {"sft": 1.0, "dpo": 1.5, "kto": 2.5, "orpo": 1.0}
# Of the memory that is free, what training may take: other processes, and what the formula does not know.
SHARE_OF_FREE = 0.9
# Divisions of a step that are looked at, at most.
MOST_FORWARDS = 64


@dataclass(frozen=True)
class Division:
    """What of a plan a run keeps when it is interrupted and goes on."""

    forwards: int
    recomputed: int
    offloaded: bool
    dense: int


@dataclass(frozen=True)
class TrainingPlan:
    """The rows of every forward, and what it costs."""

    schedule: Schedule
    memory: Plan
    layers: int
    budget: int
    """Bytes."""
    flops_per_token: float
    """4 N: a forward, and a backward to activations alone, through the N weights that a token is multiplied with."""
    peak_flops: float | None
    """Of all processes' devices; None where it is not known."""
    parts: dict[str, int]
    """Bytes by formula of what is live at the peak, without the process and slack."""
    recorded: bool
    """Whether passes are to be recorded as CUDA graphs."""
    shards: int = 1
    """Processes that share the 4-bit base."""

    @property
    def division(self) -> Division:
        one = self.memory.largest
        return Division(self.memory.forwards, one.recomputed, one.offloaded, one.dense)

    @property
    def text(self) -> str:
        """What was chosen, in a line."""
        one, count = self.memory.largest, self.memory.forwards
        forwards = "1 forward" if count == 1 else f"{count} forwards"
        again = f"{one.recomputed} of {self.layers} layers recomputed" if one.recomputed else "nothing recomputed"
        again += " from inputs in host memory" if one.offloaded else ""
        if one.dense:
            again += f", weights of {one.dense} of {self.layers} layers in 16 bits too"
        again += f", the base shared by {self.shards} processes" if self.shards > 1 else ""
        sizes = f"about {self.memory.peak / 2**30:.1f} GiB of {self.budget / 2**30:.1f}"
        return f"{forwards} of up to {one.tokens:,} tokens a step, {again}, {sizes}"


def rows_per_step(recipe: Recipe, row_tokens: Sequence[int], processes: int) -> int:
    """Rows of an optimizer step, from batch_size or tokens_per_step; a UserError if processes would go without."""
    train = recipe.train
    if train.tokens_per_step is not None:
        return max(processes, round(train.tokens_per_step * len(row_tokens) / sum(row_tokens)))
    batch_size = train.batch_size or 16
    if batch_size < processes:
        raise UserError(
            f"{batch_size} rows per step leave some of {processes} processes without a row",
            "train.batch_size",
            f"make it {processes} or more",
        )
    return batch_size


def plan_training(
    recipe: Recipe,
    row_tokens: Sequence[int],
    processes: int,
    shapes: ModelShapes,
    adapter: AdapterShapes,
    machine: Machine,
    free: int,
    *,
    padded: bool,
    measured: Probe | None = None,
    records: bool = False,
    before: Division | None = None,
) -> TrainingPlan:
    """The fastest division of the recipe's steps in `free` bytes of a device, or the share of them it may take.

    padded: rows cannot be packed end to end. measured: what a layer was found to take. records: passes can be recorded.
    before: what an interrupted run had, which one that goes on keeps: other forwards would round otherwise.
    """
    train = recipe.train
    rows = rows_per_step(recipe, row_tokens, processes)
    steps_per_epoch = -(-len(row_tokens) // rows)
    epochs = math.ceil(train.epochs if train.max_steps is None else train.max_steps / steps_per_epoch)
    budget = round(SHARE_OF_FREE * free) if train.memory == "auto" else round(train.memory * 2**30)
    if train.micro_batch_tokens is not None:
        schedules: Iterable[Schedule] = [
            plan_schedule(
                row_tokens,
                rows_per_step=rows,
                processes=processes,
                seed=recipe.seed,
                epochs=epochs,
                most_tokens=train.micro_batch_tokens,
                padded=padded,
            )
        ]
    else:
        counts = _counts(max(1, rows // processes))
        schedules = (Schedule(row_tokens, rows, forwards, processes, recipe.seed, padded) for forwards in counts)
    found = {schedule.forwards: (schedule, schedule.longest(epochs)) for schedule in schedules}
    total = sum(row_tokens)
    sequence, shards = sum(length**2 for length in row_tokens) / total, processes if train.shard else 1
    trained = Trained(recipe, shapes, adapter, machine, sequence, measured, records, shards)
    if before is not None and shards > 1:
        before = replace(before, dense=0)
    divisions = [(forwards, longest) for forwards, (_, longest) in found.items()]
    if before is not None:
        schedule = Schedule(row_tokens, rows, before.forwards, processes, recipe.seed, padded)
        found = {before.forwards: (schedule, schedule.longest(epochs))}
        largest = Pass(
            found[before.forwards][1], before.recomputed, before.offloaded, before.dense, before.forwards > 1
        )
        chosen = Plan(before.forwards, largest, trained.peak(largest))
    else:
        chosen = plan(trained, divisions, total * rows / len(row_tokens) / processes, budget)
    flops = 4.0 * (shapes.active + shapes.head)
    peak = None if machine.peak is None else machine.peak * processes
    largest = chosen.largest
    return TrainingPlan(
        found[chosen.forwards][0],
        chosen,
        shapes.layers,
        budget,
        flops,
        peak,
        trained.parts(largest),
        trained.recorded(largest),
        shards,
    )


def plan_batches(
    recipe: Recipe,
    row_tokens: Sequence[int],
    longest: int,
    processes: int,
    shapes: ModelShapes,
    adapter: AdapterShapes,
    machine: Machine,
    free: int,
    *,
    fewest: int = 1,
    before: Division | None = None,
) -> TrainingPlan:
    """The fastest division where TRL makes the batches: of equally many rows, padded to the longest of the batch.

    row_tokens: of all that a row brings, of a pair both answers with their prompt; longest: what a row may be padded
    to; fewest: rows of a forward, where a step has as many. Layers are computed again all or none. The rest is as
    `plan_training` has it.
    """
    train = recipe.train
    rows = rows_per_step(recipe, row_tokens, processes)
    if rows % processes:
        raise UserError(
            f"{rows} rows per step are not equally many for {processes} processes",
            "train.batch_size",
            f"make it a multiple of {processes}",
        )
    budget = round(SHARE_OF_FREE * free) if train.memory == "auto" else round(train.memory * 2**30)
    mean = sum(row_tokens) / len(row_tokens)
    sequence, shards = sum(length**2 for length in row_tokens) / sum(row_tokens), processes if train.shard else 1
    trained = Trained(recipe, shapes, adapter, machine, sequence, shards=shards)
    if before is not None and shards > 1:
        before = replace(before, dense=0)
    found: list[tuple[bool, float, Plan]] = []
    own = rows // processes
    for forwards in (count for count in range(1, own + 1) if own % count == 0 and own // count >= min(fewest, own)):
        for count in (0, shapes.layers):
            if train.gradient_checkpointing not in (None, bool(count)):
                continue
            smallest = Pass(own // forwards * longest, count)
            one = trained.with_dense(smallest, budget) if trained.peak(smallest) <= budget else smallest
            division = Plan(forwards, one, trained.peak(one))
            if before is not None and before != Division(forwards, one.recomputed, one.offloaded, one.dense):
                continue
            seconds = forwards * trained.seconds(replace(one, tokens=round(own / forwards * mean)))
            fits = division.peak <= budget
            found.append((not fits, seconds if fits else division.peak, division))
    if not found:  # memory is another than it was
        assert before is not None, "there is a division"
        largest = Pass(own // before.forwards * longest, before.recomputed, before.offloaded, before.dense)
        found.append((False, 0.0, Plan(before.forwards, largest, trained.peak(largest))))
    chosen = min(found, key=lambda each: each[:2])[2]
    return TrainingPlan(
        Schedule(row_tokens, rows, chosen.forwards, processes, recipe.seed, True),
        chosen,
        shapes.layers,
        budget,
        4.0 * (shapes.active + shapes.head),
        None if machine.peak is None else machine.peak * processes,
        trained.parts(chosen.largest),
        False,
        shards,
    )


def fewest_rows(method: str) -> int:
    """Of a batch: KTO estimates from a row's neighbours what it measures answers against."""
    return 2 if method == "kto" else 1


def longest_of(method: str, rows: Rows) -> int:
    """Positions of one row in a batch whose activations are kept; a pair takes two of the longest answer.

    KTO also runs another row's answer behind each prompt, of which nothing is kept.
    """
    if method == "kto":
        return int(rows.column("length").max())
    worse_N = rows.column("rejected") + rows.column("prompt_length")
    return 2 * int(np.maximum(rows.column("length"), worse_N).max())


def _counts(most: int) -> Iterator[int]:
    """Numbers of forwards up to `most`, all of the small ones."""
    count = 0
    for _ in range(MOST_FORWARDS):
        count = min(most, count + max(1, count // 8))
        yield count
        if count == most:
            return
