// Stochastic rounding to bfloat16, so that updates below half a unit in the last place are not lost but come through
// in the mean. Included once per instruction set.
#pragma once

#include "vector.h"

namespace r2 {

inline namespace R2_INSTRUCTION_SET {

// 32 random bits a lane from its counter: C. Wellons' hash of least bias (nullprogram.com/blog/2018/07/31), with half
// of the key at either end.
R2_INLINE FloatBits random_bits(FloatBits counter, uint32_t first, uint32_t second) {
  FloatBits x = counter ^ first;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = ((x ^ (x >> 15)) + second) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Stores the lanes of x whose counters start at `counter`; each goes up with a chance of its distance from below.
R2_INLINE void store_stochastically(BFloat16* to, FloatVector x, uint32_t counter, uint32_t first, uint32_t second) {
  FloatBits counters;
  for (int i = 0; i < kLanes<FloatVector>; ++i) counters[i] = counter + i;
  const FloatBits bits = to_bits(x);
  const FloatBits carried = bits + (random_bits(counters, first, second) & 0xffffu);
  const FloatBits special = x == x ? bits : (bits | 0x00400000u);
  const HalfBits half =
      __builtin_convertvector(((bits & 0x7f800000u) == 0x7f800000u ? special : carried) >> 16, HalfBits);
  __builtin_memcpy(to, &half, sizeof(half));
}

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
