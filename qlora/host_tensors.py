"""Tensors that wait in host memory for their turn on the device, copied to and from it beside the computation."""

from __future__ import annotations

import torch


class HostTensors:
    """Tensors of a device by number: on it up to so many bytes, the others in pinned host memory."""

    def __init__(self, device: str, on_device_bytes: int) -> None:
        self.device = device
        self._left = on_device_bytes
        self._places: dict[int, torch.Tensor] = {}
        self._coming: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._copies = torch.cuda.Stream(device) if device != "cpu" else None

    def put(self, number: int, tensor: torch.Tensor) -> None:
        """Keep a tensor of the device, which must not change any more; it replaces what was there."""
        self._coming.pop(number, None)  # what was fetched and never asked for is old now
        place = self._places.get(number)
        if place is not None and place.shape != tensor.shape:
            self._left += place.nbytes if place.is_cuda else 0
            place = None
        if place is None and self._copies is not None:
            if tensor.nbytes > self._left:
                place = self._places[number] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            else:
                self._left -= tensor.nbytes
        if self._copies is None or place is None or place.is_cuda:
            self._places[number] = tensor
            return
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            place.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._copies)

    def prefetch(self, number: int) -> None:
        """Begin to copy a tensor to the device."""
        place = self._places[number]
        if self._copies is not None and not place.is_cuda and number not in self._coming:
            with torch.cuda.stream(self._copies):
                self._coming[number] = place.to(self.device, non_blocking=True), self._copies.record_event()

    def get(self, number: int) -> torch.Tensor:
        """The tensor on the device."""
        self.prefetch(number)
        if number not in self._coming:
            return self._places[number]
        tensor, copied = self._coming.pop(number)
        torch.cuda.current_stream().wait_event(copied)
        tensor.record_stream(torch.cuda.current_stream())
        return tensor
