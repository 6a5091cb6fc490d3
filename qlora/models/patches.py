"""Every place where a library is changed at run time, with the reason. There should be few."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def parse_gguf_once() -> Iterator[None]:
    """Let transformers read a GGUF file's header once instead of once each for config, weights and tokenizer.

    gguf parses a vocabulary of 49,000 tokens in seconds of Python, and transformers builds the table of tensor names
    anew for every module (transformers.modeling_gguf_pytorch_utils, up to 5.23): two thirds of a conversion's time.
    """
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(reader)  # type: ignore[misc, assignment]
    gguf.get_tensor_name_map = functools.lru_cache(names)  # type: ignore[assignment]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names  # type: ignore[misc]


def leave_gptqmodel_alone() -> None:
    """Have PEFT not import gptqmodel, where it is installed, to ask of every layer whether it is one of gptqmodel's.

    It takes ten seconds, prints a banner and changes settings of torch (is_gptqmodel_quant_linear in peft.utils.other,
    0.21). No layer under an adapter of ours is: packed bases have our own (`qlora.models.packed_module`).
    """
    from peft.tuners.lora import awq, gptq
    from peft.utils import other

    for module in (awq, gptq, other):
        module.is_gptqmodel_available = _no  # type: ignore[attr-defined]


def _no() -> bool:
    return False


def write_no_model_cards(trainer: Any) -> None:
    """Leave out the cards that PEFT and TRL write beside every adapter and checkpoint that they save.

    They are templates with nothing filled in that publishing would not say better, and take longer than the tensors of
    a small adapter (PeftModel.save_pretrained, peft 0.21; create_model_card in trl.trainer.base_trainer, 1.16).
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.create_or_update_model_card = trainer.create_model_card = _nothing


def _nothing(*_: Any, **__: Any) -> None:
    return None


@contextlib.contextmanager
def plain_falcon_linears() -> Iterator[None]:
    """Build Falcon with `nn.Linear`, whose product its own subclass computes too, only rounded elsewhere.

    transformers puts 4-bit layers in place of `type(module) is nn.Linear` alone (replace_with_bnb_linear in
    transformers.integrations.bitsandbytes, 5.17 to 5.23), so that all of Falcon would stay in 16 bits.
    """
    from torch import nn
    from transformers.models.falcon import modeling_falcon

    before = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = nn.Linear  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = before  # type: ignore[misc]


@contextlib.contextmanager
def each_quantized_weight(seen_by: Callable[[Any], None]) -> Iterator[None]:
    """Show every 4-bit weight, as soon as there is one, to a function that may change it, before the next is read.

    transformers gives out whole models only (Bnb4bitQuantize in transformers.integrations.bitsandbytes, 5.17 to 5.23),
    and those of several cards would lie on one. It would also take the memory of a whole model from the device before
    it begins (caching_allocator_warmup in transformers.modeling_utils), which is left out.
    """
    from transformers import modeling_utils
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    plain = Bnb4bitQuantize.convert

    def convert(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = plain(self, *args, **kwargs)
        for weight in found.values():
            seen_by(weight)
        return found

    warm_up = modeling_utils.caching_allocator_warmup
    Bnb4bitQuantize.convert = convert  # type: ignore[method-assign]
    modeling_utils.caching_allocator_warmup = lambda *_: None
    try:
        yield
    finally:
        Bnb4bitQuantize.convert = plain  # type: ignore[method-assign]
        modeling_utils.caching_allocator_warmup = warm_up


def left_out_of_ddp(model: Any, names: Sequence[str]) -> None:
    """Parameters that DistributedDataParallel does not set to those of the first process when it begins.

    torch has no public way to say so (torch.nn.parallel.distributed, 2.11 to 2.13, calls this one a prototype).
    """
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def on_one_gpu(arguments: Any) -> None:
    """Have a process train on its own GPU where it sees several, for evaluation or another run.

    transformers counts all of them for nn.DataParallel, which TRL refuses, and has no public way to say otherwise
    (TrainingArguments.n_gpu, 5.17 to 5.23; its Trainer sets this too, for models that lie on several GPUs).
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
