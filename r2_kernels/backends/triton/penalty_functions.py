"""What a penalty is to the kernels: what a chunk adds up to, how chunks merge, what value and gradient follow.

Each penalty, in a file of its own, is a set of functions that the kernels take as compile-time arguments; a penalty
knows nothing of chunks, tables or addresses, and the kernels nothing of a penalty:

    extremes     what to take the maximum of over a chunk, from its entries ``w``, in w's precision: nothing, or a tuple
                 of one, or of two, and then the second's minimum is meant
    neutral      what these extremes start from
    anchor       from these extremes: first what to store of them, then what ``terms`` need, all scalars
    regime       which of the ways to compute ``terms`` suits an anchor: 0, 1 or 2
    terms        what to add up over a chunk, a tuple, from its entries and its anchor, in a given regime
    convert      what a chunk adds to its segment's statistics, float64, from its stored extremes and sums and the
                 segment's ends; these and the sums are the statistics, in the order of ``r2_kernels.penalties``
    finalize     value and gradient with respect to the parameter, from the statistics
    prepare      constants of a segment's gradient, once in float64, rounded to the precision of its entries
    constants    the same for a given regime, of one segment or of several
    slope_regime which of the ways to compute ``gradient`` suits these constants: 0 or 1
    gradient     the gradient with respect to each entry, times the segment's coefficient, from these constants, in a
                 given regime

``parameter`` is M or the temperature in float64, zero where a penalty has none. Triton's ``max`` and ``min`` drop a
NaN: where they do, the sums that follow keep it. ``docs/derivation.md`` derives the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def both_ends(w):
    """The ``extremes`` of a penalty that takes the maximum and the minimum."""
    return w, w


@triton.jit
def neutral_ends(lanes: tl.constexpr, dtype: tl.constexpr):
    """The ``neutral`` for these."""
    return tl.full((lanes,), -INFINITY, dtype), tl.full((lanes,), INFINITY, dtype)


@triton.jit
def only_regime(anchor):
    return 0


@dataclass(frozen=True)
class Functions:
    """One penalty's functions, by what they do, and how many numbers these take and give.

    Args:
        ends: how many extremes there are.
        regimes, slope_regimes: how many ways there are to compute ``terms`` and ``gradient``.
        sums: how many numbers of a chunk are stored, the extremes and the most terms, by accumulator.
        constant_count: how many constants a gradient has.
        is_in_float64: whether entries of all dtypes are computed in float64, as float32 would lose too much.
    """

    extremes: triton.JITFunction
    neutral: triton.JITFunction
    anchor: triton.JITFunction
    terms: triton.JITFunction
    convert: triton.JITFunction
    finalize: triton.JITFunction
    prepare: triton.JITFunction
    constants: triton.JITFunction
    gradient: triton.JITFunction
    ends: int
    sums: dict[tl.dtype, int]
    constant_count: int
    regime: triton.JITFunction = only_regime
    regimes: int = 1
    slope_regime: triton.JITFunction = only_regime
    slope_regimes: int = 1
    is_in_float64: bool = False

    def accumulator(self, dtype: torch.dtype) -> tl.dtype:
        """What entries of a dtype are computed in."""
        return tl.float64 if self.is_in_float64 else accumulator(dtype)

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """What the sums and constants of entries of a dtype are stored in."""
        return torch.float64 if self.accumulator(dtype) is tl.float64 else torch.float32

    def sums_of(self, dtype: torch.dtype) -> int:
        """How many numbers of a chunk of entries of that dtype are stored."""
        return self.sums[self.accumulator(dtype)]


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What entries of a dtype are computed in, where nothing asks for more."""
    return tl.float64 if dtype is torch.float64 else tl.float32


@triton.jit
def with_sign_of(w, magnitude):
    return tl.where(w < 0, -magnitude, magnitude)
