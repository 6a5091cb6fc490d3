"""Reads training and evaluation rows from local files or the Hugging Face hub, and says exactly which row is wrong.

A source is one entry of the recipe's `data` section: a local file (JSON, JSON lines, CSV, Parquet), a local folder of
such files or of what `datasets` saved to disk, or a hub id. Whatever it is, it becomes a `RawRows`: plain dictionaries
that are read one after the other, as often as they are asked for, and never held together.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora.artifacts import file_digest
from qlora.data.files import COUNTED_IN_LINES, READERS, not_utf8
from qlora.errors import Problem, UserError
from qlora.recipe import Source

SUFFIXES = tuple(READERS)
SHOWN = 5  # how many bad rows an error prints before it only counts them

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class RawRow:
    """A row as it was written, before its format is known, or what is wrong with it.

    file, place: which of the source's files, and the line or index in it. share: of the source that is read by then.
    """

    content: dict[str, Any] | Problem
    file: int
    place: int
    share: float


@dataclass(frozen=True)
class RawRows:
    """The rows of a source, which every iteration reads anew; `max_rows` are its first ones.

    origin: the file, folder or hub id they come from. places: per file, what stands before a row's line or index in
    messages.
    """

    origin: str
    places: Sequence[str]
    read: Callable[[], Iterator[RawRow]] = field(repr=False)
    max_rows: int | None = None

    def __iter__(self) -> Iterator[RawRow]:
        last = float("inf") if self.max_rows is None else self.max_rows
        count = 0
        for row in self.read():
            yield row
            count += 1
            if count >= last:
                break
        if count == 0:
            fix = "check that this is the right file or split"
            raise UserError("there are no rows in it", where=self.origin, fix=fix)

    def where(self, file: int, place: int) -> str:
        """Where a row stands, for error messages."""
        return f"{self.places[file]}{place}"


@dataclass
class BadRows:
    """Collects what is wrong with rows, of which only the first ones are kept."""

    shown: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, problem: Problem) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(problem)

    @property
    def problems(self) -> list[Problem]:
        """The first ones, and how many there are beside them."""
        more = self.count - len(self.shown)
        return self.shown + ([Problem(f"and {more:,} more")] if more else [])

    def raise_any(self, total: int) -> None:
        """Raises `UserError` if there are any: counts all of them, shows the first few."""
        if not self.count:
            return
        more = self.count - len(self.shown)
        last = f"and {more} more: {self.count} of {total} rows cannot be used"
        raise UserError(self.shown + ([Problem(last)] if more else []))


def open_rows(source: Source) -> RawRows:
    """A source that can be read.

    Raises `UserError` for a path that does not exist (with near misses) and a hub data set that cannot be read; reading
    raises it for a source without rows.
    """
    if not is_local(source.path):
        return _open_hub(source)
    if source.stream:
        raise UserError("local rows are always read as they are needed", f"{source.path}: stream", "leave it out")
    return _open_local(source)


def load_texts(path: str) -> list[str]:
    """Plain texts for calibration: the paragraphs of a .txt file (blank lines between), else the `text` column."""
    file = Path(path)
    if file.suffix != ".txt":
        rows, texts, bad = _open_local(Source(path=path)), [], BadRows()
        for row in rows:
            where = rows.where(row.file, row.place)
            if isinstance(row.content, Problem):
                bad.add(located(row.content, where))
            elif isinstance(text := row.content.get("text"), str):
                texts.append(text)
            else:
                bad.add(Problem("no text in a column `text`", where))
        bad.raise_any(len(texts) + bad.count)
        return texts
    if not file.is_file():
        raise _missing(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(error, str(file))) from None
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if not paragraphs:
        raise UserError("the file is empty", where=str(file), fix="write it again, or name another file")
    return paragraphs


def source_digest(source: Source) -> str:
    """SHA-256 (hex) of what a source holds; equal content gives an equal digest whatever the file's time stamp.

    Files are hashed as bytes, once in a process. A hub data set is named by its commit when the recipe pins one, and is
    otherwise hashed row by row, since its default branch can move.
    """
    digest = hashlib.sha256()
    if is_local(source.path):
        path = Path(source.path)
        saved = _saved_data_set(path, source.split)
        for file in sorted(saved.glob("*.arrow")) if saved else _data_files(path, source.split):
            digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
            digest.update(_bytes_digest(str(file), file.stat().st_mtime_ns, file.stat().st_size))
        return digest.hexdigest()
    return _hub_digest(source.model_dump_json())


@lru_cache(maxsize=4096)
def _hub_digest(of: str) -> str:
    source = Source.model_validate_json(of)
    digest = hashlib.sha256(f"{source.path}:{source.config}:{source.split}\n".encode())
    if source.revision and COMMIT.fullmatch(source.revision):
        digest.update(source.revision.encode())
    else:
        for row in open_rows(source):
            digest.update(json.dumps(row.content, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _bytes_digest(file: str, changed: int, size: int) -> bytes:
    """Of a file as it was then."""
    return bytes.fromhex(file_digest(Path(file)))


def is_local(path: str) -> bool:
    """Whether a source's path names a file or folder on this machine rather than a hub id."""
    return Path(path).is_absolute() or Path(path).suffix in SUFFIXES or not _HUB_ID.fullmatch(path)


