"""Frozen token embeddings in pinned host memory: of a large vocabulary, the GPU reads the rows of a batch and no more.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import TrainableTokensWrapper
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None


class HostEmbedding(nn.Module):
    """`nn.Embedding` without a parameter: whatever moves or counts a model's parameters passes it by."""

    def __init__(self, weight_VD: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight_VD.detach().cpu().pin_memory()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., D] on the device of the ids."""
        out = torch.empty(*ids.shape, self.weight.shape[1], dtype=self.weight.dtype, device=ids.device)
        _rows_kernel[(ids.numel(),)](
            ids.contiguous(), self.weight, out, WIDTH=out.shape[-1], ROOM=triton.next_power_of_2(out.shape[-1])
        )
        return out


def keep_embeddings_on_host(model: Any) -> bool:
    """Move the token embeddings of a causal language model on a GPU to host memory, where nothing else uses them."""
    read, head = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings, head = (
        each.original_module if isinstance(each, TrainableTokensWrapper) else each for each in (read, head)
    )
    if type(embeddings) is not nn.Embedding or embeddings.weight.requires_grad or not embeddings.weight.is_cuda:
        return False
    if triton is None or embeddings.max_norm is not None or (head is not None and head.weight is embeddings.weight):
        return False
    if read is embeddings:
        model.set_input_embeddings(HostEmbedding(embeddings.weight))
    else:  # rows that learn stay on the device
        read.token_adapter.base_layer = HostEmbedding(embeddings.weight)
    return True


if triton is not None:

    @triton.jit
    def _rows_kernel(ids_ptr, weight_ptr, out_ptr, WIDTH: tl.constexpr, ROOM: tl.constexpr):
        """One program per token."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, ROOM)
        inside = column < WIDTH
        values = tl.load(weight_ptr + tl.load(ids_ptr + row) * WIDTH + column, mask=inside)
        tl.store(out_ptr + row * WIDTH + column, values, mask=inside)
