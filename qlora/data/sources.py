"""Reads training and evaluation rows from local files or the Hugging Face hub, and says exactly which row is wrong.

A source is one entry of the recipe's `data` section: a local file (JSON, JSON lines, CSV, Parquet), a local folder of
such files or of what `datasets` saved to disk, or a hub id. Whatever it is, it becomes a `RawRows`: a sequence of plain
dictionaries that knows where each of its rows came from.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import Problem, UserError
from qlora.recipe import Source

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SHOWN = 5  # how many bad rows an error prints before it only counts them

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class RawRows:
    """Rows as they were written, before their format is known.

    rows: dictionaries of column name to value; a list, or a lazily read `datasets.Dataset`.
    origin: the file, folder or hub id they came from.
    locations: "file:line" per row; empty when a row is located by its index (hub data sets).
    """

    rows: Sequence[dict[str, Any]]
    origin: str
    locations: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def where(self, index: int) -> str:
        """Where row `index` stands, for error messages."""
        return self.locations[index] if self.locations else f"{self.origin}, row {index}"


def load_rows(source: Source) -> RawRows:
    """Reads a source; `max_rows` keeps its first rows.

    Raises `UserError` for a path that does not exist (with near misses), an empty source, malformed rows (all counted,
    the first ones shown with file and line) and a hub data set that cannot be read.
    """
    loaded = _load_local(Path(source.path), source.split) if is_local(source.path) else _load_hub(source)
    if len(loaded) == 0:
        raise UserError(
            "there are no rows in it", where=loaded.origin, fix="check that this is the right file or split"
        )
    if source.max_rows is not None and source.max_rows < len(loaded):
        return _first(loaded, source.max_rows)
    return loaded


def load_texts(path: str) -> list[str]:
    """Plain texts for calibration: the paragraphs of a .txt file (blank lines between), else the `text` column."""
    file = Path(path)
    if file.suffix != ".txt":
        rows = _load_local(file, "train")
        bad = [rows.where(i) for i, row in enumerate(rows) if not isinstance(row.get("text"), str)]
        if bad:
            raise UserError(f"{len(bad)} rows have no text in a column `text`", where=bad[0])
        return [row["text"] for row in rows]
    if not file.is_file():
        raise _missing(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problem = _not_utf8(error)
        raise UserError(problem.what, str(file), problem.fix) from None
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if not paragraphs:
        raise UserError("the file is empty", where=str(file), fix="write it again, or name another file")
    return paragraphs


def source_digest(source: Source) -> str:
    """SHA-256 (hex) of what a source holds; equal content gives an equal digest whatever the file's time stamp.

    Files are hashed as bytes. A hub data set is named by its commit when the recipe pins one, and is otherwise hashed
    row by row, since its default branch can move.
    """
    digest = hashlib.sha256()
    if is_local(source.path):
        path = Path(source.path)
        saved = _saved_data_set(path, source.split)
        for file in sorted(saved.glob("*.arrow")) if saved else _data_files(path, source.split):
            digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()
    digest.update(f"{source.path}:{source.config}:{source.split}\n".encode())
    if source.revision and _COMMIT.fullmatch(source.revision):
        digest.update(source.revision.encode())
        return digest.hexdigest()
    for row in load_rows(source):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def is_local(path: str) -> bool:
    """Whether a source's path names a file or folder on this machine rather than a hub id."""
    return Path(path).is_absolute() or Path(path).suffix in SUFFIXES or not _HUB_ID.fullmatch(path)


def _first(loaded: RawRows, count: int) -> RawRows:
    rows = loaded.rows[:count] if isinstance(loaded.rows, list) else loaded.rows.select(range(count))  # type: ignore[attr-defined]
    return RawRows(rows, loaded.origin, loaded.locations[:count])


# -- local files ------------------------------------------------------------------------------------------------------


