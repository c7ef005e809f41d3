"""Stochastic rounding to bfloat16, so that updates below half a unit in the last place are not lost but come through in
the mean. The random bits are those of ``csrc/cpu/rounding.h`` for the same seed, segment, chunk, place and array."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounding_key(seed, segment, number):
    """What a chunk's random bits follow from: two numbers of 32 bits."""
    key = _mixed(_mixed(_mixed(seed.to(tl.uint64)) + segment.to(tl.uint64)) + number.to(tl.uint64))
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def _mixed(x):
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def rounded_stochastically(values, key, offsets, ARRAY: tl.constexpr):
    """float32 as bfloat16, each away from zero with a chance of its distance from the nearest one towards zero.

    The random bits are C. Wellons' hash of least bias (nullprogram.com/blog/2018/07/31) of the offset in the chunk,
    with half of the key at either end; ``ARRAY`` keeps those of weight and states apart.
    """
    x = offsets.to(tl.uint32) ^ key[0]
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = ((x ^ (x >> 15)) + (key[1] + ARRAY)) * 0x846CA68B
    x = x ^ (x >> 16)
    bits = values.to(tl.uint32, bitcast=True)
    carried = bits + (x & 0xFFFF)
    # A carry would make infinity a NaN, and the loss of its lower bits a NaN infinity.
    special = tl.where(values == values, bits, 0x7FC00000)
    kept = tl.where((bits & 0x7F800000) == 0x7F800000, special, carried) >> 16
    return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
