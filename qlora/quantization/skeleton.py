"""A model without weights, filled from its checkpoint one part at a time, so that memory holds one decoder layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora.errors import UserError
from qlora.models.checkpoint import CheckpointReader
from qlora.quantization.modules import decoder_layers


class Skeleton:
    """A causal language model in eval mode whose parameters have no data until its checkpoint is read.

    It computes in the dtype that its config.json names. Buffers that checkpoints do not hold, such as rotary
    frequencies, are real from the start. Raises UserError when the directory holds a quantized model, and on the first
    use of a tensor when names cannot be matched to the architecture.
    """

    def __init__(self, directory: Path, *, attn_implementation: str, trust_remote_code: bool) -> None:
        self.reader = CheckpointReader(directory)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise UserError("this model is already quantized", str(directory), "name the merged 16-bit directory")
        self.dtype: torch.dtype = config.dtype or _prevailing_dtype(self.reader)
        with _ParametersWithoutData():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=self.dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            ).eval()
        self.layers_name, self.layers = decoder_layers(self.model)

    def checkpoint_name(self, name: str) -> str:
        """The tensor in the checkpoint that holds this parameter or buffer of the model's decoder."""
        module_prefix, checkpoint_prefix = self._prefixes
        return checkpoint_prefix + name.removeprefix(module_prefix)

    def fill_layer(self, index: int, device: str) -> nn.Module:
        """Read decoder layer number `index` onto `device`, in the compute dtype."""
        self._fill(self.layers[index], f"{self.layers_name}.{index}", device)
        return self.layers[index]

    @contextmanager
    def filled_entrance(self, device: str) -> Iterator[nn.Module]:
        """The decoder with all but its layers read onto `device`: embeddings, positions, norms. Emptied on leaving."""
        decoder = self.model.get_decoder()
        name, _, layers = self.layers_name.rpartition(".")
        self._fill(decoder, name, device, skip=f"{layers}.")
        yield decoder
        for child in decoder.children():
            if child is not self.layers:
                child.to("meta")

    def _fill(self, module: nn.Module, name: str, device: str, skip: str | None = None) -> None:
        state: dict[str, torch.Tensor] = {}
        for local in module.state_dict():
            if skip is None or not local.startswith(skip):
                tensor = self.reader.read(self.checkpoint_name(f"{name}.{local}" if name else local))
                state[local] = tensor.to(device, self.dtype if tensor.is_floating_point() else None)
        module.load_state_dict(state, strict=skip is None, assign=True)
        for owner in module.modules():
            for key, buffer in owner.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(owner, key, buffer.to(device))
        module.requires_grad_(False)

    @cached_property
    def _prefixes(self) -> tuple[str, str]:
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
            where=str(self.reader.directory),
            fix="save the model again with save_pretrained of the installed transformers",
        )


def _prevailing_dtype(reader: CheckpointReader) -> torch.dtype:
    """The floating-point dtype with the most bytes in the checkpoint, for a config.json that names none."""
    sizes: Counter[torch.dtype] = Counter()
    for name in reader.names():
        spec = reader.spec(name)
        sizes[spec.dtype] += spec.nbytes if spec.dtype.is_floating_point else 0
    return sizes.most_common(1)[0][0]


class _ParametersWithoutData(TorchFunctionMode):
    """Sends `torch.empty` to the meta device: linears and embeddings get no memory, computed buffers are real."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)
