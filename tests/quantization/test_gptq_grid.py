"""The scale search: stored precision, both signs, zero points, and groups without weights."""

import pytest
import torch

from qlora.models.gptq_format import SUPPORTED_BITS
from qlora.quantization.grid import Grid, choose_grid


def weighted_error(w_KN, importance_K, grid, group_size):
    group = torch.arange(w_KN.shape[0]) // group_size
    scales, zeros = grid.scales_GN.float()[group], grid.zeros_GN.float()[group]
    codes = ((w_KN / scales).round() + zeros).clamp(0, 2**grid.bits - 1)
    return ((w_KN - scales * (codes - zeros)).square() * importance_K.unsqueeze(1)).sum()


def full_range(w_KN, group_size, bits, sym) -> Grid:
    """The grid that just holds every weight."""
    w_GSN = w_KN.reshape(-1, group_size, w_KN.shape[1])
    low_GN, high_GN = w_GSN.amin(1), w_GSN.amax(1)
    middle = 2 ** (bits - 1)
    if sym:
        scales_GN = torch.maximum(-low_GN / middle, high_GN / (middle - 1)).half()
        return Grid(scales_GN, torch.full_like(scales_GN, middle, dtype=torch.uint8), bits)
    scales_GN = ((high_GN - low_GN) / (2**bits - 1)).half()
    return Grid(scales_GN, (-low_GN / scales_GN).round().clamp(1, 2**bits - 1).to(torch.uint8), bits)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_searching_is_never_worse_than_the_full_range(bits, sym):
    generator = torch.Generator().manual_seed(bits)
    w_KN = torch.randn(64, 16, generator=generator)
    importance = torch.rand(64, generator=generator)
    options = {"bits": bits, "group_size": 32, "sym": sym}
    searched = choose_grid(w_KN, importance, **options)
    full = full_range(w_KN, 32, bits, sym)
    assert searched.scales_GN.dtype == torch.float16
    error, error_full = (weighted_error(w_KN, importance, grid, 32) for grid in (searched, full))
    assert error <= error_full
    if bits < 8:
        assert error < 0.97 * error_full


@pytest.mark.parametrize("largest", [1.0, -1.0])
def test_the_level_that_symmetric_grids_have_more_lies_on_the_side_of_the_largest_weight(largest):
    # Eighths up to the largest: exact on −8 … 7 only if the largest is taken for −8.
    w_KN = (torch.arange(-7, 9) / 8 * largest).repeat(2).unsqueeze(1)
    grid = choose_grid(w_KN, torch.ones(32), bits=4, group_size=32, sym=True)
    assert grid.scales_GN.item() == -largest / 8
    assert weighted_error(w_KN, torch.ones(32), grid, 32) == 0


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_zero_points_never_wrap(bits):
    w_KN = torch.stack([torch.linspace(0.5, 1, 32), torch.linspace(-1, -0.5, 32), torch.linspace(-1, 1, 32)], dim=1)
    grid = choose_grid(w_KN, torch.ones(32), bits=bits, group_size=32, sym=False)
    assert grid.zeros_GN.min() >= 1 and grid.zeros_GN.max() <= 2**bits - 1


def test_groups_of_zeros_stay_zero():
    w_KN = torch.zeros(64, 8)
    w_KN[32:] = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    for sym in (True, False):
        grid = choose_grid(w_KN, torch.ones(64), bits=4, group_size=32, sym=sym)
        assert torch.isfinite(grid.scales_GN).all() and (grid.scales_GN != 0).all()
        assert weighted_error(w_KN[:32], torch.ones(32), grid, 32) == 0


def test_scales_beyond_fp16_are_an_error():
    with pytest.raises(ArithmeticError, match="fp16"):
        choose_grid(torch.full((32, 8), 1e30), torch.ones(32), bits=4, group_size=32, sym=True)
