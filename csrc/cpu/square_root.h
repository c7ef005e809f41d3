// Square roots of vectors, for which the vector extensions have no word. Included once per instruction set.
#pragma once

#include "vector.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

#if R2_X86 && R2_VECTOR_BYTES == 64
R2_INLINE FloatVector square_root(FloatVector x) { return (FloatVector)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }
R2_INLINE DoubleVector square_root(DoubleVector x) { return (DoubleVector)_mm512_maskz_sqrt_pd(0xff, (__m512d)x); }
#elif R2_X86 && R2_VECTOR_BYTES == 32
R2_INLINE FloatVector square_root(FloatVector x) { return (FloatVector)_mm256_sqrt_ps((__m256)x); }
R2_INLINE DoubleVector square_root(DoubleVector x) { return (DoubleVector)_mm256_sqrt_pd((__m256d)x); }
#else
R2_INLINE FloatVector square_root(FloatVector x) {
  for (int i = 0; i < kLanes<FloatVector>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
R2_INLINE DoubleVector square_root(DoubleVector x) {
  for (int i = 0; i < kLanes<DoubleVector>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#endif

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
