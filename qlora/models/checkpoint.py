"""Reading and writing safetensors checkpoints one tensor at a time, so that memory never grows with the model.

A safetensors file is an 8-byte little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}` padded
with spaces to a multiple of 8, and the tensors' raw bytes (https://github.com/huggingface/safetensors, "Format").
The library's own reader maps the file and its writer wants every tensor at once; here tensors are read into memory that
they own, and written at offsets known in advance from a plan.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from qlora.errors import UserError, WillNotFit

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is, without its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """The tensors of one model, whether they lie on disk or are computed when they are read."""

    @property
    def directory(self) -> Path:
        """Holds config.json and tokenizer; not necessarily any weights."""
        ...

    def names(self) -> list[str]:
        """All tensor names, in the order in which they are best read."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, without reading it. Raises KeyError for an unknown name."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in memory of its own; from any thread. Raises KeyError for an unknown name."""
        ...


@dataclass(frozen=True)
class _Location:
    """Where the bytes of one tensor stand."""

    file: Path
    offset: int
    spec: TensorSpec


class CheckpointReader:
    """The tensors of a local directory: `model.safetensors`, an index with its shards, or one other safetensors file.

    file: the name of that one, where others lie beside it. Construction reads headers only. Raises UserError when there
    is no checkpoint, a shard is missing, or a file is damaged or truncated.
    """

    def __init__(self, directory: Path, file: str | None = None) -> None:
        self.directory = Path(directory)
        self._locations = _locate_tensors(self.directory, file)

    def names(self) -> list[str]:
        """All tensor names, shard after shard, in the order of their bytes."""
        return list(self._locations)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, from the header alone. Raises KeyError for an unknown name."""
        return self._locations[name].spec

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in memory of its own: no pages of the file stay mapped. Raises KeyError if unknown."""
        location = self._locations[name]
        data = torch.empty(location.spec.nbytes, dtype=torch.uint8)
        buffer = data.numpy().data
        with open(location.file, "rb", buffering=0) as file:
            file.seek(location.offset)
            done = 0
            while done < len(buffer):
                # One call reads at most 2 GiB on Linux.
                count = file.readinto(buffer[done:])
                if not count:
                    raise UserError(f"the file ended inside {name}", where=str(location.file), fix="download it again")
                done += count
        return data.view(location.spec.dtype).reshape(location.spec.shape)


class CheckpointWriter:
    """Streams the tensors of a plan known in advance to safetensors shards; holds at most one tensor.

    Files are named as transformers names them. The same plan and tensors give the same bytes, whatever the order of
    `write`. A context manager: leaving it normally closes, and closing raises if a planned tensor was never written.

    written: tensors that an earlier writer of the same plan, which was interrupted, is known to have written; its files
    are then continued. Raises WillNotFit when the disk has too little space for what is left of the plan, UserError
    when the directory does not hold the files of that earlier writer.
    """

    def __init__(
        self,
        directory: Path,
        plan: Mapping[str, TensorSpec],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        written: Collection[str] = (),
    ) -> None:
        self.directory = Path(directory)
        needed = total_bytes(plan) - sum(plan[name].nbytes for name in written)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise WillNotFit(
                f"{needed / 1e9:.1f} GB of weights to write, {free / 1e9:.1f} GB free on the disk",
                where=str(self.directory),
                fix="free some space, or choose another output directory",
            )
        self._locations: dict[str, _Location] = {}
        self._descriptors: dict[Path, int] = {}
        self._missing = set(plan) - set(written)
        shards = _split_into_shards(plan, max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            name = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._open_shard(self.directory / name, shard, continued=bool(written))
        if len(shards) > 1:
            self._write_index(plan)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor, in any order.

        Raises ValueError if the tensor is not planned, was written already, or differs from the plan in dtype or shape.
        """
        if name not in self._missing:
            raise ValueError(f"{name} is {'written twice' if name in self._locations else 'not in the plan'}")
        location = self._locations[name]
        found = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if found != location.spec:
            raise ValueError(f"{name}: planned {location.spec}, got {found}")
        _write_at(self._descriptors[location.file], _bytes_of(tensor), location.offset)
        self._missing.remove(name)

    def close(self) -> None:
        """Flush to disk. Raises RuntimeError when a planned tensor was never written."""
        if self._missing:
            self._release()
            raise RuntimeError(f"{len(self._missing)} planned tensors were never written: {sorted(self._missing)[:5]}")
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        self._release()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    def _release(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open_shard(self, path: Path, shard: Mapping[str, TensorSpec], *, continued: bool) -> None:
        # Widest dtype first, as the safetensors library sorts, keeps every tensor aligned to its own element size.
        ordered = sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in ordered:
            start, end = end, end + spec.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        data_start = 8 + len(text)
        offset = data_start
        for name, spec in ordered:
            self._locations[name] = _Location(path, offset, spec)
            offset += spec.nbytes
        head = struct.pack("<Q", len(text)) + text
        if continued:
            _check_head(path, head, data_start + end)
        descriptor = os.open(path, os.O_WRONLY | (0 if continued else os.O_CREAT | os.O_TRUNC), 0o644)
        self._descriptors[path] = descriptor
        if not continued:
            _write_at(descriptor, memoryview(head), 0)
            os.ftruncate(descriptor, data_start + end)

    def _write_index(self, plan: Mapping[str, TensorSpec]) -> None:
        weight_map = {name: location.file.name for name, location in self._locations.items()}
        index = {"metadata": {"total_size": total_bytes(plan)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.directory / INDEX_NAME).write_text(text, encoding="utf-8")


def total_bytes(plan: Mapping[str, TensorSpec]) -> int:
    """Bytes of data of all tensors of a plan, headers aside."""
    return sum(spec.nbytes for spec in plan.values())


def overwrite_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the values of tensors of a checkpoint in place; every other byte of its files stays.

    Raises KeyError for an unknown name, ValueError for another dtype or shape; then nothing is written.
    """
    locations = _locate_tensors(directory)
    for name, tensor in tensors.items():
        found = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if found != locations[name].spec:
            raise ValueError(f"{name}: the file has {locations[name].spec}, got {found}")
    descriptors = {file: os.open(file, os.O_WRONLY) for file in {locations[name].file for name in tensors}}
    try:
        for name, tensor in tensors.items():
            _write_at(descriptors[locations[name].file], _bytes_of(tensor), locations[name].offset)
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _split_into_shards(plan: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """Consecutive tensors of the plan, as many per shard as fit; a tensor larger than a shard has one of its own."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in plan.items():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    return shards


def _check_head(path: Path, head: bytes, size: int) -> None:
    """Raise UserError unless the file begins with this header and has this size."""
    if path.is_file() and path.stat().st_size == size:
        with open(path, "rb") as file:
            if file.read(len(head)) == head:
                return
    raise UserError(
        "this is not the file that an interrupted run of the same plan left",
        where=str(path),
        fix=f"remove {path.parent} and run again",
    )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        # One call writes at most 2 GiB on Linux.
        done += os.pwrite(descriptor, data[done:], offset + done)


def _locate_tensors(directory: Path, file: str | None = None) -> dict[str, _Location]:
    if not directory.is_dir():
        raise UserError("no such directory", where=str(directory), fix="check the path")
    if file is not None:
        if not (directory / file).is_file():
            raise UserError(f"there is no {file}", where=str(directory), fix="check the path")
        return _read_header(directory / file)
    if (directory / WEIGHTS_NAME).is_file():
        return _read_header(directory / WEIGHTS_NAME)
    if (directory / INDEX_NAME).is_file():
        return _locate_sharded(directory)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return _read_header(files[0])
    what = f"{len(files)} safetensors files and no {INDEX_NAME}" if files else "no safetensors weights"
    raise UserError(
        what, where=str(directory), fix="name a directory that model.save_pretrained wrote, or download it again"
    )


def _locate_sharded(directory: Path) -> dict[str, _Location]:
    index_file = directory / INDEX_NAME
    try:
        weight_map: dict[str, str] = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError("not a safetensors index", where=str(index_file), fix="download it again") from error
    locations: dict[str, _Location] = {}
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise UserError(f"the shard {shard} is missing", where=str(directory), fix="download it again")
        header = _read_header(directory / shard)
        locations |= {name: location for name, location in header.items() if weight_map.get(name) == shard}
    absent = sorted(set(weight_map) - set(locations))
    if absent:
        raise UserError(
            f"{len(absent)} tensors of the index are not in their shards, the first is {absent[0]}",
            where=str(index_file),
            fix="download it again",
        )
    return locations


def _read_header(path: Path) -> dict[str, _Location]:
    """The tensors of one file, in the order of their bytes. Raises UserError if the file is damaged or truncated."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        locations = {name: _parse_entry(path, 8 + length, entry) for name, entry in entries}
        expected = max((location.offset + location.spec.nbytes for location in locations.values()), default=8 + length)
        if expected > size:
            raise ValueError(f"{size} bytes where the header promises {expected}: a download was cut short")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"not a complete safetensors file ({error})", where=str(path), fix="download or write it again"
        ) from error
    return locations


def _parse_entry(path: Path, data_start: int, entry: dict) -> _Location:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"a tensor of type {entry['dtype']}, which is not supported")
    spec = TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
    start, end = entry["data_offsets"]
    if end - start != spec.nbytes:
        raise ValueError(f"{end - start} bytes for {spec}")
    return _Location(path, data_start + start, spec)
