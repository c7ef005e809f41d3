"""Between the dtype that entries are stored in and the precision that they are computed in."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter truncates to bfloat16 and flushes its subnormals; processors round to nearest and keep them.
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def widened(stored, dtype: tl.constexpr):
    """Stored entries in the precision ``dtype``, exactly."""
    if IS_INTERPRETED and stored.dtype == tl.bfloat16:
        bits = stored.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return stored.to(dtype)


@triton.jit
def narrowed(values, dtype: tl.constexpr):
    """Computed entries as they are stored, rounded to nearest, ties to even."""
    if IS_INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(values == values, rounded, 0x7FC0)
        return kept.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)
