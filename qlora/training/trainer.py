"""TRL's trainer on a schedule of its own: rows packed into forwards, and a loss that never sees all logits.

What TRL's does beside that stays TRL's: the loop, the optimizer, checkpoints, evaluation during training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from qlora.data.rendering import RenderedRow
from qlora.errors import WillNotFit
from qlora.training.flat import Flat, KeptGradients
from qlora.training.fused import HEAD_INPUTS
from qlora.training.graphs import Graphs, Room
from qlora.training.packed import IGNORED, Tokens, pack, pad
from qlora.training.plan import TrainingPlan
from qlora.training.schedule import Forwards, Rows

log = logging.getLogger(__name__)

ROWS = "rows"  # what a batch was made of


class _SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins: counted in steps, so that a run that goes on is in the right one."""

    def __init__(self, sampler: Forwards) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(state.global_step // self.sampler.schedule.steps_per_epoch)


class Trainer(SFTTrainer):
    """Trains on `rows` as the plan divides them.

    `packed`: the model's attention takes packed rows. `own_head`: the model computes its loss from `HEAD_INPUTS`; TRL
    computes it otherwise, and wherever its options ask for more than the cross-entropy. `room`: forwards are
    CUDA graphs, of batches that fill it; where the loss is the model's own. `loraplus_ratio`: of B's learning rate to
    A's.
    """

    def __init__(
        self,
        *,
        rows: Sequence[RenderedRow],
        plan: TrainingPlan,
        packed: bool,
        own_head: bool,
        room: Room | None,
        loraplus_ratio: float,
        args: SFTConfig,
        **options: Any,
    ) -> None:
        super().__init__(args=args, **options)
        self.rows, self.plan, self.packed = rows, plan, packed
        self.own_head = (
            own_head and not self.aux_loss_enabled and args.loss_type == "nll" and args.label_smoothing_factor == 0
        )
        self.room = room if self.own_head else None
        self.loraplus_ratio = loraplus_ratio
        self.most_tokens: float = math.inf
        """Of a forward, since memory ran out."""
        # Every loss here is divided by the tokens of the whole step, whatever the model's own forward takes.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader:
        """This process's forwards. Not accelerate's loader: the schedule knows the processes."""
        sampler = Forwards(self.plan.schedule, self.args.process_index)
        self.add_callback(_SetEpoch(sampler))
        return DataLoader(
            range(len(self.rows)),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self._collate,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _collate(self, rows: Rows) -> dict[str, Any]:
        found: list[Tokens] = [(row.input_ids, row.labels) for row in map(self.rows.__getitem__, rows)]
        # A process that a step leaves nothing to runs a token from which nothing is learned: the others wait for it.
        found = found or [([0], [IGNORED])]
        batch = pack(found) if self.packed else pad(found)
        if self.room is not None:
            batch |= self.room.filled(batch)
        if not self.own_head:
            batch = {key: value for key, value in batch.items() if key not in HEAD_INPUTS}
        return batch | {ROWS: rows}

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of a step, and how many tokens are predicted in it, on the device without waiting for it."""
        if self.args.world_size > 1 or device.type != "cuda":
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, torch.device("cpu"))
        return batches, self._prepare_input(torch.as_tensor(count).pin_memory()) if count is not None else None

    def _prepare_input(self, data: Any) -> Any:
        """On the device; pinned memory without waiting for what the device still has to do."""
        if isinstance(data, torch.Tensor) and data.is_pinned():
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """B at a learning rate of its own (LoRA+), and all parameters in one piece where passes are recorded."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.loraplus_ratio != 1:
            assert self.model is not None
            ups = {id(each) for name, each in self.model.named_parameters() if ".lora_B." in name}
            for group in list(optimizer.param_groups):
                apart = [each for each in group["params"] if id(each) in ups]
                if apart:
                    group["params"] = [each for each in group["params"] if id(each) not in ups]
                    rate = self.loraplus_ratio * group["lr"]
                    optimizer.add_param_group({**group, "params": apart, "lr": rate})
        if self.room is not None:
            optimizer = self.optimizer = self._flat.optimizer(optimizer)
            # What the loop calls walks over all modules.
            self.model.zero_grad = self._flat.zero_grad  # type: ignore[method-assign, union-attr]
        return optimizer

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        if self.room is None:
            return super()._clip_grad_norm(model)
        return torch.nn.utils.clip_grad_norm_([self._flat.whole], self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """From the plan: the model would count its parameters in every step."""
        return round(self.plan.flops_per_token * inputs["input_ids"].numel())

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """A forward and its backward; where memory runs out, the rows in two halves, and all later ones as short.

        The loss is divided by the tokens of the whole step, so that halves add up to the same gradients. Raises
        WillNotFit when a single row is too long.
        """
        rows, tokens = inputs.pop(ROWS), inputs["input_ids"].numel()
        if len(rows) < 2 or tokens <= self.most_tokens:
            # Other processes would wait for gradients that this one does not send.
            divisible = len(rows) > 1 and self.args.world_size == 1
            if divisible:
                self._before.keep()
            try:
                if self.room is not None:
                    return self._replay(inputs, num_items_in_batch)
                return super().training_step(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError as error:
                if not divisible:
                    raise WillNotFit(f"memory ran out in a forward of {tokens:,} tokens", *self._ways_out()) from error
            # Outside the except block: the error's frames would keep the activations.
            self._before.give_back()
            del inputs
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.most_tokens = tokens // 2
            log.warning("memory ran out in a forward of %d tokens: from now on none is longer than half of it", tokens)
        halves = [self._collate(half) for half in self.plan.schedule.divided(rows, 2)]
        return torch.stack([self.training_step(model, half, num_items_in_batch) for half in halves]).sum()

    def _replay(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        assert self.model is not None and num_items_in_batch is not None
        if not self.model.training:
            self.model.train()
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        count = torch.as_tensor(num_items_in_batch, dtype=torch.int64)
        return self._graphs(inputs | {"num_items_in_batch": count})

    @cached_property
    def _graphs(self) -> Graphs:
        def run(inputs: dict[str, Any]) -> torch.Tensor:
            with self.compute_loss_context_manager():
                loss: torch.Tensor = self.model_wrapped(**inputs, use_cache=False).loss
            return loss

        return Graphs(run, self._flat)

    @cached_property
    def _flat(self) -> Flat:
        return Flat(self._learning)

    @cached_property
    def _learning(self) -> list[torch.nn.Parameter]:
        assert self.model is not None
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @cached_property
    def _before(self) -> KeptGradients:
        return KeptGradients(self._learning if self.room is None else [self._flat.whole])

    def _ways_out(self) -> tuple[str, str]:
        where = "train.micro_batch_tokens" if self.args.world_size > 1 else "data.max_length"
        return where, "lower it, or set train.gradient_checkpointing to true or train.memory to less"

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
