"""Parameters that learn, in one piece: one norm and one optimizer step, however many modules they belong to.

Small models take longer to walk over hundreds of adapters than a GPU takes for their step. Each parameter stays what it
is, and so does its gradient: both are views of one tensor. Checkpoints are those of the optimizer without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer


class Flat:
    """Parameters of one dtype on one device, and their gradients, which are kept between steps as well."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.whole = nn.Parameter(torch.cat([each.detach().flatten() for each in parameters]))
        """Has a gradient where there is one: that of all parameters."""
        self._gradient = torch.zeros_like(self.whole.data)
        for parameter, part in zip(self.parameters, self.parts(self.whole.data), strict=True):
            parameter.data = part
        self._attach()
        self.zero_grad()

    def parts(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Of a tensor with as many elements: what belongs to each parameter, in its shape."""
        pieces = whole.split([each.numel() for each in self.parameters])
        return [piece.view(each.shape) for piece, each in zip(pieces, self.parameters, strict=True)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; what is added next takes their place."""
        self.whole.grad = None

    def add(self, gradient: torch.Tensor) -> None:
        """Add a gradient of all parameters, in one piece."""
        self._attach()
        if self.whole.grad is None:
            self.whole.grad = self._gradient.copy_(gradient)
        else:
            self._gradient.add_(gradient)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss."""
        self._attach()
        if self.whole.grad is None:
            self.whole.grad = self._gradient.zero_()
        loss.backward()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Parameters without gradients, as for a backward of its own; afterwards they have theirs again."""
        before = [each.grad for each in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient

    def optimizer(self, one: Optimizer) -> Optimizer:
        """The same, over all parameters as one where it treats them alike and element by element."""
        groups = [group for group in one.param_groups if group["params"]]
        if type(one) is not AdamW or len(groups) != 1 or len(groups[0]["params"]) != len(self.parameters):
            return one
        assert all(ours is theirs for ours, theirs in zip(self.parameters, groups[0]["params"], strict=True))
        options = {key: value for key, value in one.defaults.items() if key != "decoupled_weight_decay"}
        groups = [{**group, "params": [self.whole] if group["params"] else []} for group in one.param_groups]
        flat = AdamW(groups, **options)
        flat.register_state_dict_post_hook(lambda _, state: self._divided(state))
        flat.register_load_state_dict_pre_hook(lambda _, state: self._joined(state))
        return flat

    def _attach(self) -> None:
        """Put the parts of the gradient where they belong, if somebody forgot them one by one."""
        if self.parameters[0].grad is None:
            self.whole.grad = None
            for parameter, part in zip(self.parameters, self.parts(self._gradient), strict=True):
                parameter.grad = part

    def _divided(self, state: dict[str, Any]) -> dict[str, Any]:
        whole = state["state"].get(0)
        numbers = range(len(self.parameters))
        divided: dict[int, dict[str, Any]] = {number: {} for number in numbers} if whole else {}
        for key, value in (whole or {}).items():
            for number, part in enumerate(self.parts(value) if value.ndim else [value.clone() for _ in numbers]):
                divided[number][key] = part
        groups = [{**group, "params": list(numbers) if group["params"] else []} for group in state["param_groups"]]
        return {**state, "state": divided, "param_groups": groups}

    def _joined(self, state: dict[str, Any]) -> dict[str, Any]:
        divided = [state["state"][number] for number in range(len(self.parameters))] if state["state"] else []
        whole = {
            key: torch.cat([each[key].flatten() for each in divided]) if value.ndim else value
            for key, value in (divided[0] if divided else {}).items()
        }
        groups = [{**group, "params": [0] if group["params"] else []} for group in state["param_groups"]]
        return {**state, "state": {0: whole} if whole else {}, "param_groups": groups}


class KeptGradients:
    """Gradients as they were, in host memory: to go back to when a backward ends in the middle."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._places: dict[int, torch.Tensor] = {}
        self._kept: set[int] = set()

    def keep(self) -> None:
        """Copy them, where there are any, without waiting for the device."""
        gradients = {number: each.grad for number, each in enumerate(self._parameters) if each.grad is not None}
        self._kept = set(gradients)
        for number, gradient in gradients.items():
            if number not in self._places:
                self._places[number] = torch.empty_like(gradient, device="cpu", pin_memory=gradient.is_cuda)
        if gradients:
            places = [self._places[number] for number in gradients]
            torch._foreach_copy_(places, list(gradients.values()), non_blocking=True)

    def give_back(self) -> None:
        """Have all gradients be what was kept."""
        for number, parameter in enumerate(self._parameters):
            if number not in self._kept:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.copy_(self._places[number])
            else:
                parameter.grad = self._places[number].to(parameter.device)
