"""Rows as the columns that TRL's trainers read: in a file that is mapped into memory, however many there are."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import pyarrow
from datasets import Dataset

from qlora.data.cache import scratch

IDS = pyarrow.list_(pyarrow.int32())
TOGETHER = 256  # rows written at once


def on_disk(columns: Mapping[str, pyarrow.DataType], rows: Iterable[tuple[Any, ...]]) -> Dataset:
    """Rows of values in the order of the columns. The folder goes when nobody has the data set any more."""
    schema, rows, folder = pyarrow.schema(columns), iter(rows), scratch()
    file = str(folder / "rows.arrow")
    with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as stream:
        while batch := list(islice(rows, TOGETHER)):
            of_column = zip(zip(*batch, strict=True), schema, strict=True)
            arrays = [pyarrow.array(values, type=field.type) for values, field in of_column]
            stream.write_batch(pyarrow.record_batch(arrays, schema=schema))
    data_set = Dataset.from_file(file)
    weakref.finalize(data_set, shutil.rmtree, folder, ignore_errors=True)
    return data_set
