"""Linears that stay in 16 bits in training, by `model.skip_modules`: names or expressions, searched in full names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.errors import Problem, UserError

WHERE = "model.skip_modules"


def skipped_modules(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Full names, in model order, of the linears that the patterns take out of quantization. Data is not looked at.

    Raises UserError, with all problems, for patterns that are no regular expression or find no linear that would be
    quantized, and where nothing is left to quantize.
    """
    head = model.get_output_embeddings()
    names = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    problems, found = [], set()
    for pattern in patterns:
        try:
            matched = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            problems.append(Problem(f"not a regular expression ({error})", f"{WHERE}: {pattern}"))
            continue
        if not matched:
            what = "no linear that training would quantize has such a name (the output head stays in 16 bits anyway)"
            problems.append(Problem(what, f"{WHERE}: {pattern}", f"one of the names is {names[0]}"))
        found |= matched
    if patterns and len(found) == len(names):
        problems.append(Problem("every linear is skipped", WHERE, "skip less, or set model.quantization: none"))
    if problems:
        raise UserError(problems)
    return [name for name in names if name in found]


def kept_in_16_bits(model: PreTrainedModel, patterns: Sequence[str]) -> list[str] | None:
    """What transformers wants to be told of them: its own choice, the output head, no longer counts then.

    None where there are no patterns. Raises as `skipped_modules` does.
    """
    if not patterns:
        return None
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    return [*heads, *skipped_modules(model, patterns)]
