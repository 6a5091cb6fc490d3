"""Under which names, and in which pieces, transformers stores what a model holds.

On loading, transformers renames tensors and fuses some (the experts of a mixture); on saving it undoes that. The
undoing is run here on tensors of one label per piece, and where a label turns up is where that piece is stored: no
table of architectures is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qlora.errors import UserError


def stored_names(model: PreTrainedModel, pieces: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Name → stored name of every tensor in the state of `model`, made by `from_config`.

    `pieces` names the parts of fused parameters [E, parts, …], which are stored one by one: they stand in the result
    in place of the parameter, which is left out if it has none. Raises UserError when transformers stores something in
    another form than whole tensors and these pieces.
    """
    labels: dict[str, torch.Tensor] = {}
    names: list[str] = []
    for name, tensor in model.state_dict().items():
        own = pieces.get(name, [name])
        if not own:
            continue
        shape = [tensor.shape[0], len(own) // tensor.shape[0], 1] if name in pieces else [1] * tensor.ndim
        labels[name] = torch.arange(len(names), len(names) + len(own)).reshape(shape)
        names += own
    try:
        reverted = revert_weight_conversion(model, labels)
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise _other_form(model) from error
    if any(math.prod(label.shape) != 1 for label in reverted.values()):
        raise _other_form(model)
    stored = {names[int(label)]: name for name, label in reverted.items()}
    if len(stored) != len(names):
        raise _other_form(model)
    return stored


def renamed_tensors(model: PreTrainedModel) -> dict[str, str]:
    """Name → stored name of the tensors of a loaded model, quantized or not, that are stored under another name.

    Fused parameters are left out. Raises as `stored_names` does.
    """
    with torch.device("meta"):
        twin = type(model)(model.config)
    fused: dict[str, list[str]] = {name: [] for name, tensor in twin.state_dict().items() if tensor.ndim > 2}
    return {name: stored for name, stored in stored_names(twin, fused).items() if name != stored}


def _other_form(model: PreTrainedModel) -> UserError:
    return UserError(
        f"checkpoints of {type(model).__name__} hold tensors in another form than the model does",
        fix="this architecture cannot be quantized yet",
    )
