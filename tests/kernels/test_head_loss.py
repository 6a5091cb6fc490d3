"""The loss of a frozen head against cross-entropy by autograd, in float64 and in the dtypes of training."""

import pytest
import torch
import torch.nn.functional as F

from qlora.kernels import head_loss as module
from qlora.kernels.head_loss import head_loss

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 7), (37, 1001), (130, 9000)])
@pytest.mark.parametrize("tile_bytes", [2**29, 5 * 9000 * 4])
def test_loss_and_gradient_are_those_of_cross_entropy(
    monkeypatch, device, dtype, tolerance, tokens, vocabulary, tile_bytes
):
    monkeypatch.setattr(module, "TILE_BYTES", tile_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator).to(device, dtype) for rows in (tokens, vocabulary))
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    scale = torch.tensor(1 / 123, device=device)
    hidden.requires_grad_()
    loss = head_loss(hidden, weight, targets, scale)
    (3 * loss).backward()
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().T, targets, reduction="sum") / 123
    (3 * expected).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    assert (hidden.grad.double() - exact.grad).norm() < tolerance * exact.grad.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tile_bytes", [2**29, 5 * 1001 * 4])
def test_rows_that_learn_stand_in_for_frozen_ones(monkeypatch, device, dtype, tolerance, tile_bytes) -> None:
    monkeypatch.setattr(module, "TILE_BYTES", tile_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, rows = (torch.randn(n, 64, generator=generator).to(device, dtype) for n in (37, 1001, 3))
    targets, ids = (torch.tensor(each, device=device) for each in ([5, 700, -100, 9] * 9 + [0], [700, 0, 44]))
    hidden.requires_grad_()
    rows.requires_grad_()
    loss = head_loss(hidden, weight, targets, 0.1, (ids, rows))
    (3 * loss).backward()
    exact, exact_rows = (each.detach().double().requires_grad_() for each in (hidden, rows))
    whole = weight.double().index_copy(0, ids, exact_rows)
    expected = 0.1 * F.cross_entropy(exact @ whole.T, targets, reduction="sum")
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    assert (hidden.grad.double() - exact.grad).norm() < tolerance * exact.grad.norm()
    assert (rows.grad.double() - exact_rows.grad).norm() < tolerance * exact_rows.grad.norm()
    with torch.no_grad():
        torch.testing.assert_close(head_loss(hidden, weight, targets, 0.1, (ids, rows)), loss)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_without_a_target_are_no_loss_and_have_no_gradient(device) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator).to(device) for rows in (9, 5000))
    targets = torch.tensor([3, -100, 7, 4999, -100, 0, 1, 2, -100], device=device)
    hidden.requires_grad_()
    loss = head_loss(hidden, weight, targets, 1.0)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().T, targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert (hidden.grad.double() - exact.grad).norm() < 1e-5 * exact.grad.norm()
    assert (hidden.grad[targets < 0] == 0).all()


def test_extreme_logits_give_finite_numbers() -> None:
    hidden = torch.tensor([[1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    weight = torch.eye(2)
    loss = head_loss(hidden, weight, torch.tensor([1, 0]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert torch.equal(hidden.grad, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def test_nothing_is_kept_without_a_gradient_and_no_tokens_are_no_loss() -> None:
    weight = torch.randn(5, 3)
    assert not head_loss(torch.randn(4, 3), weight, torch.zeros(4, dtype=torch.long), 1.0).requires_grad
    hidden = torch.randn(0, 3, requires_grad=True)
    loss = head_loss(hidden, weight, torch.zeros(0, dtype=torch.long), 1.0)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 3)
