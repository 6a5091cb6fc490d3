"""A profile of one training step: a trace to look at, and a table of where its time went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Steps before the profiled one: they build kernels and fill caches.
WARM_UP = 3
ROWS = 40


class ProfileStep(TrainerCallback):
    """Profiles the step after WARM_UP others of this process, or its last if there are fewer.

    Writes `trace.json` (chrome://tracing, Perfetto) and `table.txt` to `directory`.
    """

    def __init__(self, directory: Path, *, on_gpu: bool) -> None:
        self.directory, self.on_gpu = directory, on_gpu
        self._left = WARM_UP
        self._profile: Any = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._left == 0 or (self._left > 0 and state.global_step == state.max_steps - 1):
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
            self._profile = profile(activities=activities)
            self._profile.__enter__()
            self._left = 0
        self._left -= 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(None, None, None)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.directory / "trace.json"))
        by = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=80)
        (self.directory / "table.txt").write_text(f"Step {state.global_step}\n{table}\n", encoding="utf-8")
        self._profile = None
