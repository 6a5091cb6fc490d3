"""From the names of a model's parameters to those of a checkpoint's tensors.

Mostly they are equal. Some architectures are stored under another prefix than the one transformers gives the module
(`language_model.model.layers.0…` for `model.language_model.layers.0…`); then one prefix must explain all such names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from qlora.errors import Problem, UserError


def tensor_names(parameters: Iterable[str], stored: Iterable[str], checkpoint: Path) -> dict[str, str]:
    """The checkpoint's tensor for each parameter.

    Raises UserError, listing every parameter that has no tensor or could be several.
    """
    stored = set(stored)
    wanted = list(parameters)
    found = {name: name for name in wanted if name in stored}
    missing = [name for name in wanted if name not in stored]
    if missing:
        found |= _by_prefix(missing, set(found), stored, checkpoint)
    return found


def _by_prefix(missing: list[str], exact: set[str], stored: set[str], checkpoint: Path) -> dict[str, str]:
    """Replace the prefix of each name by the one stored prefix that fits all names sharing it.

    A prefix under which other names are stored as they are (`exact`) is not renamed.
    """
    endings = _prefixes_by_ending(stored - exact)
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    problems: list[Problem] = []
    for name in missing:
        parts = name.split(".")
        # The longest ending that is stored. A bare `weight` or `bias` would match anything.
        depth = next((d for d in range(len(parts) - 1) if ".".join(parts[d:]) in endings), None)
        prefix = ".".join(parts[:depth]) + "." if depth else ""
        if depth is None or (prefix and any(other.startswith(prefix) for other in exact)):
            problems.append(_unresolved(name, "the checkpoint has no tensor for this parameter", checkpoint))
        else:
            groups[prefix][name] = ".".join(parts[depth:])
    found: dict[str, str] = {}
    for names in groups.values():
        prefixes = sorted(set.intersection(*(endings[ending] for ending in names.values())))
        if len(prefixes) == 1:
            found |= {name: prefixes[0] + ending for name, ending in names.items()}
        else:
            problems += [
                _unresolved(
                    name, f"no single tensor of the checkpoint fits this parameter, {len(prefixes)} do", checkpoint
                )
                for name in names
            ]
    if problems:
        raise UserError(problems)
    return found


def _prefixes_by_ending(stored: set[str]) -> dict[str, set[str]]:
    """Every dotted ending of the stored names, with the prefixes (dot included) it stands behind."""
    endings: dict[str, set[str]] = defaultdict(set)
    for name in stored:
        parts = name.split(".")
        for depth in range(len(parts) - 1):
            prefix = ".".join(parts[:depth])
            endings[".".join(parts[depth:])].add(prefix + "." if prefix else "")
    return endings


def _unresolved(name: str, what: str, checkpoint: Path) -> Problem:
    return Problem(f"{name}: {what}", str(checkpoint), "merge into the base the adapter was trained on")
