"""Soft-min-max: s_max - s_min + exp(-a)."""

from __future__ import annotations

import triton
import triton.language as tl

from r2_kernels.backends.triton.exponentials import LOG2_E, SERIES_FLOAT32, SERIES_FLOAT64, hyperbolic
from r2_kernels.backends.triton.penalty_functions import Functions, both_ends, neutral_ends

# |a| times half the distance of the ends. Up to SMALL, exp is a polynomial, and no difference between the two ends may
# cancel; up to MIDDLE, moments about the center are better conditioned than moments about the ends, and cheaper.
SMALL = tl.constexpr(0.5)
MIDDLE = tl.constexpr(2.0)
# Temperatures in units of one over a chunk's extent end here: exp2 of the smallest distance is zero long before.
STEEPEST = tl.constexpr(2.0**100)


@triton.jit
def _frame(maximum, minimum, temperature):
    """What the sums and gradients of entries between two ends are anchored to.

    Returns the center of the ends; ``unit``, the power of two that brings half their distance into [0.5, 1), so that
    no distance or square of one over- or underflows; its inverse; and |a| times half the distance, which decides how
    exponentials are computed.
    """
    center = maximum * 0.5 + minimum * 0.5
    reach = maximum * 0.5 - minimum * 0.5
    if reach.dtype == tl.float64:
        exponent = (reach.to(tl.int64, bitcast=True) >> 52) & 2047
        field = tl.where(reach == 0, 1023, tl.maximum(2045 - exponent, 1)).to(tl.int64)
        unit = (field << 52).to(tl.float64, bitcast=True)
        inverse = ((2046 - field) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (reach.to(tl.int32, bitcast=True) >> 23) & 255
        field = tl.where(reach == 0, 127, tl.maximum(253 - exponent, 1)).to(tl.int32)
        unit = (field << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - field) << 23).to(tl.float32, bitcast=True)
    return center, unit, inverse, temperature * reach


@triton.jit
def _steepness(temperature, inverse_unit):
    """|a|·log2(e) per unit: exp(a·distance) = exp2(steepness · distance in units)."""
    steepness = temperature * inverse_unit * LOG2_E
    return tl.where(steepness > STEEPEST, STEEPEST, steepness)


@triton.jit
def _powers(x):
    """x^k for k from 1 on: 8 of them in float32, 14 in float64."""
    x2 = x * x
    x3 = x2 * x
    x4 = x2 * x2
    powers = (x, x2, x3, x4, x4 * x, x4 * x2, x4 * x3, x4 * x4)
    if x.dtype == tl.float64:
        # Of the ways to multiply them, one that fits into half of a processor's registers.
        x6, x7 = x3 * x3, x4 * x3
        powers = powers + (x6 * x3, x6 * x4, x7 * x4, x6 * x6, x6 * x7, x7 * x7)
    return powers


@triton.jit
def _in_units(w, unit, origin):
    """(w - origin)·unit with one rounding, as unit is a power of two."""
    return tl.fma(w, tl.broadcast_to(unit, w.shape), tl.broadcast_to(-(origin * unit), w.shape))


@triton.jit
def _moments(u, exponent):
    """e, u·e and u²·e with e = exp2(exponent)."""
    e = tl.exp2(exponent)
    first = u * e
    return e, first, u * first


@triton.jit
def soft_min_max_anchor(extremes, parameter, dtype: tl.constexpr):
    maximum, minimum = extremes
    temperature = tl.abs(parameter).to(dtype)
    center, unit, inverse, half = _frame(maximum, minimum, temperature)
    return maximum, minimum, center, unit, _steepness(temperature, inverse), half


@triton.jit
def soft_min_max_regime(anchor):
    half = anchor[5]
    return tl.where(half <= SMALL, 0, tl.where(half <= MIDDLE, 1, 2))


@triton.jit
def soft_min_max_terms(w, anchor, REGIME: tl.constexpr):
    maximum, minimum, center, unit, steepness, _ = anchor
    if REGIME == 0:
        terms = _powers(_in_units(w, unit, center))
    elif REGIME == 1:
        x = _in_units(w, unit, center)
        exponent = x * steepness
        terms = _moments(x, exponent) + _moments(x, -exponent)
    else:
        upper, lower = _in_units(w, unit, maximum), _in_units(w, unit, minimum)
        terms = _moments(upper, upper * steepness) + _moments(lower, -(lower * steepness))
    return terms


