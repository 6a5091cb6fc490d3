"""What a training run reports while it goes, and the mark that says a checkpoint is whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora.measure import memory_in_use_gib
from qlora.training.plan import TrainingPlan

COMPLETE = "complete"  # file in a checkpoint folder: everything else in it was written


@dataclass(frozen=True)
class Reporter:
    """Where a stage reports: `progress(done, total, text)` and `log(metrics, step)`."""

    progress: Callable[[int, int, str], None]
    log: Callable[[dict[str, float], int], None]


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once all its files are written: a killed process leaves none that looks whole."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


@dataclass
class Report(TrainerCallback):
    """Progress with loss, tokens per second, memory and time left; keeps the loss curve for the lineage.

    Speed is that of the steps after the first of this process, which also builds kernels and fills caches. Tokens are
    counted from the plan, so that nobody waits for the device; the first and the last step are logged in any case.
    """

    reporter: Reporter
    device: str
    plan: TrainingPlan
    resumed_from: str | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    _work: list[tuple[int, int]] = field(default_factory=list)
    _first: tuple[int, float] | None = None
    """The first step of this process, and when the device was done with it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._work = self.plan.schedule.work(state.max_steps)
        self._first = None
        self.reporter.progress(state.global_step, state.max_steps, "")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._first is None or state.global_step == state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = {key: value for key, value in (logs or {}).items() if isinstance(value, (int, float))}
        if "eval_loss" in logs:
            self.reporter.log({"eval_loss": logs["eval_loss"]}, state.global_step)
            self.curve.append({"step": state.global_step, "eval_loss": logs["eval_loss"]})
        if "loss" not in logs:
            return
        if self._first is None:
            self._first = state.global_step, time.monotonic()
        memory = memory_in_use_gib(self.device)
        entry = {
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate", math.nan),
            "grad_norm": logs.get("grad_norm", math.nan),
            "memory_gib": round(memory, 3),
            **self._speed(state.global_step),
        }
        self.curve.append({"step": state.global_step, **entry})
        self.reporter.log(entry, state.global_step)
        speed = [f"{entry['tokens_per_second']:,.0f} tok/s"] if "tokens_per_second" in entry else []
        speed += [f"{entry['mfu']:.0%} MFU"] if "mfu" in entry else []
        speed += [f"{entry['padding']:.0%} padding"] if entry.get("padding") else []
        text = " · ".join([f"loss {logs['loss']:.3f}", *speed, f"{memory:.1f} GiB"])
        self.reporter.progress(state.global_step, state.max_steps, text)

    def _speed(self, step: int) -> dict[str, float]:
        """Tokens per second, the share of padding, and the share of the peak that 4 N FLOPs for a token are."""
        if self._first is None or step <= self._first[0]:
            return {}
        first, ended = self._first
        tokens, positions = (now - then for now, then in zip(self._work[step], self._work[first], strict=True))
        rate = tokens / max(time.monotonic() - ended, 1e-9)
        found = {"tokens_per_second": round(rate, 1), "padding": round(1 - tokens / positions, 4)}
        if self.plan.peak_flops is not None:
            found["mfu"] = round(rate * self.plan.flops_per_token / self.plan.peak_flops, 4)
        return found

    def metrics(self) -> dict[str, Any]:
        """For the lineage: final loss, steps of this process, speed, padding, and the loss curve."""
        losses = [entry["loss"] for entry in self.curve if "loss" in entry]
        speeds = [entry for entry in self.curve if "tokens_per_second" in entry]
        tokens, positions = self._work[-1]
        return {
            "final_loss": sum(losses[-5:]) / len(losses[-5:]) if losses else None,
            "steps": self.curve[-1]["step"] if self.curve else 0,
            "tokens": tokens,
            "non_padding_share": round(tokens / positions, 4) if positions else None,
            "tokens_per_second": speeds[-1]["tokens_per_second"] if speeds else None,
            "mfu": speeds[-1].get("mfu") if speeds else None,
            "plan": self.plan.text,
            "resumed_from": self.resumed_from,
            "curve": self.curve,
        }