# -- local files ------------------------------------------------------------------------------------------------------


def _open_local(source: Source) -> RawRows:
    path = Path(source.path)
    if saved := _saved_data_set(path, source.split):
        return _of_data_set(_load_saved(saved), str(saved), source.max_rows)
    files = _data_files(path, source.split)
    sizes = [file.stat().st_size for file in files]

    def read() -> Iterator[RawRow]:
        for number, file in enumerate(files):
            before = sum(sizes[:number])
            for place, content, share in READERS[file.suffix](file):
                yield RawRow(content, number, place, (before + share * sizes[number]) / max(1, sum(sizes)))

    places = [f"{file}:" if file.suffix in COUNTED_IN_LINES else f"{file}, row " for file in files]
    return RawRows(str(path), places, read, source.max_rows)


def _of_data_set(rows: Any, origin: str, max_rows: int | None) -> RawRows:
    """The rows of a `datasets.Dataset`, which lie in files that are mapped, or of one that is read from elsewhere."""
    total = max_rows or getattr(rows, "num_rows", None)

    def read() -> Iterator[RawRow]:
        for index, row in enumerate(rows):
            yield RawRow(row, 0, index, min(1.0, (index + 1) / total) if total else 0.0)

    return RawRows(origin, [f"{origin}, row "], read, max_rows)


def _saved_data_set(path: Path, split: str) -> Path | None:
    """The folder of a data set that `save_to_disk` wrote, alone or in a dictionary of splits; None for others."""
    if (path / "state.json").is_file():
        return path
    if not (path / "dataset_dict.json").is_file():
        return None
    if not (path / split / "state.json").is_file():
        names = ", ".join(sorted(file.parent.name for file in path.glob("*/state.json")))
        raise UserError(f"there is no split `{split}` (found: {names})", str(path), "set `split`")
    return path / split


def _load_saved(folder: Path) -> Any:
    import datasets
    import pyarrow

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot be read as a saved data set: {error}", str(folder), "save it again") from error


def located(problem: Problem, where: str) -> Problem:
    """A problem of a row, with where the row stands unless it says so."""
    return problem if problem.where else Problem(problem.what, where, problem.fix)


def _data_files(path: Path, split: str) -> list[Path]:
    """The files of a local source, in name order.

    In a folder these are the files named after the split (`train.jsonl`, `train-00000.parquet`), or, when no file is
    named after any split, all of them: so a folder with `train` and `test` files never trains on its test rows.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"cannot read {path.suffix or 'a file without a suffix'}",
                str(path),
                f"use one of {', '.join(SUFFIXES)}",
            )
        return [path]
    if not path.is_dir():
        raise _missing(path)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise UserError(f"there is no data file ({', '.join(SUFFIXES)}) in this folder", where=str(path))
    named = [file for file in files if re.split(r"[-_.]", file.name)[0] == split]
    if named:
        return named
    if any(re.split(r"[-_.]", file.name)[0] in _SPLIT_NAMES for file in files):
        names = ", ".join(file.name for file in files[:SHOWN])
        raise UserError(f"no file for the split `{split}` (found: {names})", str(path), "set `split`, or name one file")
    return files


def _missing(path: Path) -> UserError:
    folder = path.parent
    if not folder.is_dir():
        existing = next(parent for parent in folder.parents if parent.is_dir())
        missing = existing / folder.relative_to(existing).parts[0]
        return UserError(
            "there is no such file", str(path), _did_you_mean(missing) or f"the folder {missing} is missing"
        )
    return UserError(
        "there is no such file", str(path), _did_you_mean(path) or "check `path` in the recipe's data section"
    )


def _did_you_mean(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.6)
    close += sorted(name for name in siblings if Path(name).stem == path.stem and name not in close)
    return f"Did you mean {' or '.join(close)}?" if close else ""


# -- the hub ----------------------------------------------------------------------------------------------------------


def _open_hub(source: Source) -> RawRows:
    """A data set of the hub: downloaded and mapped into memory, or with `stream` read over the network."""
    import datasets
    import httpx

    origin = f"hub data set {source.path}" + (f" ({source.config})" if source.config else "") + f" [{source.split}]"
    # Not found and no connection are OSErrors, an unknown configuration or split is a ValueError, and a repository that
    # needs its own loading script is a RuntimeError.
    errors = (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError)

    def refused(error: Exception) -> UserError:
        return UserError(
            f"cannot be read from the hub: {error}",
            where=origin,
            fix="check the id, `config`, `split` and `revision`, that this machine reaches the hub (or holds the data "
            "set in its cache), and that you are logged in if it is gated; a local file needs its suffix: "
            + ", ".join(SUFFIXES),
        )

    try:
        data_set = datasets.load_dataset(
            source.path, source.config, split=source.split, revision=source.revision, streaming=source.stream
        )
    except errors as error:
        raise refused(error) from error
    rows = _of_data_set(data_set, origin, source.max_rows)

    def read() -> Iterator[RawRow]:
        try:
            yield from rows.read()
        except errors as error:
            raise refused(error) from error

    return replace(rows, read=read)