@triton.jit
def _moments_from_powers(sums, count, rate):
    """Sums of x^k·exp(rate·x), k = 0, 1, 2, from those of the powers of x, of which ``count`` is the zeroth."""
    z = count.to(tl.float64)
    s = sums[2].to(tl.float64)
    q = sums[3].to(tl.float64)
    factor = tl.full(rate.shape, 1.0, tl.float64)
    for power in tl.static_range(1, len(sums) - 3):
        factor *= rate
        if len(sums) == 10:
            term = factor * SERIES_FLOAT32[power]
        else:
            term = factor * SERIES_FLOAT64[power]
        z += term * sums[power + 1].to(tl.float64)
        s += term * sums[power + 2].to(tl.float64)
        q += term * sums[power + 3].to(tl.float64)
    return z, s, q


@triton.jit
def _in_entries(moments, inverse, shift, temperature):
    """Sums of e, d·e and d²·e, in entries, from those in units, after every d has grown by ``shift``."""
    z, s, q = moments
    s, q = s * inverse, q * inverse * inverse
    factor = tl.exp(temperature * shift)
    return factor * z, factor * (s + shift * z), factor * (q + shift * (2 * s + shift * z))


@triton.jit
def _chosen(condition, if_true, if_false):
    return (
        tl.where(condition, if_true[0], if_false[0]),
        tl.where(condition, if_true[1], if_false[1]),
        tl.where(condition, if_true[2], if_false[2]),
    )


@triton.jit
def soft_min_max_convert(sums, ends, parameter, length):
    center, _, inverse, half = _frame(sums[0], sums[1], tl.abs(parameter).to(sums[0].dtype))
    maximum, minimum = sums[0].to(tl.float64), sums[1].to(tl.float64)
    center, inverse = center.to(tl.float64), inverse.to(tl.float64)
    temperature = tl.abs(parameter)
    # At most 1, unless all distances are zero.
    rate = tl.where(half <= SMALL, tl.minimum(temperature * inverse, 1.0), 0.0)
    upper = (sums[2].to(tl.float64), sums[3].to(tl.float64), sums[4].to(tl.float64))
    lower = (sums[5].to(tl.float64), sums[6].to(tl.float64), sums[7].to(tl.float64))
    upper = _chosen(half <= SMALL, _moments_from_powers(sums, length, rate), upper)
    lower = _chosen(half <= SMALL, _moments_from_powers(sums, length, -rate), lower)
    # From the center, or from the chunk's ends, to the segment's.
    up = tl.where(half <= MIDDLE, center, maximum) - ends[0]
    down = tl.where(half <= MIDDLE, center, minimum) - ends[1]
    return _in_entries(upper, inverse, up, temperature) + _in_entries(lower, inverse, down, -temperature)


@triton.jit
def soft_min_max_finalize(row, parameter):
    maximum, minimum, z_upper, s_upper, q_upper, z_lower, s_lower, q_lower = row
    mean_upper, mean_lower = s_upper / z_upper, s_lower / z_lower
    soft_range = (maximum - minimum) + (mean_upper - mean_lower)
    variance = (q_upper / z_upper - mean_upper * mean_upper) + (q_lower / z_lower - mean_lower * mean_lower)
    is_empty = z_upper == 0
    # A negative temperature makes the soft maximum the mean near the minimum, and vice versa.
    soft_range = tl.where(is_empty, 0.0, tl.where(parameter < 0, -soft_range, soft_range))
    remainder = tl.exp(-parameter)
    return soft_range + remainder, tl.where(is_empty, 0.0, variance) - remainder


@triton.jit
def soft_min_max_prepare(row, parameter, coefficient, dtype: tl.constexpr):
    _, _, _, half = _frame(row[0].to(dtype), row[1].to(dtype), tl.abs(parameter).to(dtype))
    if half <= SMALL:
        constants = soft_min_max_constants(row, parameter, coefficient, dtype, 0)
    else:
        constants = soft_min_max_constants(row, parameter, coefficient, dtype, 1)
    return constants


