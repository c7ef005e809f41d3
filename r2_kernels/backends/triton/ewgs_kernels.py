"""The kernels of the EWGS quantizer: a program per block of entries, in the order of memory.

``docs/derivation.md`` has the formulas; ``csrc/ewgs.h`` computes the same, operation by operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r2_kernels.backends.triton.storage import narrowed, widened


# STEPS   levels - 1, and DELTA: constants, so that they are as exact as DTYPE, which a number of the launch is not
@triton.jit
def _clip_and_round(values, ends, STEPS: tl.constexpr, DTYPE: tl.constexpr):
    """The values on [0, 1], and the nearest levels there. A NaN stays."""
    lower = tl.load(ends).to(DTYPE)
    upper = tl.load(ends + 1).to(DTYPE)
    x = (values - lower) * (1.0 / (upper - lower))
    x = tl.where(x < 0.0, 0.0, tl.where(x > 1.0, 1.0, x))
    # What is added leaves no bits for a fraction: to nearest, ties to even.
    ROUND: tl.constexpr = 6755399441055744.0 if DTYPE == tl.float64 else 12582912.0
    level = ((x * STEPS + ROUND) - ROUND) / STEPS
    return x, level


@triton.jit
def ewgs_forward_kernel(values, ends, outputs, count, STEPS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    w = widened(tl.load(values + offsets, mask=mask), DTYPE)
    _, level = _clip_and_round(w, ends, STEPS, DTYPE)
    first = tl.load(ends + 2).to(DTYPE)
    last = tl.load(ends + 3).to(DTYPE)
    span = last - first
    result = tl.where(level < 0.5, first + level * span, last - (1.0 - level) * span)
    tl.store(outputs + offsets, narrowed(result, outputs.dtype.element_ty), mask=mask)


# sums    float64 (programs, 4): the gradients of the ends, of each block
@triton.jit
def ewgs_backward_kernel(
    values,
    ends,
    output_gradients,
    gradients,
    sums,
    count,
    STEPS: tl.constexpr,
    DELTA: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offsets = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    w = widened(tl.load(values + offsets, mask=mask, other=0.0), DTYPE)
    given = widened(tl.load(output_gradients + offsets, mask=mask, other=0.0), DTYPE)
    x, level = _clip_and_round(w, ends, STEPS, DTYPE)
    lower = tl.load(ends).to(DTYPE)
    upper = tl.load(ends + 1).to(DTYPE)
    span = tl.load(ends + 3).to(DTYPE) - tl.load(ends + 2).to(DTYPE)
    g = given * span
    sign = tl.where(g < 0.0, -1.0, 1.0).to(DTYPE)
    scaled = g * (1.0 + sign * DELTA * (x - level))
    # Between equal bounds nothing is inside.
    least = tl.where(lower == upper, float("inf"), tl.minimum(lower, upper))
    passed = tl.where(w >= least, tl.where(w <= tl.maximum(lower, upper), scaled, 0.0), 0.0)
    inverse_width = 1.0 / (upper - lower)
    tl.store(gradients + offsets, narrowed(passed * inverse_width, gradients.dtype.element_ty), mask=mask)
    # Beyond the tensor's end nothing counts, whatever the ends are.
    tl.store(sums + 4 * pid, _total(passed * (x - 1.0), mask) * inverse_width)
    tl.store(sums + 4 * pid + 1, _total(-passed * x, mask) * inverse_width)
    tl.store(sums + 4 * pid + 2, _total(given * (1.0 - level), mask))
    tl.store(sums + 4 * pid + 3, _total(given * level, mask))


@triton.jit
def _total(terms, mask):
    return tl.sum(tl.where(mask, terms, 0.0), 0).to(tl.float64)
