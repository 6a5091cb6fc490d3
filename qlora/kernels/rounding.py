"""What several kernels share: rounding as torch rounds."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

if triton is not None:
    # 1.5·2²³: adding it leaves an fp32 no bits for a fraction, so the hardware rounds, halves to even. Beyond ±2²² the
    # result is off by a little, far outside the range of any code.
    _MAGIC = tl.constexpr(12582912.0)

    @triton.jit
    def round_half_even(x):
        return (x + _MAGIC) - _MAGIC