@triton.jit
def soft_min_max_constants(row, parameter, coefficient, dtype: tl.constexpr, REGIME: tl.constexpr):
    maximum, minimum, z_upper, s_upper, _, z_lower, s_lower, _ = row
    temperature = tl.abs(parameter)
    center, unit, inverse, half = _frame(maximum.to(dtype), minimum.to(dtype), temperature.to(dtype))
    coefficient = tl.where(parameter < 0, -coefficient, coefficient)
    mean_upper, mean_lower = temperature * (s_upper / z_upper), temperature * (s_lower / z_lower)
    if REGIME == 0:
        # With p = (1 + P)/Z and q = (1 + Q)/Z no difference of nearly equal numbers is left as a goes to 0. Any Z
        # would do: the mean of both ends' makes P and Q small.
        up = temperature * (maximum - center.to(tl.float64))
        down = temperature * (minimum - center.to(tl.float64))
        z_upper *= tl.exp(up)
        z_lower *= tl.exp(-down)
        z_mean, difference = (z_upper + z_lower) * 0.5, (z_lower - z_upper) * 0.5
        constants = (center, temperature.to(dtype), (coefficient / z_mean).to(dtype))
        constants = constants + ((z_mean / z_upper).to(dtype), (difference / z_upper).to(dtype))
        constants = constants + ((z_mean / z_lower).to(dtype), (-difference / z_lower).to(dtype))
        constants = constants + ((-up - mean_upper).to(dtype), (-down - mean_lower).to(dtype))
    else:
        ln2: tl.constexpr = 0.6931471805599453
        p, q = coefficient / z_upper, coefficient / z_lower
        constants = (unit, _steepness(temperature.to(dtype), inverse), maximum.to(dtype))
        constants = constants + (minimum.to(dtype), (p * ln2).to(dtype), (p * (1 - mean_upper)).to(dtype))
        constants = constants + ((q * ln2).to(dtype), (q * (1 + mean_lower)).to(dtype), unit * 0)
    return (half <= SMALL,) + constants


@triton.jit
def _small_gradient(w, center, temperature, scale, p_ratio, p_excess, q_ratio, q_excess, upper, lower):
    t = (w - center) * temperature
    even, odd = hyperbolic(t)
    p = p_ratio * (even + odd) + p_excess
    q = q_ratio * (even - odd) + q_excess
    above, below = t + upper, t + lower
    # P·(1 + above) - Q·(1 - below) + above + below
    return scale * ((p * above + (p - q)) + (q * below + (above + below)))


@triton.jit
def _large_gradient(w, unit, steepness, maximum, minimum, p_scale, p_offset, q_scale, q_offset):
    above = _in_units(w, unit, maximum) * steepness
    below = _in_units(w, unit, minimum) * steepness
    upper = tl.exp2(above) * (above * p_scale + p_offset)
    return upper - tl.exp2(-below) * (q_offset - below * q_scale)


@triton.jit
def soft_min_max_slope_regime(constants):
    return tl.where(constants[0], 0, 1)


@triton.jit
def soft_min_max_gradient(w, constants, REGIME: tl.constexpr):
    _, c0, c1, c2, c3, c4, c5, c6, c7, c8 = constants
    if REGIME == 0:
        slope = _small_gradient(w, c0, c1, c2, c3, c4, c5, c6, c7, c8)
    else:
        slope = _large_gradient(w, c0, c1, c2, c3, c4, c5, c6, c7)
    return slope


FUNCTIONS = Functions(
    extremes=both_ends,
    neutral=neutral_ends,
    anchor=soft_min_max_anchor,
    regime=soft_min_max_regime,
    terms=soft_min_max_terms,
    convert=soft_min_max_convert,
    finalize=soft_min_max_finalize,
    prepare=soft_min_max_prepare,
    constants=soft_min_max_constants,
    slope_regime=soft_min_max_slope_regime,
    gradient=soft_min_max_gradient,
    ends=2,
    sums={tl.float32: 10, tl.float64: 16},
    constant_count=10,
    regimes=3,
    slope_regimes=2,
)
