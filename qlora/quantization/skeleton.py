"""A model without weights, filled from its checkpoint one part at a time, so that memory holds one decoder layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora.errors import UserError
from qlora.kernels.norms import fuse_rms_norms
from qlora.models.checkpoint import TensorSource
from qlora.models.stored_names import stored_names
from qlora.quantization.experts import expert_pieces, take_experts_apart
from qlora.quantization.modules import decoder_layers


class Skeleton:
    """A causal language model in eval mode whose parameters have no data until its checkpoint is read.

    It computes in the dtype that config.json in the source's directory names. Buffers that checkpoints do not hold,
    such as rotary frequencies, are real from the start. Experts are taken apart into linears. Raises UserError when
    config.json describes a quantized model, for experts that cannot be taken apart, and on the first use of a tensor
    when names cannot be matched to the architecture.
    """

    def __init__(self, source: TensorSource, *, attn_implementation: str, trust_remote_code: bool) -> None:
        self.reader = source
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            fix = "name the merged 16-bit directory"
            raise UserError("this model is already quantized", str(source.directory), fix)
        self.dtype: torch.dtype = config.dtype or _prevailing_dtype(self.reader)
        with ParametersWithoutData():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=self.dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            ).eval()
        self.layers_name, self.layers = decoder_layers(self.model)
        self._stored = stored_names(self.model, expert_pieces(self.model))
        take_experts_apart(self.model)

    def checkpoint_name(self, name: str) -> str:
        """The tensor in the checkpoint that holds this parameter or buffer of the model's decoder.

        A name that ends with a dot stands for a module, and gives what the names of its tensors start with.
        """
        module_prefix, checkpoint_prefix = self._prefixes
        stored = self._renamed_modules.get(name) or self._stored.get(name, name)
        return checkpoint_prefix + stored.removeprefix(module_prefix)

    def second_copy_of_embeddings(self) -> str | None:
        """The stored output head of a model whose head is tied to its embeddings: engines stumble over it."""
        modules = {id(module): name for name, module in self.model.named_modules()}
        head = f"{modules.get(id(self.model.get_output_embeddings()))}.weight"
        if not self.model.config.get_text_config().tie_word_embeddings or head not in self.reader.names():
            return None
        embeddings = self.checkpoint_name(f"{modules[id(self.model.get_input_embeddings())]}.weight")
        return head if torch.equal(self.reader.read(head), self.reader.read(embeddings)) else None

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
        fuse_rms_norms(module)

    @cached_property
    def _renamed_modules(self) -> dict[str, str]:
        """Name → stored name of modules, both with a dot at their end, that are stored under another name."""
        renamed: dict[str, str] = {}
        for name, stored in self._stored.items():
            while name != stored and name.rpartition(".")[2] == stored.rpartition(".")[2]:
                name, stored = name.rpartition(".")[0], stored.rpartition(".")[0]
                renamed.setdefault(f"{name}.", f"{stored}.")
        return renamed

    @cached_property
    def _prefixes(self) -> tuple[str, str]:
        """(prefix of the decoder in the model, in the checkpoint); checkpoints of a part of the model lack some."""
        decoder = self.model.get_decoder()
        name = next(name for name, module in self.model.named_modules() if module is decoder)
        prefix = f"{name}." if name else ""
        expected = [self._stored[prefix + local].removeprefix(prefix) for local in decoder.state_dict()]
        present = set(self.reader.names())
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


def _prevailing_dtype(reader: TensorSource) -> torch.dtype:
    """The floating-point dtype with the most bytes in the checkpoint, for a config.json that names none."""
    sizes: Counter[torch.dtype] = Counter()
    for name in reader.names():
        spec = reader.spec(name)
        sizes[spec.dtype] += spec.nbytes if spec.dtype.is_floating_point else 0
    return sizes.most_common(1)[0][0]


class ParametersWithoutData(TorchFunctionMode):
    """Sends `torch.empty` to the meta device: linears and embeddings get no memory, computed buffers are real."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)
