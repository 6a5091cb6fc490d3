"""TRL's trainer on a schedule of its own: rows packed into forwards, and a loss that never sees all logits.

What TRL's does beside that stays TRL's: the loop, the optimizer, checkpoints, evaluation during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from qlora.data.rendering import RenderedRow
from qlora.quantization.modules import decoder_layers
from qlora.training.fused import HEAD_INPUTS
from qlora.training.packed import IGNORED, Tokens, pack, pad
from qlora.training.schedule import Forwards, Rows, Schedule


class Trainer(SFTTrainer):
    """Trains on `rows` as the schedule divides them. `packed`: the model's attention takes packed rows.

    `recomputed`: so many layers, the first, compute their activations again in the backward, where checkpointing is on.
    `own_head`: the model computes its loss from `HEAD_INPUTS`; TRL computes it otherwise, and wherever its options ask
    for more than the cross-entropy.
    """

    def __init__(
        self,
        *,
        rows: Sequence[RenderedRow],
        schedule: Schedule,
        packed: bool,
        own_head: bool,
        recomputed: int,
        args: SFTConfig,
        **options: Any,
    ) -> None:
        super().__init__(args=args, **options)
        self.rows, self.schedule, self.packed = rows, schedule, packed
        self.own_head = (
            own_head and not self.aux_loss_enabled and args.loss_type == "nll" and args.label_smoothing_factor == 0
        )
        self.add_callback(_RecomputeFirst(recomputed))
        # Every loss here is divided by the tokens of the whole step, whatever the model's own forward takes.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader:
        """This process's forwards. Not accelerate's loader: the schedule knows the processes."""
        sampler = Forwards(self.schedule, self.args.process_index)
        return DataLoader(
            range(len(self.rows)),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self._collate,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _collate(self, rows: Rows) -> dict[str, Any]:
        found: list[Tokens] = [(self.rows[row].input_ids, self.rows[row].labels) for row in rows]
        # A process that a step leaves nothing to runs a token from which nothing is learned: the others wait for it.
        found = found or [([0], [IGNORED])]
        batch = pack(found) if self.packed else pad(found)
        return batch if self.own_head else {key: value for key, value in batch.items() if key not in HEAD_INPUTS}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if "targets" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "use_cache": False}
        return transformers.Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class _RecomputeFirst(TrainerCallback):
    def __init__(self, layers: int) -> None:
        self.layers = layers

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        causal = model.module if hasattr(model, "module") else model
        for layer in decoder_layers(causal.get_base_model())[1][self.layers :]:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
