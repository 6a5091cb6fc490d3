"""Which parts of a model are quantized, and how their weights are held: the one place that knows.

Quantized is every linear inside a decoder layer (`nn.Linear`, and the `Conv1D` of GPT-2, which holds its weight
transposed), except the routers of mixtures of experts, which engines expect in 16 bits. Embeddings and output head are
outside the layers. Experts that transformers fuses into 3-D parameters must have been taken apart before
(`qlora.quantization.experts`); weights of any other kind are refused, rather than left in 16 bits in silence.

Shapes: N outputs of a linear, K inputs.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.errors import Problem, UserError

Linear = nn.Linear | Conv1D

# Last component of the names that routers have in transformers' mixtures of experts.
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers of a causal language model and their name, such as `model.layers`.

    Raises UserError when the decoder has no list, or several, of as many modules as its configuration names layers.
    """
    decoder = model.get_decoder()
    count = decoder.config.get_text_config().num_hidden_layers
    found = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(found) != 1:
        raise UserError(
            f"{type(decoder).__name__} has {len(found)} lists of {count} layers; one was expected",
            fix="this architecture cannot be quantized yet",
        )
    return next(name for name, module in model.named_modules() if module is found[0]), found[0]


def quantizable_modules(model: PreTrainedModel) -> dict[str, Linear]:
    """Full name → linear of everything GPTQ quantizes, in model order.

    Raises UserError for weights that are not linears, and for a layer without linears to quantize.
    """
    name, layers = decoder_layers(model)
    linears: dict[str, Linear] = {}
    problems = []
    for index, layer in enumerate(layers):
        problems += [
            Problem("a weight of this kind cannot be quantized yet", f"{name}.{index}.{parameter}")
            for parameter in _other_weights(layer)
        ]
        inside = layer_linears(layer)
        if not inside:
            problems.append(Problem("no linear layer to quantize", f"{name}.{index}"))
        linears |= {f"{name}.{index}.{local}": module for local, module in inside.items()}
    if problems:
        raise UserError(problems)
    return linears


def layer_linears(layer: nn.Module, *, routers: bool = False) -> dict[str, Linear]:
    """Local name → linear of all linears of one decoder layer, with or without routers."""
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, Linear) and (routers or name.rpartition(".")[2] not in ROUTER_NAMES)
    }


def weight_shape(module: Linear) -> tuple[int, int]:
    """(N, K) of a linear, however it holds its weight."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def stored_to_NK(module: Linear, tensor: torch.Tensor) -> torch.Tensor:
    """A weight as this linear and its checkpoint hold it, as [N, K]. A view; its own inverse."""
    return tensor.T if isinstance(module, Conv1D) else tensor


def put_weight(module: Linear, w_NK: torch.Tensor) -> None:
    """Copy values into a linear's weight, in its dtype and on its device."""
    module.weight.data.copy_(stored_to_NK(module, w_NK))


def _other_weights(layer: nn.Module) -> list[str]:
    """Names of the parameters of a layer that hold most of its weights in another form than linears do."""
    return [
        f"{name}.{key}" if name else key
        for name, module in layer.named_modules()
        if not isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS))
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 2 or (parameter.ndim == 2 and name.rpartition(".")[2] == "experts")
    ]
