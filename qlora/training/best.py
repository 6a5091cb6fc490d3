"""The adapter with the lowest loss on held-out rows, and the end of a training that no longer lowers it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

BEST = "best.safetensors"  # beside the checkpoints, so that a run that goes on knows it


@dataclass
class KeepBest(TrainerCallback):
    """Keeps what was best, for `restore`; patience: evaluations without a lower loss after which training ends."""

    path: Path
    parameters: Callable[[], dict[str, nn.Parameter]]
    """What learns, by name."""
    every: int
    """Steps between evaluations."""
    patience: int | None
    writes: bool
    """Whether this process keeps the file; all see the same losses."""
    step: int = 0
    loss: float = math.inf

    def __post_init__(self) -> None:
        if self.path.is_file():
            with safe_open(self.path, framework="pt") as file:
                self.step, self.loss = int(file.metadata()["step"]), float(file.metadata()["loss"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (metrics or {}).get("eval_loss", math.inf)
        if loss < self.loss:
            self.step, self.loss = state.global_step, loss
            if self.writes:
                self._write()
        waited = (state.global_step - self.step) / self.every
        if self.patience is not None and waited >= self.patience:
            control.should_training_stop = True

    def restore(self) -> dict[str, float]:
        """Put what was best into the model; its step and loss."""
        with safe_open(self.path, framework="pt") as file, torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(file.get_tensor(name))
        return {"step": self.step, "eval_loss": self.loss}

    def _write(self) -> None:
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.parameters().items()}
        unfinished = self.path.with_suffix(".tmp")
        save_file(tensors, unfinished, metadata={"step": str(self.step), "loss": repr(self.loss)})
        os.replace(unfinished, self.path)
