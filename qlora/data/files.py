"""Reads local files a row at a time: JSON lines, CSV and Parquet without ever holding a file, a JSON list as a whole.

A reader gives what it finds in order: where in the file it stands, the row or what is wrong with it, and how much of
the file has been read by then.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from qlora.errors import Problem

Entry = tuple[int, "dict[str, Any] | Problem", float]
"""Line or index, a row or a problem (that says where it is if the number does not), share of the file read."""

PARQUET_ROWS = 256  # turned into Python's types together


def _read_jsonl(file: Path) -> Iterator[Entry]:
    size, done = max(1, file.stat().st_size), 0
    with file.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            done += len(raw)
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield line, _parse_json_row(raw), done / size


def _parse_json_row(raw: bytes) -> dict[str, Any] | Problem:
    try:
        row = json.loads(raw)
    except json.JSONDecodeError as error:
        return Problem(f"not valid JSON: {error.msg} at column {error.colno}", fix="one JSON object per line")
    except UnicodeDecodeError as error:
        return not_utf8(error)
    return row if isinstance(row, dict) else _not_an_object(row)


def not_utf8(error: UnicodeDecodeError, where: str = "") -> Problem:
    return Problem(f"not UTF-8: {error.reason} at byte {error.start}", where, "save the file as UTF-8")


def _not_an_object(row: Any) -> Problem:
    return Problem(f"a row must be a JSON object, this is a {type(row).__name__}")


def _read_json(file: Path) -> Iterator[Entry]:
    """One JSON list of objects, or JSON lines under a .json name."""
    with file.open("rb") as stream:
        start = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf")
    if not start.lstrip().startswith(b"["):
        for line, row, share in _read_jsonl(file):
            # Elsewhere in such a file, rows are counted and not lines.
            yield line, Problem(row.what, f"{file}:{line}", row.fix) if isinstance(row, Problem) else row, share
        return
    try:
        rows = json.loads(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except json.JSONDecodeError as error:
        yield 0, Problem(f"not valid JSON: {error.msg} at column {error.colno}", f"{file}:{error.lineno}"), 1.0
    except UnicodeDecodeError as error:
        yield 0, not_utf8(error, str(file)), 1.0
    else:
        for index, row in enumerate(rows):
            yield index, row if isinstance(row, dict) else _not_an_object(row), (index + 1) / len(rows)


def _read_csv(file: Path) -> Iterator[Entry]:
    size = max(1, file.stat().st_size)
    try:
        with file.open("rb") as raw, TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, strict=True)
            for row in rows:
                whole = None not in row and None not in row.values()
                mismatch = Problem(f"not as many fields as the header has ({len(rows.fieldnames or ())})")
                yield rows.reader.line_num, row if whole else mismatch, raw.tell() / size
    except csv.Error as error:
        fix = "check the quotes, or use JSON lines, which has no quoting to get wrong"
        yield rows.reader.line_num, Problem(f"not valid CSV: {error}", fix=fix), 1.0
    except UnicodeDecodeError as error:
        yield 0, not_utf8(error, str(file)), 1.0


def _read_parquet(file: Path) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            total = opened.metadata.num_rows
            for batch in opened.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    index += 1
                    yield index - 1, row, index / total
    except (OSError, pyarrow.ArrowException) as error:
        yield index, Problem(f"not a Parquet file: {error}", str(file)), 1.0


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
COUNTED_IN_LINES = (".jsonl", ".csv")
