"""Artefacts that appear whole or not at all, digests of files, and the lineage of a run."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora.errors import Problem, UserError, WillNotFit


@contextlib.contextmanager
def atomic_directory(target: Path, resume_key: str | None = None) -> Iterator[Path]:
    """A folder `<target>.partial` to write into, renamed to `target` when the block ends without an error.

    An earlier `target` stays readable until then. On any error the partial folder is removed, unless there is a
    `resume_key`: then it stays, and the next call with an equal key is given the folder as it was left. What was
    written under another key, or without one, is removed first.
    """
    partial = target.with_name(target.name + ".partial")
    replaced = target.with_name(target.name + ".replaced")
    # Beside the folder, not in it: whoever writes the artefact sees only what belongs to it.
    key_file = target.with_name(f".{target.name}.partial-key")
    shutil.rmtree(replaced, ignore_errors=True)
    if resume_key is None or not key_file.is_file() or key_file.read_text(encoding="utf-8") != resume_key:
        # In this order, what stands beside a key is always the folder that belongs to it, whole.
        key_file.unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        if resume_key is not None:
            write_text(key_file, resume_key)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        if resume_key is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    key_file.unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


DAMAGED = "the file is damaged: copy the checkpoint again"


def read_json(path: Path, fix: str = "delete it and run again") -> Any:
    """Raises UserError where it is not JSON; fix: what to do about it then."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", f"{path}:{error.lineno}", fix) from None


def digest(value: Any) -> str:
    """sha256 of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def quick_digest(directory: Path, patterns: tuple[str, ...] = ("*.safetensors", "*.json", "*.model")) -> str:
    """A digest of large files by name, size and their first and last megabyte: seconds saved on every run.

    Good enough to notice another checkpoint; the merge checks every 4-bit code anyway.
    """
    state = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in directory.glob(pattern)}):
        size = path.stat().st_size
        state.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            state.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            state.update(file.read())
    return state.hexdigest()


def manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below a folder, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): {"bytes": p.stat().st_size, "sha256": file_digest(p)} for p in files}


def result_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Of what a stage made, from its manifest."""
    return digest({name: entry["sha256"] for name, entry in files.items()})


def is_intact(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every file of a manifest is there with its size."""
    return next(missing_or_resized(directory, files), None) is None


def missing_or_resized(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """`gptq/model.safetensors is missing`, or `has another size`, for files of a manifest; directory: gptq."""
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            yield f"{directory.name}/{name} is missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{directory.name}/{name} has another size"


def require_unaltered(
    directory: Path,
    files: Mapping[str, Mapping[str, Any]],
    made_by: str,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Raise UserError, naming them, for files of a manifest whose bytes are not those that it was made of.

    Reads all of them. made_by: the stage. progress: of bytes.
    """
    total, done, altered = sum(entry["bytes"] for entry in files.values()), 0, []
    for name, entry in files.items():
        if progress is not None:
            progress(done, total, f"comparing {name}")
        path = directory / name
        if not path.is_file() or file_digest(path) != entry["sha256"]:
            altered.append(path)
        done += entry["bytes"]
    if altered:
        fix = f"put back what was there, or remove {directory} and run again, which makes it anew"
        raise UserError(
            Problem(f"not the file that {made_by} wrote: its sha256 is not that of lineage.json", str(path), fix)
            for path in altered
        )


def link_weights(source: Path, target: Path, files: Iterable[str]) -> None:
    """Put files of a finished artefact into another folder: safetensors as hard links where there are such."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            try:
                os.link(source / name, target / name)
                continue
            except OSError:  # another file system, or one without links
                pass
        shutil.copy2(source / name, target / name)


def require_disk(directory: Path, needed: int, purpose: str) -> None:
    """Raise `WillNotFit` unless `needed` bytes (plus 5 %) are free where `directory` will be."""
    place = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed * 1.05:
        raise WillNotFit(
            f"{purpose} needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free",
            str(directory),
            "free some space, or set output_dir to a larger disk; finished stages are kept and will be skipped",
        )


LOCK_HELD = "QLORA_LOCK_HELD"  # set for processes that a locked run starts


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a run directory for this process. Raises `UserError` if another one works in it.

    Processes of one launch share the lock of the first.
    """
    if os.environ.get(LOCK_HELD) or int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                "another process works in this run", str(directory), "wait for it, or give the recipe another name"
            ) from None
        yield


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process is in here for the same path, which need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Lineage:
    """What each stage of a run did: fingerprint, status, seconds, versions, inputs, outputs, metrics (lineage.json)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, dict[str, Any]] = {}
        self.reload()

    def reload(self) -> None:
        """Read what other processes have recorded."""
        self.stages = read_json(self.path)["stages"] if self.path.is_file() else {}

    def record(self, stage: str, entry: dict[str, Any]) -> None:
        self.stages[stage] = entry
        write_json(self.path, {"stages": self.stages})

    def forget(self, stage: str) -> None:
        """Say no more of a stage that is not part of the run now; its files stay."""
        if self.stages.pop(stage, None) is not None:
            write_json(self.path, {"stages": self.stages})

    def metrics(self, stage: str) -> dict[str, Any]:
        return self.stages.get(stage, {}).get("metrics", {})
