"""What an adapter adds, with a residual beside it, against float64."""

import pytest
import torch

from qlora.kernels.low_rank import add_low_rank_

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CASES = [
    pytest.param("cpu", torch.float64, 1e-14),
    pytest.param("cpu", torch.float32, 1e-6),
    pytest.param("cuda", torch.float32, 1e-6, marks=ON_GPU),
    pytest.param("cuda", torch.bfloat16, 4e-3, marks=ON_GPU),
]


@pytest.mark.parametrize(("device", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "width", "rank"), [(1, 5, 1), (200, 96, 16), (67, 333, 3), (130, 64, 200)])
def test_the_sum_is_that_of_float64_in_the_memory_of_y(
    device, dtype, tolerance, beside, transposed, tokens, width, rank
):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    y, residual = normal(tokens, width), normal(tokens, width) if beside else None
    u = normal(tokens, rank + 4)[:, 2 : rank + 2]  # a part of the ranks of several adapters
    v = normal(rank, width).T if transposed else normal(width, rank)
    expected = y.double() + u.double() @ v.double().T + (0 if residual is None else residual.double())
    kept = None if residual is None else residual.clone()
    found = add_low_rank_(y, u, v, residual)
    assert found.data_ptr() == y.data_ptr() and found.dtype == dtype
    assert (found.double() - expected).norm() <= tolerance * expected.norm()
    assert kept is None or torch.equal(residual, kept)
