"""MANIFEST.json: size and sha256 of every file of an exported folder, and the check that they are still so.

A run directory needs none: lineage.json has the same of what every stage wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.artifacts import file_digest, read_json, write_json
from qlora.errors import Problem, QloraError
from qlora.facts import RunFacts

NAME = "MANIFEST.json"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Checked:
    """What was compared, and every way in which it differs."""

    files: int
    size: int
    problems: tuple[Problem, ...]


def write_manifest(folder: Path, about: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Describe all files below a folder. known: digests of files that need not be read, by relative path."""
    files = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or file_digest(path)}
    write_json(folder / NAME, {**about, "files": files})


def check_folder(folder: Path, progress: Progress, stages: Collection[str] | None = None) -> Checked:
    """Compare a folder with its manifest, or a run directory with its lineage.

    stages: of a run to look at; None for all. Raises QloraError if it has neither.
    """
    if (folder / NAME).is_file():
        return _compare({folder: read_json(folder / NAME)["files"]}, folder, progress)
    if not folder.is_dir() or not (folder / "lineage.json").is_file():
        fix = "name a folder of `qlora export`, a download of what `qlora publish` wrote, or a run directory"
        raise QloraError(f"there is no {NAME} and no lineage.json", str(folder), fix)
    facts = RunFacts.read(folder)
    outputs = {"train": facts.dirs.adapter, "merge": facts.dirs.merged, "quantize": facts.dirs.gptq}
    outputs["evaluate"] = facts.dirs.evaluation
    looked_at = facts.stages.items() if stages is None else [each for each in facts.stages.items() if each[0] in stages]
    found = {outputs[name]: entry["outputs"] for name, entry in looked_at}
    if not found:
        raise QloraError("no stage of this run is complete", str(folder), "`qlora run` goes on with it")
    return _compare(found, folder, progress)


def _compare(listed: Mapping[Path, Mapping[str, Mapping[str, Any]]], root: Path, progress: Progress) -> Checked:
    """listed: folder → its files."""
    problems: list[Problem] = []
    total = sum(entry["bytes"] for files in listed.values() for entry in files.values())
    done = 0
    for folder, files in listed.items():
        for name, entry in files.items():
            where = (folder / name).relative_to(root).as_posix()
            progress(done, total, where)
            problems += _differs(folder / name, where, entry)
            done += entry["bytes"]
        added = {path.relative_to(folder).as_posix() for path in _files(folder)} - {*files, NAME}
        for name in sorted(added):
            problems.append(Problem("was added", (folder / name).relative_to(root).as_posix()))
    return Checked(sum(map(len, listed.values())), total, tuple(problems))


def _differs(path: Path, where: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
    if not path.is_file():
        yield Problem("is missing", where)
    elif (size := path.stat().st_size) != entry["bytes"]:
        yield Problem(f"has {size:,} bytes instead of {entry['bytes']:,}", where)
    elif (found := file_digest(path)) != entry["sha256"]:
        yield Problem(f"has other bytes: sha256 {found[:16]}… instead of {entry['sha256'][:16]}…", where)


def _files(folder: Path) -> list[Path]:
    """Sorted; without hidden ones, such as those that a download leaves."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
