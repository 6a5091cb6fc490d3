"""How far the outputs of each quantized linear are from those of the trained model, on held-out rows.

Of a module of the trained model with the input x and the output y (its base layer and its adapter), and the weight Wq
and the bias b that the checkpoint has in its place:

    error = ‖x·Wqᵀ + b − y‖ / ‖y − b‖, over all positions of the rows.

x is what the trained model feeds the module, so that the error is the module's own and not that of modules before it.

Shapes: B rows, T tokens, K inputs, N outputs, n a block of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from qlora.data.rendering import RenderedRow
from qlora.evaluation.ladder import TRAINED, Rung
from qlora.models.packed_checkpoint import PackedLinears
from qlora.models.placement import input_device

TOKENS = 256
"""Of held-out rows, that are sent through the trained model."""
BLOCK_ELEMENTS = 4 * 2**20  # of a weight that is dequantized to fp32 at a time


class OutputErrors:
    """Measures when the ladder calls it with the trained model; `errors` has the figure of each module by then."""

    def __init__(self, checkpoint: PackedLinears, modules: Mapping[str, str], rows: Sequence[RenderedRow]) -> None:
        """modules: name in the checkpoint → name in the trained model. rows: as many of the first as are needed."""
        self.errors: dict[str, float] = {}
        """By the module's name in the trained model. Modules that see only some tokens, and experts that are no modules
        of their own there, are not in it."""
        self._checkpoint, self._modules = checkpoint, modules
        self._ids_BT, self._mask_BT = _batch(rows)

    @torch.inference_mode()
    def __call__(self, rung: Rung, model: Any) -> None:
        if rung.name != TRAINED:
            return
        base: nn.Module = model.get_base_model()
        found = dict(base.named_modules())
        sums: dict[str, torch.Tensor] = {}
        with ExitStack() as hooks:
            for name, module in self._modules.items():
                if module in found:
                    handle = found[module].register_forward_hook(partial(self._compare, name, sums))
                    hooks.callback(handle.remove)
            device = input_device(model)
            model(input_ids=self._ids_BT.to(device), attention_mask=self._mask_BT.to(device))
        for name, pair in sums.items():
            error, output = pair.tolist()
            if output > 0 and math.isfinite(error):
                self.errors[self._modules[name]] = math.sqrt(error / output)

    def _compare(
        self, name: str, sums: dict[str, torch.Tensor], module: nn.Module, inputs: tuple, output: torch.Tensor
    ) -> None:
        x_BTK = inputs[0] if inputs else None
        if x_BTK is None or x_BTK.shape[:-1] != self._mask_BT.shape:
            return
        there_BT = self._mask_BT.to(x_BTK.device) != 0
        x_TK, y_TN = x_BTK[there_BT].float(), output[there_BT].float()
        bias_N = self._checkpoint.bias(name, str(x_TK.device))
        if bias_N is not None:
            y_TN = y_TN - bias_N.float()
        packed = self._checkpoint.read(name, str(x_TK.device))
        error = x_TK.new_zeros((), dtype=torch.float64)
        for rows in _blocks(packed.outputs, packed.inputs):
            difference_Tn = x_TK @ packed.rows(rows).weight().T - y_TN[:, rows]
            error += difference_Tn.square().sum(dtype=torch.float64)
        sums[name] = torch.stack([error, y_TN.square().sum(dtype=torch.float64)])


def _blocks(outputs: int, inputs: int) -> Iterator[slice]:
    step = max(64, BLOCK_ELEMENTS // inputs // 64 * 64)
    for start in range(0, outputs, step):
        yield slice(start, min(start + step, outputs))


def _batch(rows: Sequence[RenderedRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), int64 [B, T], of the first rows up to `TOKENS`; the last is cut there."""
    taken: list[Sequence[int]] = []
    left = TOKENS
    for row in rows:
        if left > 0:
            taken.append(row.input_ids[:left])
            left -= len(taken[-1])
    width = max(map(len, taken))
    ids_BT, mask_BT = torch.zeros(2, len(taken), width, dtype=torch.int64)
    for index, ids in enumerate(taken):
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        mask_BT[index, : len(ids)] = 1
    return ids_BT, mask_BT
