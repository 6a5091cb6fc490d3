"""Rotary embedding against transformers' own and autograd."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlora.kernels.rotary import rotate

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("rows", "heads", "tokens", "width"), [(1, 4, 37, 64), (3, 9, 5, 24), (2, 1, 1, 2)])
@pytest.mark.parametrize("shared_angles", [True, False])
def test_values_and_gradients_are_those_of_transformers(
    device, dtype, tolerance, rows, heads, tokens, width, shared_angles
):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # As attention has them: views of [B, T, H, D]; cosines and sines that are no rotation show every term.
    query, key = random(rows, tokens, heads, width), random(rows, tokens, max(1, heads // 3), width)
    cos, sin = random(1 if shared_angles else rows, tokens, width), random(1 if shared_angles else rows, tokens, width)
    upstream = random(rows, heads, tokens, width), random(rows, max(1, heads // 3), tokens, width)

    def run(function, dtype):
        given = [x.to(device, dtype).requires_grad_() for x in (query, key)]
        angles = [x.to(device, dtype) for x in (cos, sin)]
        outputs = function(*(x.transpose(1, 2) for x in given), *angles)
        sum((output * x.to(output)).sum() for output, x in zip(outputs, upstream, strict=True)).backward()
        return [*outputs, *(x.grad for x in given)]

    for found, expected in zip(run(rotate, dtype), run(apply_rotary_pos_emb, torch.float64), strict=True):
        assert found.dtype == dtype and found.shape == expected.shape
        assert (found.double() - expected).norm() <= tolerance * expected.norm()
