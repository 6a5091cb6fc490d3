"""Which tensors the merged checkpoint has, where each comes from, and what it will look like, before any is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora.errors import Problem, UserError
from qlora.merging.adapter import Adapter
from qlora.merging.names import tensor_names
from qlora.models.checkpoint import CheckpointReader, TensorSpec
from qlora.models.provenance import Provenance


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged checkpoint."""

    name: str
    source: str
    """The tensor of the base that it starts from."""
    parameter: str
    """Its name in the trained model (that of the base's tensor where the merge only copies)."""
    spec: TensorSpec
    transposed: bool = False
    """Whether it is stored as [in, out], a weight of GPT-2's Conv1D."""


@dataclass(frozen=True)
class MergePlan:
    """All tensors of the merged checkpoint in the order they are written."""

    tensors: list[MergedTensor]
    untied: bool
    """Whether tensors that the base shares have become separate, because the adapter trained one of them."""
    vocabulary: tuple[int, int] | None = None
    """Rows of the embeddings in the base and here, where tokens have been added beyond them."""


def plan_merge(reader: CheckpointReader, provenance: Provenance, adapter: Adapter, dtype: torch.dtype) -> MergePlan:
    """Lay out the merged checkpoint; trained and quantized tensors get `dtype`.

    Raises UserError, with all problems, if parameters have no tensor in the base or other shapes.
    """
    stored = reader.names()
    present = set(stored)

    def as_stored(parameter: str) -> str:
        return parameter if parameter in present else provenance.renamed.get(parameter, parameter)

    ties = [
        _Tie.of(group, adapter, {name for name in group if as_stored(name) in present}) for group in provenance.tied
    ]
    tied = {parameter for tie in ties for parameter in tie.parameters}
    wanted = {f"{module}.weight" for module in provenance.quantized} | set(adapter.parameters())
    wanted = (wanted - tied) | {tie.stored_as for tie in ties}
    found = tensor_names(sorted(map(as_stored, wanted)), stored, reader.directory)
    sources = {parameter: found[as_stored(parameter)] for parameter in wanted}
    _check_shapes(reader, provenance, adapter, sources, ties)

    parameters = {source: parameter for parameter, source in sources.items()}
    for tie in ties:  # rows are trained in all that are tied, and kept under one of their names
        kept = [parameter for parameter in tie.parameters if parameter in adapter.rows]
        parameters[sources[tie.stored_as]] = kept[0] if kept else tie.stored_as
    tie_of = {sources[tie.stored_as]: tie for tie in ties}
    duplicates = {as_stored(parameter) for tie in ties for parameter in tie.parameters if parameter != tie.stored_as}
    tensors: list[MergedTensor] = []
    vocabulary = None
    for source in stored:
        if source in duplicates:
            continue
        parameter = parameters.get(source, source)
        outputs = {source: parameter}
        if source in tie_of and tie_of[source].broken:
            outputs |= {as_stored(other): other for other in tie_of[source].parameters if other != parameter}
        for name, parameter in outputs.items():
            module = parameter.removesuffix(".weight")
            own = reader.spec(source)
            spec = TensorSpec(dtype, own.shape) if adapter.changes(parameter) or module in provenance.quantized else own
            if parameter in adapter.rows:
                most = max(own.shape[0], *(token + 1 for token in adapter.rows[parameter].tokens))
                vocabulary = (own.shape[0], most) if most > own.shape[0] else vocabulary
                spec = TensorSpec(dtype, (most, own.shape[1]))
            transposed = parameter.endswith(".weight") and module in provenance.transposed
            tensors.append(MergedTensor(name, source, parameter, spec, transposed))
    return MergePlan(tensors, any(tie.broken for tie in ties), vocabulary)


@dataclass(frozen=True)
class _Tie:
    """Parameters that share one tensor in the base."""

    parameters: list[str]
    stored_as: str
    """The parameter under whose name the tensor is stored."""
    broken: bool
    """Whether the adapter changes one of them and not all, so that they are no longer equal."""

    @classmethod
    def of(cls, parameters: list[str], adapter: Adapter, stored: set[str]) -> _Tie:
        stored_as = next((parameter for parameter in parameters if parameter in stored), parameters[0])
        changed = [parameter for parameter in parameters if adapter.changes(parameter)]
        return cls(parameters, stored_as, any(parameter not in adapter.rows for parameter in changed))


def _check_shapes(
    reader: CheckpointReader, provenance: Provenance, adapter: Adapter, sources: dict[str, str], ties: list[_Tie]
) -> None:
    where = str(reader.directory)
    stored_as = {parameter: tie.stored_as for tie in ties for parameter in tie.parameters}
    problems = []
    for module, codes in provenance.quantized.items():
        spec = reader.spec(sources[f"{module}.weight"])
        if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            fix = "merge into the 16-bit base"
            problems.append(Problem(f"{module} is stored as {spec.dtype}: quantized already", where, fix))
        elif (expected := codes.shape[::-1] if module in provenance.transposed else codes.shape) != spec.shape:
            what = f"{module} has the shape {list(spec.shape)}, training saw {list(expected)}"
            problems.append(Problem(what, where, f"merge into {provenance.base_id}"))
    for parameter, key in adapter.replacements.items():
        shape = reader.spec(sources[stored_as.get(parameter, parameter)]).shape
        if parameter.removesuffix(".weight") in provenance.quantized:
            problems.append(Problem(f"{key} replaces a quantized weight", str(adapter.directory)))
        elif adapter.spec(key).shape != shape:
            what = f"{key} has the shape {list(adapter.spec(key).shape)}, the base {list(shape)}"
            fix = "a vocabulary that was resized in training cannot be merged: resize the base first and train on it"
            problems.append(Problem(what, where, fix))
    for tie in ties:
        rows = [parameter for parameter in tie.parameters if parameter in adapter.rows]
        if len(rows) > 1 or (rows and tie.broken):
            what = f"{' and '.join(tie.parameters)} are one matrix, of which more is trained than some rows"
            problems.append(Problem(what, str(adapter.directory), "train rows, or the whole matrix"))
    for parameter, found in adapter.rows.items():
        (vocabulary, width), rows_shape = (
            reader.spec(sources[stored_as.get(parameter, parameter)]).shape,
            adapter.spec(found.key).shape,
        )
        beyond = {token for token in found.tokens if token >= vocabulary}
        if rows_shape[1] != width or len(beyond) != max(0, max(found.tokens) + 1 - vocabulary):
            what = f"{found.key} {list(rows_shape)} does not fit {vocabulary} tokens of width {width}, with gaps behind"
            problems.append(Problem(what, where, f"merge into {provenance.base_id}"))
    if problems:
        raise UserError(problems)
