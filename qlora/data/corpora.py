"""General text by the names that the field uses: `wikitext2`, `c4`, any data set of the hub, or a file.

The two that have a name have a part to calibrate on and another one to measure on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.artifacts import file_digest
from qlora.data.sources import SUFFIXES, is_local, load_texts
from qlora.errors import UserError

GENERAL = "evaluate.general"
"""The key of the recipe that names text to measure on."""


@dataclass(frozen=True)
class _HubTexts:
    """The part of a hub data set whose column `text` is read."""

    id: str
    config: str | None = None
    data_files: str | None = None
    split: str = "train"


# What GPTQ's authors and the libraries after them mean by these names. Of C4's first shard the beginning is enough.
NAMED_CORPORA = {
    "wikitext2": _HubTexts("Salesforce/wikitext", config="wikitext-2-raw-v1"),
    "c4": _HubTexts("allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz", split="train[:20000]"),
}
# What the field measures perplexity on, under the same names.
HELD_OUT_CORPORA = {
    "wikitext2": _HubTexts("Salesforce/wikitext", config="wikitext-2-raw-v1", split="test"),
    "c4": _HubTexts(
        "allenai/c4", data_files="en/c4-validation.00000-of-00008.json.gz", split="train[:20000]"
    ),  # the split that files are in which are named
}


def corpus_texts(name: str, key: str = "quantize.calibration.from") -> list[str]:
    """The texts of a named corpus, a file (.txt: its paragraphs; else its column `text`) or a hub data set.

    key: of the recipe that names it; the text of `evaluate.general` is the part that is held out.

    Raises `UserError` for a missing or unreadable file, a data set that cannot be read (no network, wrong id) and one
    without a column `text`.
    """
    if corpus_file(name) is not None:
        return load_texts(name)
    named = HELD_OUT_CORPORA if key == GENERAL else NAMED_CORPORA
    return _hub_texts(named.get(name) or _HubTexts(name), key)


def corpus_file(name: str) -> Path | None:
    """The file that `name` stands for; None for a named corpus or a hub id."""
    if name in NAMED_CORPORA:
        return None
    path = Path(name)
    return path if path.suffix in (*SUFFIXES, ".txt") or path.is_file() or is_local(name) else None


def corpus_digest(source: str | Sequence[str]) -> str | Sequence[str]:
    """What changes when the texts that a key such as `quantize.calibration.from` names do: a file's digest, else the
    value itself.

    Texts of the hub go by their name.
    """
    file = corpus_file(source) if isinstance(source, str) and source != "train" else None
    return file_digest(file) if file is not None and file.is_file() else source


def _hub_texts(wanted: _HubTexts, key: str) -> list[str]:
    import datasets
    import httpx

    fix = f"name a text file instead (.txt, or rows with a column `text`): {key}: general.txt"
    where = f"hub data set {wanted.id} [{wanted.split}]"
    try:
        rows = datasets.load_dataset(
            wanted.id, wanted.config, data_files=wanted.data_files, split=wanted.split, verification_mode="no_checks"
        )
    # Not found and no connection are OSErrors, a missing configuration or split is a ValueError, and a repository that
    # needs its own loading script is a RuntimeError.
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        what = f"cannot be read from the hub: {str(error).splitlines()[0]}"
        raise UserError(what, where, f"connect to the hub, or {fix}") from error
    if "text" not in rows.column_names:
        raise UserError(f"has no column `text` (its columns: {', '.join(rows.column_names)})", where, fix)
    return [text for text in rows["text"] if text.strip()]
