"""What an interrupted quantization had finished, so that the next call can go on behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qlora.artifacts import write_text
from qlora.quantization.settings import ModuleReport

# Finished layers and their reports, one JSON object per line; gone when the checkpoint is complete.
JOURNAL_NAME = "progress.jsonl"


class Journal:
    """The layers whose tensors are all written, and what was reported of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.layers = 0
        self.reports: list[ModuleReport] = []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        complete = [line for line in lines if line.endswith("\n")]
        if complete != lines:  # what was being written is taken back, so that lines added later are whole
            write_text(path, "".join(complete))
        for line in complete:
            entry = json.loads(line)
            self.layers = entry["layer"] + 1
            self.reports += [ModuleReport(**report) for report in entry["modules"]]

    def add(self, layer: int, reports: Sequence[ModuleReport]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"layer": layer, "modules": [asdict(report) for report in reports]}) + "\n")
