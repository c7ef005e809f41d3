"""L∞: max|w|."""

from __future__ import annotations

import triton
import triton.language as tl

from r2_kernels.backends.triton.penalty_functions import Functions, with_sign_of


@triton.jit
def _bits(magnitude):
    """Numbers >= 0 as integers in the same order, NaN above all."""
    bits: tl.constexpr = tl.int64 if magnitude.dtype == tl.float64 else tl.int32
    return magnitude.to(bits, bitcast=True)


@triton.jit
def linf_extremes(w):
    return (_bits(tl.abs(w)),)


@triton.jit
def linf_neutral(lanes: tl.constexpr, dtype: tl.constexpr):
    return (_bits(tl.zeros((lanes,), dtype)),)


@triton.jit
def linf_anchor(extremes, parameter, dtype: tl.constexpr):
    return (extremes[0].to(dtype, bitcast=True),)


@triton.jit
def linf_terms(w, anchor, REGIME: tl.constexpr):
    return (tl.where(tl.abs(w) == anchor[0], 1.0, 0.0).to(w.dtype),)


@triton.jit
def linf_convert(sums, ends, parameter, length):
    # A chunk with a NaN has no entry that reaches its maximum.
    return (tl.where(sums[0].to(tl.float64) == ends[0], sums[1], 0.0).to(tl.float64),)


@triton.jit
def linf_finalize(row, parameter):
    return row[0], row[1]


@triton.jit
def linf_prepare(row, parameter, coefficient, dtype: tl.constexpr):
    # In a segment with a NaN no entry reaches the maximum: x / 0 · 0 makes its gradient NaN.
    share = tl.where(row[0] == 0, coefficient * 0, coefficient / row[1])
    return row[0].to(dtype), share.to(dtype), (share * 0).to(dtype)


@triton.jit
def linf_constants(row, parameter, coefficient, dtype: tl.constexpr, REGIME: tl.constexpr):
    return linf_prepare(row, parameter, coefficient, dtype)


@triton.jit
def linf_gradient(w, constants, REGIME: tl.constexpr):
    maximum, share, zero = constants
    return tl.where(tl.abs(w) == maximum, with_sign_of(w, share), zero)


FUNCTIONS = Functions(
    extremes=linf_extremes,
    neutral=linf_neutral,
    anchor=linf_anchor,
    terms=linf_terms,
    convert=linf_convert,
    finalize=linf_finalize,
    prepare=linf_prepare,
    constants=linf_constants,
    gradient=linf_gradient,
    ends=1,
    sums={tl.float32: 2, tl.float64: 2},
    constant_count=3,
)
