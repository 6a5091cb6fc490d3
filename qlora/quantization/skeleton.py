"""A model without weights, filled from its checkpoint one part at a time, so that memory holds one decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora.errors import UserError
from qlora.models.checkpoint import CheckpointReader

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Skeleton:
    """A causal language model in eval mode whose parameters have no data until `fill` reads them.

    Buffers that checkpoints do not hold, such as rotary frequencies, are real from the start. Raises UserError when the
    directory holds a quantized model, or tensors that cannot be matched to the architecture.
    """

    def __init__(self, directory: Path, *, attn_implementation: str, trust_remote_code: bool) -> None:
        self.reader = CheckpointReader(directory)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise UserError("this model is already quantized", str(directory), "name the merged 16-bit directory")
        with _ParametersWithoutData():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            ).eval()
        self._prefixes = self._match_names(directory)

    def checkpoint_name(self, name: str) -> str:
        """The tensor in the checkpoint that holds this parameter or buffer of the model's decoder."""
        module_prefix, checkpoint_prefix = self._prefixes
        return checkpoint_prefix + name.removeprefix(module_prefix)

    def fill(self, module: nn.Module, name: str, device: str, dtype: torch.dtype, skip: str | None = None) -> None:
        """Read the parameters and buffers of `module`, called `name` in the model, onto `device`.

        Floating-point tensors are converted to `dtype`. Names inside `module` that start with `skip` stay without data.
        """
        state: dict[str, torch.Tensor] = {}
        for local in module.state_dict():
            if skip is None or not local.startswith(skip):
                tensor = self.reader.read(self.checkpoint_name(f"{name}.{local}"))
                state[local] = tensor.to(device, dtype if tensor.is_floating_point() else None)
        module.load_state_dict(state, strict=skip is None, assign=True)
        for owner in module.modules():
            for key, buffer in owner.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(owner, key, buffer.to(device))
        module.requires_grad_(False)

    def _match_names(self, directory: Path) -> tuple[str, str]:
        """(prefix of the decoder in the model, in the checkpoint); transformers renames some on loading."""
        decoder = self.model.get_decoder()
        name = next(name for name, module in self.model.named_modules() if module is decoder)
        expected = list(decoder.state_dict())
        present = set(self.reader.names())
        prefix = f"{name}." if name else ""
        # The longest name is the least likely to end a name of anything but the decoder.
        longest = max(expected, key=len)
        candidates = {found.removesuffix(longest) for found in present if found.endswith(longest)} | {prefix}
        missing = {
            candidate: [local for local in expected if candidate + local not in present] for candidate in candidates
        }
        fitting = [candidate for candidate, absent in missing.items() if not absent]
        if prefix in fitting:
            return prefix, prefix
        if len(fitting) == 1:
            return prefix, fitting[0]
        absent = min(missing.values(), key=len)
        raise UserError(
            f"{len(absent)} tensors of the {type(decoder).__name__} are not in the checkpoint, the first is {absent[0]}"
            if absent
            else f"the tensors of the {type(decoder).__name__} are there {len(fitting)} times, as {sorted(fitting)}",
            where=str(directory),
            fix="save the model again with save_pretrained of the installed transformers",
        )


def checkpoint_dtype(reader: CheckpointReader, names: Iterable[str]) -> torch.dtype:
    """The one floating-point dtype of these tensors. Raises UserError when they differ or are not 16 or 32 bits."""
    dtypes = {reader.spec(name).dtype for name in names}
    if len(dtypes) != 1 or not dtypes <= set(COMPUTE_DTYPES):
        raise UserError(
            f"the linear layers are stored as {', '.join(sorted(map(str, dtypes)))}; one of {COMPUTE_DTYPES} is expected",
            where=str(reader.directory),
            fix="name a merged 16-bit directory",
        )
    return dtypes.pop()


class _ParametersWithoutData(TorchFunctionMode):
    """Sends `torch.empty` to the meta device: linears and embeddings get no memory, computed buffers are real."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)
