"""`qlora bench`: load time, prefill latency, decode throughput and peak memory of models, side by side.

Each model is measured in a process of its own: fresh memory, no library's patches but its own, and what crashes it is
one row's error. Rows that a file has already are not measured again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora.artifacts import read_json, write_json, write_text
from qlora.cli import with_allocator
from qlora.evaluation.bench_models import NotMeasurable, Subject, subjects

Row = dict[str, Any]
Combination = tuple[int, int]
"""Batch size and prompt length."""
LAST_WORDS = 600
"""Characters of what a process said before it died."""


@dataclass(frozen=True)
class Plan:
    """What is measured of every model."""

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    new: int
    dtype: str
    device: str
    timeout: float = 1800.0
    """Seconds that a process may take."""

    @property
    def combinations(self) -> list[Combination]:
        return [(batch, prompt) for prompt in self.prompts for batch in self.batches]


def run(
    directories: Sequence[Path],
    forms: Sequence[str],
    kernels: Sequence[str],
    batches: Sequence[int],
    prompts: Sequence[int],
    new: int,
    dtype: str,
    device: str,
    out: Path,
) -> list[Row]:
    """The command: measure, write bench.json, bench.md and bench.png to `out`, and print tables.

    Raises NotMeasurable for what cannot be measured as asked, and where nothing could be measured at all.
    """
    from qlora.models.loading import pick_device
    from qlora.reporting.bench_tables import bench_table, notes
    from qlora.reporting.console import StageProgress, console

    place = pick_device(device)
    models = subjects(directories, forms, kernels, place)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotMeasurable(f"cannot be a folder: {error.strerror}", str(out), "name another with --out") from None
    plan = Plan(tuple(batches), tuple(prompts), new, dtype, place)
    with StageProgress("bench") as progress:
        rows = bench(models, plan, out / "bench.json", progress.update)
    screen = console()
    for prompt in plan.prompts:
        screen.print(bench_table(rows, prompt))
    for note in notes(rows):
        screen.print(f"note: {note}", markup=False)
    screen.print("wrote " + ", ".join(map(str, write_results(rows, out))), markup=False)
    if all("error" in row for row in rows):
        raise NotMeasurable("nothing could be measured", str(out / "bench.json"), "the notes above say why")
    return rows


def bench(
    models: Sequence[Subject], plan: Plan, path: Path, progress: Callable[[int, int, str], None] = lambda *_: None
) -> list[Row]:
    """Measure what the JSON file `path` does not have yet; returns the rows asked for, in order, and keeps all there.

    Rows that failed are measured again. What was measured when the user interrupts is kept too.
    """
    document = read_json(path) if path.is_file() else {"rows": []}
    known = {_key(row): row for row in document["rows"]}
    wanted = [(model, _key_of(model, plan, pair)) for model in models for pair in plan.combinations]
    total = len(wanted)

    def keep(rows: Sequence[Row]) -> None:
        known.update((_key(row), row) for row in rows)
        write_json(path, document | {"rows": list(known.values())})

    for model in models:
        missing = [pair for pair in plan.combinations if _unknown(known.get(_key_of(model, plan, pair)))]
        while missing:
            progress(sum(not _unknown(known.get(key)) for _, key in wanted), total, model.label)
            rows = _process(model, plan, missing, keep)
            done = {(row["batch"], row["prompt"]) for row in rows}
            missing = [pair for pair in missing if pair not in done]
    progress(total, total, "")
    return [known[key] for _, key in wanted]


def _unknown(row: Row | None) -> bool:
    return row is None or "error" in row


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("directory", "form", "kernel", "dtype", "device", "new", "batch", "prompt"))


def _key_of(model: Subject, plan: Plan, pair: Combination) -> tuple[Any, ...]:
    return (model.directory, model.form, model.kernel, plan.dtype, plan.device, plan.new, *pair)


def _process(
    model: Subject, plan: Plan, pairs: Sequence[Combination], keep: Callable[[Sequence[Row]], None]
) -> list[Row]:
    """Rows of some of the combinations, at least of one, from one process; given to `keep` before they are returned."""
    head = asdict(model) | {"model": Path(model.directory).name, "label": model.label}
    head |= {"dtype": plan.dtype, "device": plan.device, "new": plan.new}
    with tempfile.TemporaryDirectory() as folder:
        job, rows, log = (Path(folder) / name for name in ("job.json", "rows.jsonl", "log.txt"))
        write_json(
            job,
            {
                "subject": asdict(model),
                "dtype": plan.dtype,
                "device": plan.device,
                "new": plan.new,
                "combinations": pairs,
                "rows": str(rows),
            },
        )
        try:
            end = _run([sys.executable, "-m", "qlora.evaluation.bench_process", str(job)], log, plan.timeout)
        except KeyboardInterrupt:
            keep([row for row in rows_of(head, pairs, _lines(rows), None) if "error" not in row])
            raise
        words = None if end == "exit code 0" else f"{end}: {_last_words(log)}"
        found = rows_of(head, pairs, _lines(rows), words)
    keep(found)
    return found


def _lines(rows: Path) -> list[Row]:
    """What a process wrote; a last line without an end is of one that was killed as it wrote."""
    text = rows.read_text(encoding="utf-8") if rows.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rows_of(head: Row, pairs: Sequence[Combination], lines: Sequence[Row], words: str | None) -> list[Row]:
    """Rows from what a process wrote: all that it measured, and what it died of.

    head: what they have in common. words: how it ended, unless well.
    """
    loaded: Row = next((line["loaded"] for line in lines if "loaded" in line), {})
    found = [head | loaded | line["row"] for line in lines if "row" in line]
    if not loaded:
        error = next((line["load_error"] for line in lines if "load_error" in line), words)
        return [head | {"batch": batch, "prompt": prompt, "error": f"loading: {error}"} for batch, prompt in pairs]
    measured = {(row["batch"], row["prompt"]) for row in found}
    begun = [(line["begun"]["batch"], line["begun"]["prompt"]) for line in lines if "begun" in line]
    # Of what is behind the one it died at, another process finds out.
    died_at = next((pair for pair in [*begun[-1:], *pairs] if pair not in measured), None)
    if words is not None and died_at is not None and (not found or died_at in begun):
        batch, prompt = died_at
        found.append(head | loaded | {"batch": batch, "prompt": prompt, "error": words})
    return found


def _run(command: Sequence[str], log: Path, timeout: float) -> str:
    """How it ended."""
    environment = with_allocator(dict(os.environ))
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            return f"exit code {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout:.0f} s"
        finally:
            process.kill()
            process.wait()


def _last_words(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    # A warning that came with every step says it once.
    lines = dict.fromkeys(" ".join(line.split()) for line in text.splitlines())
    return " ".join(line for line in lines if line)[-LAST_WORDS:]


def machine_of(rows: Sequence[Row]) -> str:
    """GPU and versions that rows were measured with, for a caption."""
    machines = dict.fromkeys(row["machine"] for row in rows if "machine" in row)
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, version in row.get("versions", {}).items():
            found.setdefault(name, {})[version] = None
    versions = [f"{name} {' and '.join(each)}" for name, each in found.items()]
    return ", ".join([" and ".join(machines) or "nothing was loaded", *versions])


def write_results(rows: Sequence[Row], folder: Path) -> list[Path]:
    """bench.md and, with matplotlib, bench.png, beside the bench.json that `bench` writes; returns the paths."""
    from qlora.reporting.bench_tables import markdown, plot

    machine = machine_of(rows)
    write_text(folder / "bench.md", markdown(rows, machine))
    found = [folder / "bench.json", folder / "bench.md"]
    if importlib.util.find_spec("matplotlib") is not None and any("error" not in row for row in rows):
        plot(rows, folder / "bench.png", machine)
        found.append(folder / "bench.png")
    return found
