"""Terminal output: a progress bar with rate and time left, plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

last_log: Path | None = None  # of the latest run in this process
interrupted = False  # set by the signal handler
PLAIN_SECONDS = 15.0  # between two lines where output is not a terminal


def is_main_process() -> bool:
    """Rank 0 of a launch, or the only process. Other ranks print nothing and write no artefact."""
    return int(os.environ.get("RANK", "0")) == 0


def console() -> Console:
    """Standard output; silent on other ranks than 0."""
    return Console(quiet=not is_main_process(), highlight=False, soft_wrap=True)


def printable(words: str) -> str:
    """Text of others, which may hold what a terminal would obey: every such character is replaced."""
    return "".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in words)


def plain(words: str) -> str:
    """Text of others, to be printed as it is: for places where markup is read."""
    return escape(printable(words))


@contextlib.contextmanager
def log_to(directory: Path) -> Iterator[Path]:
    """Send logs and warnings of every library to a file of this process, so that the terminal stays readable."""
    global last_log
    import datasets

    rank = int(os.environ.get("RANK", "0"))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ("run.log" if rank == 0 else f"rank{rank}.log")
    last_log = path
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    keep_transformers_quiet()
    datasets.disable_progress_bars()
    try:
        yield path
    except BaseException:
        root.exception("ended with an error")
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


def keep_transformers_quiet() -> None:
    """Have it draw no bars, and log to Python's root logger instead of the terminal."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()


def duration(seconds: float) -> str:
    """`48 s`, `3 min 05 s`, `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class StageProgress:
    """`update(done, total, text)` draws a bar on a terminal, and prints a line now and then elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Progress | None = None
        self._started = self._printed = time.monotonic()
        self._first: int | None = None
        self._total: int | None = None

    def __enter__(self) -> StageProgress:
        if sys.stdout.isatty() and is_main_process():
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("[dim]{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=console(), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=None, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, text: str = "") -> None:
        """Show progress. Raises KeyboardInterrupt if one was asked for and got lost, as in a finaliser."""
        if interrupted:
            raise KeyboardInterrupt
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)
            return
        now = time.monotonic()
        if self._first is None or total != self._total:  # a stage counts rows, then steps
            self._first, self._total, self._started = done, total, now
        if now - self._printed < PLAIN_SECONDS or not is_main_process():
            return
        self._printed = now
        progressed = done - self._first
        left = f" · {duration((now - self._started) / progressed * (total - done))} left" if progressed > 0 else ""
        print(f"  {self.title} {done}/{total}{left}{' · ' + text if text else ''}", flush=True)
