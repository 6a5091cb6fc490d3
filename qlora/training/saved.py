"""After training: that all processes hold one adapter, and that its file holds all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import get_peft_model_state_dict
from safetensors import safe_open

from qlora.errors import Problem, QloraError

WEIGHTS = "adapter_model.safetensors"


def require_one_adapter(parameters: list[torch.nn.Parameter], processes: int) -> None:
    """Raise QloraError if processes hold different numbers in what they trained together. All of them must call it."""
    if processes == 1:
        return
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().data)
    found = gather_object([digest.hexdigest()])
    others = [str(process) for process, each in enumerate(found) if each != found[0]]
    if len(found) != processes or others:
        what = f"process {', '.join(others)} trained another adapter than the first" if others else "processes are gone"
        raise QloraError(what, "train.processes", "what they compute differs: `qlora doctor` on each machine")


def require_whole_adapter(model: Any, directory: Path) -> None:
    """Raise QloraError unless the file holds every tensor of a PEFT model's adapter, whole and bit for bit."""
    path, problems = directory / WEIGHTS, list[Problem]()
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        for name, tensor in expected.items():
            if name not in stored:
                problems.append(Problem("is missing", f"{path}: {name}"))
                continue
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(tensor.shape):
                problems.append(Problem(f"has shape {shape}, not {tuple(tensor.shape)}", f"{path}: {name}"))
            elif not torch.equal(file.get_tensor(name), tensor.detach().cpu()):
                problems.append(Problem("has other values than were trained", f"{path}: {name}"))
    problems += [Problem("belongs to no adapter", f"{path}: {name}") for name in sorted(stored - expected.keys())]
    if problems:
        raise QloraError(problems)
