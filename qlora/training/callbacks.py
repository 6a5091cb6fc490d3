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
    """Progress with loss, tokens per second, memory and time left; keeps the loss curve for the lineage."""

    reporter: Reporter
    device: str
    resumed_from: str | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    _started: float = 0.0
    _tokens: float = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()
        self.reporter.progress(state.global_step, state.max_steps, "")

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
        seconds = time.monotonic() - self._started
        self._tokens = logs.get("num_tokens", self._tokens)
        rate = self._tokens / seconds if seconds else 0.0
        memory = memory_in_use_gib(self.device)
        entry = {
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate", math.nan),
            "grad_norm": logs.get("grad_norm", math.nan),
            "tokens_per_second": round(rate, 1),
            "memory_gib": round(memory, 3),
        }
        self.curve.append({"step": state.global_step, **entry})
        self.reporter.log(entry, state.global_step)
        self.reporter.progress(
            state.global_step, state.max_steps, f"loss {logs['loss']:.3f} · {rate:,.0f} tok/s · {memory:.1f} GiB"
        )

    def metrics(self) -> dict[str, Any]:
        """For the lineage: final loss, steps of this process, tokens per second, and the loss curve."""
        losses = [entry["loss"] for entry in self.curve if "loss" in entry]
        rates = [entry["tokens_per_second"] for entry in self.curve if "loss" in entry]
        return {
            "final_loss": sum(losses[-5:]) / len(losses[-5:]) if losses else None,
            "steps": self.curve[-1]["step"] if self.curve else 0,
            "tokens_per_second": rates[-1] if rates else None,
            "resumed_from": self.resumed_from,
            "curve": self.curve,
        }
