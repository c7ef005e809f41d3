"""Kurtosis: (K - 1.8)², in float64, since of weights with outliers the variance is a small part of the sums."""

from __future__ import annotations

import triton
import triton.language as tl

from r2_kernels.backends.triton.penalty_functions import Functions, both_ends, neutral_ends
from r2_kernels.penalties import UNIFORM_KURTOSIS

UNIFORM = tl.constexpr(UNIFORM_KURTOSIS)
SMALLEST = tl.constexpr(2.0**-1022)


@triton.jit
def _frame(maximum, minimum):
    """The middle of the ends, the distance from there to either, and one over it, 0 where they are equal."""
    reach = maximum * 0.5 - minimum * 0.5
    return maximum * 0.5 + minimum * 0.5, reach, tl.where(reach >= SMALLEST, 1.0 / reach, 0.0)


@triton.jit
def kurtosis_anchor(extremes, parameter, dtype: tl.constexpr):
    maximum, minimum = extremes
    center, _, inverse = _frame(maximum, minimum)
    return maximum, minimum, center, inverse


@triton.jit
def kurtosis_terms(w, anchor, REGIME: tl.constexpr):
    x = (w - anchor[2]) * anchor[3]
    square = x * x
    return x, square, square * x, square * square


@triton.jit
def kurtosis_convert(sums, ends, parameter, length):
    own_center, own_reach, _ = _frame(sums[0], sums[1])
    center, _, inverse = _frame(ends[0], ends[1])
    count = length.to(tl.float64)
    # Of the powers of shift + scale·x.
    shift, scale = (own_center - center) * inverse, own_reach * inverse
    square = scale * scale
    x1, x2, x3, x4 = scale * sums[2], square * sums[3], square * scale * sums[4], square * square * sums[5]
    first = x1 + shift * count
    second = x2 + shift * (2 * x1 + shift * count)
    third = x3 + shift * (3 * x2 + shift * (3 * x1 + shift * count))
    fourth = x4 + shift * (4 * x3 + shift * (6 * x2 + shift * (4 * x1 + shift * count)))
    return count, first, second, third, fourth


@triton.jit
def _moments(row):
    """Of x: mean, standard deviation, third central moment and kurtosis; whether all entries are equal."""
    _, _, count, first, second, third, fourth = row
    is_flat = second == 0
    mean, second, third, fourth = first / count, second / count, third / count, fourth / count
    variance = second - mean * mean
    central = third + mean * (2 * mean * mean - 3 * second)
    fourth = fourth + mean * (mean * (6 * second - 3 * mean * mean) - 4 * third)
    return mean, tl.sqrt(variance), central, fourth / (variance * variance), is_flat


@triton.jit
def kurtosis_finalize(row, parameter):
    _, _, _, kurtosis, is_flat = _moments(row)
    value = tl.where(is_flat, 0.0, (kurtosis - UNIFORM) * (kurtosis - UNIFORM))
    return value, value


@triton.jit
def kurtosis_prepare(row, parameter, coefficient, dtype: tl.constexpr):
    mean, deviation, third, kurtosis, is_flat = _moments(row)
    center, _, inverse = _frame(row[0], row[1])
    scale = coefficient * 8 * (kurtosis - UNIFORM) * inverse / (row[2] * deviation)
    cubic = scale / (deviation * deviation * deviation)
    # A cubic in x minus its mean.
    return (
        center,
        inverse,
        tl.where(is_flat, 0.0, mean),
        tl.where(is_flat, 0.0, cubic),
        tl.where(is_flat, 0.0, scale * kurtosis / deviation),
        tl.where(is_flat, 0.0, cubic * third),
    )


@triton.jit
def kurtosis_constants(row, parameter, coefficient, dtype: tl.constexpr, REGIME: tl.constexpr):
    return kurtosis_prepare(row, parameter, coefficient, dtype)


@triton.jit
def kurtosis_gradient(w, constants, REGIME: tl.constexpr):
    center, inverse, mean, cubic, linear, constant = constants
    y = (w - center) * inverse - mean
    return y * (y * y * cubic - linear) - constant


FUNCTIONS = Functions(
    extremes=both_ends,
    neutral=neutral_ends,
    anchor=kurtosis_anchor,
    terms=kurtosis_terms,
    convert=kurtosis_convert,
    finalize=kurtosis_finalize,
    prepare=kurtosis_prepare,
    constants=kurtosis_constants,
    gradient=kurtosis_gradient,
    ends=2,
    sums={tl.float64: 6},
    constant_count=6,
    is_in_float64=True,
)
