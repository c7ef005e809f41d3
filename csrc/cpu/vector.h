// Vectors of float and double as wide as the instruction set allows, and how the storage types are read and written.
//
// On GCC's and Clang's vector extensions, so that one text compiles for every instruction set; intrinsics only where
// the extensions have no word for it. Included once per instruction set, inside its pragma: see instruction_set.h.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../penalties.h"

// A target pragma does not define __AVX512F__ and its like in C++: the width of a vector tells.
#if defined(__x86_64__)
#define R2_X86 1
#else
#define R2_X86 0
#endif

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

using FloatVector = float __attribute__((vector_size(R2_VECTOR_BYTES)));
using FloatBits = uint32_t __attribute__((vector_size(R2_VECTOR_BYTES)));
using HalfBits = uint16_t __attribute__((vector_size(R2_VECTOR_BYTES / 2)));
using DoubleVector = double __attribute__((vector_size(R2_VECTOR_BYTES)));
using DoubleBits = uint64_t __attribute__((vector_size(R2_VECTOR_BYTES)));

template <>
struct Lane<FloatVector> {
  using type = float;
  using bits = FloatBits;
};
template <>
struct Lane<DoubleVector> {
  using type = double;
  using bits = DoubleBits;
};
template <class V>
constexpr int kLanes = sizeof(V) / sizeof(lane_t<V>);

// Whether a comparison holds in every lane.
template <class Mask>
R2_INLINE bool all(Mask mask) {
#if R2_X86 && R2_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
#elif R2_X86 && R2_VECTOR_BYTES == 32
  return _mm256_movemask_epi8((__m256i)mask) == -1;
#else
  auto lanes = mask[0];
  for (size_t i = 1; i < sizeof(mask) / sizeof(mask[0]); ++i) lanes &= mask[i];
  return lanes != 0;
#endif
}

// ---- storage: float32 and float64 as they are, the 16-bit types as float32 ------------------------------------------

template <class Storage>
struct StorageTraits {
  using Scalar = float;
  using Vector = FloatVector;
};
template <>
struct StorageTraits<double> {
  using Scalar = double;
  using Vector = DoubleVector;
};
template <class Storage>
using vector_t = typename StorageTraits<Storage>::Vector;
template <class Storage>
using scalar_t = typename StorageTraits<Storage>::Scalar;

template <class To>
R2_INLINE To load_unaligned(const void* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}

R2_INLINE FloatVector load(const float* from) { return load_unaligned<FloatVector>(from); }
R2_INLINE DoubleVector load(const double* from) { return load_unaligned<DoubleVector>(from); }
R2_INLINE FloatVector load(const BFloat16* from) {
  const HalfBits half = load_unaligned<HalfBits>(from);
#if R2_X86 && R2_VECTOR_BYTES == 64
  const FloatBits bits = (FloatBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);
#elif R2_X86 && R2_VECTOR_BYTES == 32
  const FloatBits bits = (FloatBits)_mm256_cvtepu16_epi32((__m128i)half);
#else
  const FloatBits bits = __builtin_convertvector(half, FloatBits);
#endif
  return from_bits<FloatVector>(bits << 16);
}
R2_INLINE FloatVector load(const Half* from) {
#if R2_X86 && R2_VECTOR_BYTES == 64
  return (FloatVector)_mm512_maskz_cvtph_ps(0xffff, load_unaligned<__m256i>(from));
#elif R2_X86 && R2_VECTOR_BYTES == 32
  return (FloatVector)_mm256_cvtph_ps(load_unaligned<__m128i>(from));
#else
  FloatVector x;
  for (int i = 0; i < kLanes<FloatVector>; ++i) x[i] = from[i];
  return x;
#endif
}

// The bits of bfloat16 in the upper half of each lane, rounded to nearest, ties to even.
R2_INLINE FloatBits round_to_bfloat16(FloatVector x) {
  const FloatBits bits = to_bits(x);
  const FloatBits quiet_nan = bits | 0x00400000u;
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1) : quiet_nan;
}

R2_INLINE void store(float* to, FloatVector x) { __builtin_memcpy(to, &x, sizeof(x)); }
R2_INLINE void store(double* to, DoubleVector x) { __builtin_memcpy(to, &x, sizeof(x)); }
R2_INLINE void store(BFloat16* to, FloatVector x) {
  const HalfBits half = __builtin_convertvector(round_to_bfloat16(x) >> 16, HalfBits);
  __builtin_memcpy(to, &half, sizeof(half));
}
R2_INLINE void store(Half* to, FloatVector x) {
#if R2_X86 && R2_VECTOR_BYTES == 64
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(to, &half, sizeof(half));
#elif R2_X86 && R2_VECTOR_BYTES == 32
  const __m128i half = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(to, &half, sizeof(half));
#else
  for (int i = 0; i < kLanes<FloatVector>; ++i) to[i] = x[i];
#endif
}

// Two vectors' worth of consecutive entries, in an order of the storage type's own: of each pair of bfloat16 in a
// 32-bit word one is a shift away from float32 and the other a mask, where two vectors in order take a shuffle each.
template <class V>
struct Pair {
  V first, second;
};
template <class Storage>
R2_INLINE Pair<vector_t<Storage>> load_pair(const Storage* from) {
  return {load(from), load(from + kLanes<vector_t<Storage>>)};
}
R2_INLINE Pair<FloatVector> load_pair(const BFloat16* from) {
  const FloatBits words = load_unaligned<FloatBits>(from);
  return {from_bits<FloatVector>(words << 16), from_bits<FloatVector>(words & 0xffff0000u)};
}
template <class Storage>
R2_INLINE void store_pair(Storage* to, Pair<vector_t<Storage>> pair) {
  store(to, pair.first);
  store(to + kLanes<vector_t<Storage>>, pair.second);
}
R2_INLINE void store_pair(BFloat16* to, Pair<FloatVector> pair) {
  const FloatBits words = (round_to_bfloat16(pair.first) >> 16) | (round_to_bfloat16(pair.second) & 0xffff0000u);
  __builtin_memcpy(to, &words, sizeof(words));
}

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
