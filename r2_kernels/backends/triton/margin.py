"""Margin: |M| + Σ max(|w| - |M|, 0)."""

from __future__ import annotations

import triton
import triton.language as tl

from r2_kernels.backends.triton.penalty_functions import Functions, with_sign_of


@triton.jit
def _margin_below(parameter, dtype: tl.constexpr):
    """The largest number of w's precision that is not above |M|: entries exceed both or neither."""
    exact = tl.abs(parameter)
    rounded = exact.to(dtype)
    bits: tl.constexpr = tl.int64 if dtype == tl.float64 else tl.int32
    below = (rounded.to(bits, bitcast=True) - 1).to(dtype, bitcast=True)
    return tl.where(rounded.to(tl.float64) > exact, below, rounded)


@triton.jit
def margin_extremes(w):
    return ()


@triton.jit
def margin_neutral(lanes: tl.constexpr, dtype: tl.constexpr):
    return ()


@triton.jit
def margin_anchor(extremes, parameter, dtype: tl.constexpr):
    return (_margin_below(parameter, dtype),)


@triton.jit
def margin_terms(w, anchor, REGIME: tl.constexpr):
    distance = tl.abs(w) - anchor[0]
    excess = tl.maximum(distance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return excess, tl.where(distance > 0, 1.0, 0.0).to(w.dtype)


@triton.jit
def margin_convert(sums, ends, parameter, length):
    exceeding = sums[1].to(tl.float64)
    rounding = tl.abs(parameter) - _margin_below(parameter, sums[0].dtype).to(tl.float64)
    # Infinite margins round to themselves, and leave no difference to correct.
    return sums[0].to(tl.float64) - exceeding * tl.where(rounding > 0, rounding, 0.0), exceeding


@triton.jit
def margin_finalize(row, parameter):
    sign = tl.where(parameter > 0, 1.0, tl.where(parameter < 0, -1.0, parameter))
    return tl.abs(parameter) + row[0], sign * (1 - row[1])


@triton.jit
def margin_prepare(row, parameter, coefficient, dtype: tl.constexpr):
    return _margin_below(parameter, dtype), coefficient.to(dtype)


@triton.jit
def margin_constants(row, parameter, coefficient, dtype: tl.constexpr, REGIME: tl.constexpr):
    return margin_prepare(row, parameter, coefficient, dtype)


@triton.jit
def margin_gradient(w, constants, REGIME: tl.constexpr):
    margin, coefficient = constants
    inside = tl.where(w == w, 0.0, w)
    return tl.where(tl.abs(w) > margin, with_sign_of(w, coefficient), inside)


FUNCTIONS = Functions(
    extremes=margin_extremes,
    neutral=margin_neutral,
    anchor=margin_anchor,
    terms=margin_terms,
    convert=margin_convert,
    finalize=margin_finalize,
    prepare=margin_prepare,
    constants=margin_constants,
    gradient=margin_gradient,
    ends=0,
    sums={tl.float32: 2, tl.float64: 2},
    constant_count=2,
)
