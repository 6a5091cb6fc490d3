"""What is made of data once and kept in the cache: folders under a digest of all that decides what is in them.

A folder that cannot be read is made again; of those that nobody used for a day, the oldest are removed. A cache that
cannot be written is done without: what is made lies in a temporary folder, which is gone once it is mapped into memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from qlora.errors import WillNotFit
from qlora.paths import cache_dir

T = TypeVar("T")

log = logging.getLogger(__name__)

KEPT = 64  # folders
A_DAY = 24 * 3600.0
PARTIAL = ".partial"  # what a process that was killed left behind goes too


def key_of(*about: Any) -> str:
    """A digest of plain values and of the modules that read and render, so that another version makes another key."""
    return hashlib.sha256(json.dumps([_code(), *about]).encode()).hexdigest()


def cached(key: str | None, write: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """What `read` finds in a folder that `write` fills, unless it has been filled before under this key.

    Without a key it is made anew. Processes that want the same wait for the one that makes it. Raises `WillNotFit` when
    the disk is full.
    """
    rows = cache_dir() / "rows"
    if key is None or not _can_write(rows):
        return _made(scratch(), write, read)
    folder = rows / key
    with _alone(rows):
        if folder.is_dir():
            try:
                found = read(folder)
                os.utime(folder)
                return found
            except (OSError, ValueError, KeyError, EOFError) as error:
                log.info("made again: %s cannot be read (%s)", folder, error)
                shutil.rmtree(folder, ignore_errors=True)
        return _made(scratch(), write, read, folder)


def scratch() -> Path:
    """A new folder beside what is kept, or where temporary files are if the cache cannot be written."""
    rows = cache_dir() / "rows"
    return Path(tempfile.mkdtemp(suffix=PARTIAL, dir=rows if _can_write(rows) else None))


def _made(partial: Path, write: Callable[[Path], None], read: Callable[[Path], T], folder: Path | None = None) -> T:
    try:
        write(partial)
        if folder is None:
            return read(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another machine may have been first, where files have no locks
                raise
        _remove_old(folder.parent)
        return read(folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise WillNotFit("the disk is full", str(partial.parent), "set QLORA_CACHE to a folder with room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("what is made of data is not kept: %s", error)
        return False
    return os.access(folder, os.W_OK)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.info("what is made of data may be made several times at once: %s", error)
        yield


def _remove_old(rows: Path) -> None:
    ages = {path: time.time() - path.stat().st_mtime for path in rows.iterdir() if path.is_dir()}
    for number, path in enumerate(sorted(ages, key=lambda path: ages[path])):
        if ages[path] > A_DAY and (number >= KEPT or path.suffix == PARTIAL):
            shutil.rmtree(path, ignore_errors=True)


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
