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
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return stored.to(dtype)


@triton.jit
def narrowed(values, dtype: tl.constexpr):
    """Computed entries as they are stored, rounded to nearest, ties to even."""
    if dtype == tl.bfloat16:
        values = values.to(tl.float32)  # No processor rounds float64 to bfloat16 at once.
    if IS_INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(values == values, rounded, 0x7FC0)
        return kept.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)


@triton.jit
def larger(a, b):
    """The larger of two 16-bit entries each, in one NVIDIA instruction for two; of a NaN and a number the number."""
    if IS_INTERPRETED:
        return tl.where(widened(a, tl.float32) > widened(b, tl.float32), a, b)
    elif a.dtype == tl.bfloat16:
        return _paired("max.bf16x2 $0, $1, $2;", a, b)
    else:
        return _paired("max.f16x2 $0, $1, $2;", a, b)


@triton.jit
def smaller(a, b):
    """The smaller, likewise."""
    if IS_INTERPRETED:
        return tl.where(widened(a, tl.float32) < widened(b, tl.float32), a, b)
    elif a.dtype == tl.bfloat16:
        return _paired("min.bf16x2 $0, $1, $2;", a, b)
    else:
        return _paired("min.f16x2 $0, $1, $2;", a, b)


@triton.jit
def _paired(INSTRUCTION: tl.constexpr, a, b):
    # In Triton's own maximum bfloat16 becomes float32, and float16 is compared one by one.
    return tl.inline_asm_elementwise(INSTRUCTION, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2)