def _load_local(path: Path, split: str) -> RawRows:
    if saved := _saved_data_set(path, split):
        return _load_saved(saved)
    rows: list[dict[str, Any]] = []
    locations: list[str] = []
    problems: list[Problem] = []
    for file in _data_files(path, split):
        for position, row in _READERS[file.suffix](file):
            where = f"{file}{position}"
            if isinstance(row, Problem):
                problems.append(Problem(row.what, where, row.fix))
            else:
                rows.append(row)
                locations.append(where)
    if problems:
        raise malformed(problems, len(rows) + len(problems))
    return RawRows(rows, str(path), locations)


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


def _load_saved(folder: Path) -> RawRows:
    import datasets
    import pyarrow

    try:
        return RawRows(datasets.load_from_disk(str(folder)), str(folder))  # type: ignore[arg-type]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot be read as a saved data set: {error}", str(folder), "save it again") from error


def malformed(problems: Sequence[Problem], total: int) -> UserError:
    """The error for rows that cannot be used: counts all of them, shows the first few."""
    shown = list(problems[:SHOWN])
    if len(problems) > SHOWN:
        shown.append(Problem(f"and {len(problems) - SHOWN} more: {len(problems)} of {total} rows cannot be used"))
    return UserError(shown)


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


_Entry = tuple[str, dict[str, Any] | Problem]  # ":<line>" or ", row <index>", and the row or what is wrong with it


def _read_jsonl(file: Path) -> Iterator[_Entry]:
    with file.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield f":{line}", _parse_json_row(raw)


def _parse_json_row(raw: bytes) -> dict[str, Any] | Problem:
    try:
        row = json.loads(raw)
    except json.JSONDecodeError as error:
        return Problem(f"not valid JSON: {error.msg} at column {error.colno}", fix="one JSON object per line")
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    return row if isinstance(row, dict) else _not_an_object(row)


def _not_utf8(error: UnicodeDecodeError) -> Problem:
    return Problem(f"not UTF-8: {error.reason} at byte {error.start}", fix="save the file as UTF-8")


def _not_an_object(row: Any) -> Problem:
    return Problem(f"a row must be a JSON object, this is a {type(row).__name__}")


def _read_json(file: Path) -> Iterator[_Entry]:
    """One JSON list of objects, or JSON lines under a .json name."""
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not raw.lstrip().startswith(b"["):
        yield from _read_jsonl(file)
        return
    try:
        rows = json.loads(raw)
    except json.JSONDecodeError as error:
        yield f":{error.lineno}", Problem(f"not valid JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        yield "", _not_utf8(error)
    else:
        for index, row in enumerate(rows):
            yield f", row {index}", row if isinstance(row, dict) else _not_an_object(row)


def _read_csv(file: Path) -> Iterator[_Entry]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, strict=True)
            for row in rows:
                whole = None not in row and None not in row.values()
                mismatch = Problem(f"not as many fields as the header has ({len(rows.fieldnames or ())})")
                yield f":{rows.reader.line_num}", row if whole else mismatch
    except csv.Error as error:
        fix = "check the quotes, or use JSON lines, which has no quoting to get wrong"
        yield f":{rows.reader.line_num}", Problem(f"not valid CSV: {error}", fix=fix)
    except UnicodeDecodeError as error:
        yield "", _not_utf8(error)


def _read_parquet(file: Path) -> Iterator[_Entry]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        yield "", Problem(f"not a Parquet file: {error}")
    else:
        for index, row in enumerate(table.to_pylist()):
            yield f", row {index}", row


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


# -- the hub ----------------------------------------------------------------------------------------------------------


def _load_hub(source: Source) -> RawRows:
    import datasets
    import httpx

    origin = f"hub data set {source.path}" + (f" ({source.config})" if source.config else "") + f" [{source.split}]"
    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split, revision=source.revision)
    # Not found and no connection are OSErrors, an unknown configuration or split is a ValueError, and a repository that
    # needs its own loading script is a RuntimeError.
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot be read from the hub: {error}",
            where=origin,
            fix="check the id, `config`, `split` and `revision`, that this machine reaches the hub (or holds the data "
            "set in its cache), and that you are logged in if it is gated; a local file needs its suffix: "
            + ", ".join(SUFFIXES),
        ) from error
    return RawRows(rows, origin)
