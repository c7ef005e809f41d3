"""exp near zero, as the penalties need it: from power sums, and as cosh - 1 and sinh, without cancellation."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# exp(t) for |t| <= 0.5 as a polynomial in t. Degree 6 for float32: 1 + t times the Chebyshev interpolant of
# (exp(t) - 1) / t, off by at most 7.6e-8 of exp(t). Degree 12 for float64: the Taylor series, off by 4e-14.
SERIES_FLOAT32 = tl.constexpr(
    (
        1.0,
        1.0000000973870822,
        0.5000000121607167,
        0.16665965614691347,
        0.04166579123000645,
        0.008408029412677823,
        0.001398218604627775,
    )
)
SERIES_FLOAT64 = tl.constexpr(
    (
        1.0,
        1.0,
        1 / 2,
        1 / 6,
        1 / 24,
        1 / 120,
        1 / 720,
        1 / 5040,
        1 / 40320,
        1 / 362880,
        1 / 3628800,
        1 / 39916800,
        1 / 479001600,
    )
)


@triton.jit
def hyperbolic(t):
    """cosh(t) - 1 and sinh(t) for |t| <= 0.5, to the last bit or so of t's dtype."""
    square = t * t
    if t.dtype == tl.float64:
        even = square * (1.0 / 87178291200.0) + (1.0 / 479001600.0)
        even = even * square + (1.0 / 3628800.0)
        even = even * square + (1.0 / 40320.0)
        odd = square * (1.0 / 6227020800.0) + (1.0 / 39916800.0)
        odd = odd * square + (1.0 / 362880.0)
        odd = odd * square + (1.0 / 5040.0)
    else:
        even = tl.full(t.shape, 1.0 / 40320.0, t.dtype)
        odd = tl.full(t.shape, 1.0 / 5040.0, t.dtype)
    even = even * square + (1.0 / 720.0)
    even = even * square + (1.0 / 24.0)
    even = even * square + 0.5
    odd = odd * square + (1.0 / 120.0)
    odd = odd * square + (1.0 / 6.0)
    return even * square, (odd * square) * t + t
