"""Every place where a library is changed at run time, with the reason. There should be few."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator


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
