"""Parameters in one piece: the same steps, the same checkpoints, gradients that add up and go back."""

import copy

import pytest
import torch
from torch import nn

from qlora.training.flat import Flat, KeptGradients


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.Linear(3, 1, bias=False)
    )


def optimizer_of(model, **options):
    """As transformers makes it: parameters with weight decay, and a group of those without, here empty."""
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.9), **options)


def loss_of(model, seed):
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean()


def flat_steps(model, flat, optimizer, seeds):
    for seed in seeds:
        flat.backward(loss_of(model, seed))
    found = nn.utils.clip_grad_norm_([flat.whole], 0.01)
    optimizer.step()
    flat.zero_grad()
    return found


def plain_steps(model, optimizer, seeds):
    for seed in seeds:
        loss_of(model, seed).backward()
    found = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    model.zero_grad()
    return found


def assert_same(one, other):
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_steps_are_those_of_the_parameters_one_by_one():
    plain, whole = model_of(), model_of()
    one = optimizer_of(plain)
    flat = Flat(list(whole.parameters()))
    other = flat.optimizer(optimizer_of(whole))
    assert [len(group["params"]) for group in other.param_groups] == [1, 0]
    for step in range(5):
        seeds = range(3 * step, 3 * step + 1 + step % 3)
        torch.testing.assert_close(flat_steps(whole, flat, other, seeds), plain_steps(plain, one, seeds))
        assert_same(whole, plain)


@pytest.mark.parametrize("to_flat", [False, True])
def test_a_checkpoint_goes_on_in_either_form(to_flat):
    first, plain = model_of(), model_of()
    flat = Flat(list(first.parameters()))
    forms = {True: flat.optimizer(optimizer_of(first)), False: optimizer_of(plain)}
    flat_steps(first, flat, forms[True], [0])
    plain_steps(plain, forms[False], [0])
    states = {form: copy.deepcopy(optimizer.state_dict()) for form, optimizer in forms.items()}
    assert states[True]["param_groups"] == states[False]["param_groups"]
    assert states[True]["state"].keys() == states[False]["state"].keys() == {0, 1, 2}
    forms[to_flat].load_state_dict(states[not to_flat])
    flat_steps(first, flat, forms[True], [1])
    plain_steps(plain, forms[False], [1])
    assert_same(first, plain)


def test_an_optimizer_that_tells_parameters_apart_is_left_alone():
    model = model_of()
    flat = Flat(list(model.parameters()))
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    assert flat.optimizer(one) is one
    first, *others = model.parameters()
    two = torch.optim.AdamW([{"params": [first], "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    assert flat.optimizer(two) is two


def test_gradients_that_somebody_forgot_one_by_one_are_gone():
    model = model_of()
    flat = Flat(list(model.parameters()))
    flat.backward(loss_of(model, 0))
    model.zero_grad()
    flat.add(torch.ones_like(flat.whole))
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    flat.add(torch.ones_like(flat.whole))
    assert (flat.whole.grad == 2).all()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_gradients_go_back_to_what_they_were(there, whole):
    model = model_of()
    flat = Flat(list(model.parameters())) if whole else None
    backward = flat.backward if flat else torch.Tensor.backward
    kept = KeptGradients([flat.whole] if flat else list(model.parameters()))
    if there:
        backward(loss_of(model, 0))
    expected = [each.grad.clone() if there else None for each in model.parameters()]
    kept.keep()
    backward(loss_of(model, 1))
    kept.give_back()
    if not there:
        assert (flat.whole.grad is None) if flat else all(each.grad is None for each in model.parameters())
    backward(loss_of(model, 2))
    again = torch.autograd.grad(loss_of(model, 2), list(model.parameters()))
    for each, before, new in zip(model.parameters(), expected, again, strict=True):
        torch.testing.assert_close(each.grad, new if before is None else before + new)
