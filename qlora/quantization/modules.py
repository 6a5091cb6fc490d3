"""Which parts of a model are quantized: the one place that knows.

Quantized is every `nn.Linear` inside a decoder layer, except the routers of mixtures of experts, which engines expect
in 16 bits. Embeddings and output head are outside the layers. Experts fused into one 3-D parameter are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from qlora.errors import Problem, UserError

# Last component of the names that routers have in transformers' mixtures of experts.
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})


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


def quantizable_modules(model: PreTrainedModel, modules: Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """Full name → linear layer of everything GPTQ quantizes, in model order.

    `modules` keeps only these, named inside a layer (`self_attn.q_proj`). Raises UserError for fused experts, for a
    layer without linears to quantize, and for names in `modules` that no layer has.
    """
    name, layers = decoder_layers(model)
    linears: dict[str, nn.Linear] = {}
    problems = []
    unused = set(modules or ())
    for index, layer in enumerate(layers):
        problems += [
            Problem("fused experts cannot be quantized yet", f"{name}.{index}.{p}") for p in _fused_experts(layer)
        ]
        inside = {local: module for local, module in layer_linears(layer).items() if not modules or local in modules}
        if not inside:
            problems.append(Problem("no linear layer to quantize", f"{name}.{index}"))
        linears |= {f"{name}.{index}.{local}": module for local, module in inside.items()}
        unused -= set(inside)
    problems += [Problem("no decoder layer has a linear of this name", local) for local in sorted(unused)]
    if problems:
        raise UserError(problems)
    return linears


def layer_linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Local name → linear layer of all linears of one decoder layer but routers."""
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ROUTER_NAMES
    }


def _fused_experts(layer: nn.Module) -> list[str]:
    return [name for name, parameter in layer.named_parameters() if parameter.ndim == 3 and "expert" in name]
