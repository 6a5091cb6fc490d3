"""Where a model lies that is only run and larger than its GPU: in parts, on all GPUs and in host memory.

Parts on the host are copied to a GPU for each forward by accelerate. Training, the merge and GPTQ need nothing of the
kind: the first shares its base between processes, the others take a layer at a time.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from qlora.quantization.modules import decoder_layers

log = logging.getLogger(__name__)


def place(model: Any, device: str, most: int) -> Any:
    """Put a model that is in host memory on `device`; beyond `most` bytes of a GPU, on the other ones and the host."""
    import psutil
    from accelerate import dispatch_model, infer_auto_device_map

    own = torch.device(device).index or 0
    gpus = [own, *(index for index in range(torch.cuda.device_count()) if index != own)]
    layer = type(decoder_layers(model)[1][0]).__name__
    room: dict[int | str, int | str] = {index: most for index in gpus}
    room["cpu"] = psutil.virtual_memory().available
    device_map = infer_auto_device_map(model, max_memory=room, no_split_module_classes=[layer])
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    waiting = sum(place == "cpu" for place in device_map.values())
    log.info("%.1f GiB of weights on %d GPUs, %d modules wait in host memory", size / 2**30, len(gpus), waiting)
    return dispatch_model(model, device_map=device_map, main_device=own)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: on the device of its first weight that does not wait in host memory."""
    devices = (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    return next(devices, torch.device("cuda"))
