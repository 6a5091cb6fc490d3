"""Rendered rows, kept in the cache under a digest of all that decides them, so that they are tokenized once.

A file that cannot be read is made again; the oldest are removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from qlora.data.formats import Example
from qlora.data.preparation import PreparedData, Statistics
from qlora.data.rendering import RenderedRow
from qlora.paths import cache_dir
from qlora.recipe import Data

log = logging.getLogger(__name__)

KEPT = 32  # files
ABOUT = b"qlora"  # key of the file's metadata that holds what is not a row


def with_cache(
    examples: Sequence[tuple[Example, str]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Data,
    split_name: str,
    make: Callable[[], PreparedData],
) -> PreparedData:
    """What `make` returns, from the cache if it has been made before of the same."""
    if not tokenizer.is_fast:  # nothing says all that it does
        return make()
    file = cache_dir() / "rows" / f"{_digest(examples, tokenizer, settings, split_name)}.parquet"
    if file.is_file():
        try:
            prepared = _read(file)
            os.utime(file)
            return prepared
        except (OSError, pyarrow.ArrowException, KeyError, ValueError, TypeError) as error:
            log.info("rows are rendered again: %s cannot be read (%s)", file, error)
    prepared = make()
    _write(file, prepared)
    return prepared


def _digest(
    examples: Sequence[tuple[Example, str]], tokenizer: PreTrainedTokenizerBase, settings: Data, split_name: str
) -> str:
    digest = hashlib.sha256()
    about = [_code(), split_name, settings.loss_on, settings.max_length, settings.overlong, tokenizer.chat_template]
    template = settings.chat_template
    if template is not None and Path(template).is_file():
        template = Path(template).read_text(encoding="utf-8")
    about += [template, str(tokenizer.special_tokens_map), tokenizer.backend_tokenizer.to_str()]
    digest.update(json.dumps(about).encode())
    for located in examples:
        digest.update(repr(located).encode())
    return digest.hexdigest()


@cache
def _code() -> str:
    """Of the modules that render, so that another version of them is another key."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(file: Path) -> PreparedData:
    table = pyarrow.parquet.read_table(file)
    about = json.loads(table.schema.metadata[ABOUT])
    columns = table.to_pydict()
    locations = columns.pop("location")
    rows = [RenderedRow(*values) for values in zip(*columns.values(), strict=True)]
    return PreparedData(about["split_name"], rows, locations, Statistics(**about["statistics"]), about["chat_template"])


def _write(file: Path, prepared: PreparedData) -> None:
    """The file, whole or not at all; a cache that cannot be written is done without."""
    rows = prepared.rows
    columns = {
        "input_ids": pyarrow.array([row.input_ids for row in rows], pyarrow.list_(pyarrow.int32())),
        "labels": pyarrow.array([row.labels for row in rows], pyarrow.list_(pyarrow.int32())),
        "prompt_length": pyarrow.array([row.prompt_length for row in rows], pyarrow.int32()),
        "truncated": pyarrow.array([row.truncated for row in rows], pyarrow.bool_()),
        "answer_text": pyarrow.array([row.answer_text for row in rows], pyarrow.string()),
        "rejected_ids": pyarrow.array([row.rejected_ids for row in rows], pyarrow.list_(pyarrow.int32())),
        "good": pyarrow.array([row.good for row in rows], pyarrow.bool_()),
        "location": pyarrow.array(prepared.locations, pyarrow.string()),
    }
    about = {
        "split_name": prepared.split_name,
        "statistics": asdict(prepared.statistics),
        "chat_template": prepared.chat_template,
    }
    table = pyarrow.table(columns).replace_schema_metadata({ABOUT: json.dumps(about).encode()})
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, partial, compression="zstd")
        partial.replace(file)
        others = sorted(file.parent.glob("*.parquet"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in others[KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        partial.unlink(missing_ok=True)
        log.info("rendered rows are not kept: %s", error)
