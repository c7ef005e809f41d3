"""Stochastic rounding to bfloat16: updates below half a unit in the last place are not lost but come through in the
mean."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_words(seed, segment, number, offsets):
    """Four blocks of 32 random bits, for each entry its own: from the seed, its segment, chunk and place in that."""
    return tl.philox(seed, offsets, number.to(tl.int32), segment.to(tl.int32), 0)


@triton.jit
def rounded_stochastically(values, word):
    """float32 as bfloat16, each away from zero with a chance of its distance from the nearest towards zero."""
    bits = values.to(tl.int32, bitcast=True)
    carried = bits + (word & 0xFFFF).to(tl.int32)
    # A carry would turn NaN into other numbers, as would the loss of a NaN's lower bits.
    special = tl.where(values == values, bits, 0x7FC00000)
    kept = tl.where((bits & 0x7F800000) == 0x7F800000, special, carried) >> 16
    return kept.to(tl.int16).to(tl.bfloat16, bitcast=True)
