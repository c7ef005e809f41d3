// The skeleton of an optimizer's step on a CPU core: load, slope, update, store. It knows neither penalty nor rule;
// included once per instruction set.
#pragma once

#include <type_traits>

#include "rounding.h"
#include "square_root.h"  // before the rules, which call it
#include "step_kernels.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

// A penalty that is not there.
struct NoPenalty {
  template <class V>
  struct Slope {
    R2_INLINE Slope() {}
    R2_INLINE V operator()(V) const { return V{}; }
  };
};

// A chunk whose apply() steps: what a penalty's apply() takes. Computes in T, which is float, or double for weights of
// float64 and where a penalty asks for it; arrays of another storage pass through a buffer in the first cache.
template <class Rule, class T>
class StepChunk {
 public:
  using Scalar = T;
  using Vector = vector_t<T>;
  using Scalars = typename Rule::Scalars;

  StepChunk(const StepArrays& arrays, const Scalars& scalars, double gradient_scale, bool is_decoupled,
            const RoundingKey& rounding)
      : arrays_(arrays),
        scalars_(scalars),
        gradient_scale_(gradient_scale),
        is_decoupled_(is_decoupled),
        rounding_(rounding) {}

  int64_t size() const { return arrays_.size; }
  StepChunk<Rule, double> in_float64() const {
    return StepChunk<Rule, double>(arrays_, scalars_, gradient_scale_, is_decoupled_, rounding_);
  }

  template <template <class> class Slope, class... Arguments>
  void apply(const Arguments&... arguments) const {
    const Slope<Vector> slope(arguments...);
    const typename Rule::template Update<Vector> update(scalars_);
    constexpr bool kHasPenalty = !std::is_same_v<Slope<Vector>, NoPenalty::Slope<Vector>>;
    const int states = Rule::states(scalars_);
    const bool is_staged = arrays_.weight_storage != kStorage || arrays_.gradient_storage != kStorage ||
                           (states > 0 && arrays_.state_storage != kStorage);
    const int64_t block = is_staged ? kBlock : arrays_.size;
    T buffers[Rule::kStates + 2][kBlock];
    for (int64_t begin = 0; begin < arrays_.size; begin += block) {
      const int64_t count = begin + block < arrays_.size ? block : arrays_.size - begin;
      Pointers at{};
      at.gradient = read(arrays_.gradient, arrays_.gradient_storage, begin, count, buffers[0]);
      at.weight = read(arrays_.weight, arrays_.weight_storage, begin, count, buffers[1]);
      for (int i = 0; i < states; ++i) {
        at.states[i] = read(arrays_.states[i], arrays_.state_storage, begin, count, buffers[i + 2]);
      }
      run<kHasPenalty>(at, count, states, slope, update);
      write(arrays_.weight, arrays_.weight_storage, begin, count, at.weight, 0);
      for (int i = 0; i < states; ++i) {
        write(arrays_.states[i], arrays_.state_storage, begin, count, at.states[i], i + 1);
      }
    }
  }

 private:
  static constexpr int kWidth = kLanes<Vector>;
  static constexpr Storage kStorage = sizeof(T) == sizeof(double) ? kFloat64 : kFloat32;
  static constexpr int64_t kBlock = 512;

  struct Pointers {
    const T* gradient;
    T* weight;
    T* states[Rule::kStates];
  };

  template <bool kHasPenalty, class VectorSlope, class VectorUpdate>
  R2_INLINE void run(const Pointers& at, int64_t count, int states, const VectorSlope& slope,
                     const VectorUpdate& update) const {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) step<kHasPenalty>(at, i, states, slope, update);
    if (i == count) return;
    // The rest in a vector of its own, so that what becomes of an entry does not depend on where it lies.
    T rest[Rule::kStates + 2][kWidth] = {};
    const int64_t bytes = (count - i) * sizeof(T);
    Pointers padded{};
    padded.gradient = rest[0];
    padded.weight = rest[1];
    __builtin_memcpy(rest[0], at.gradient + i, bytes);
    __builtin_memcpy(rest[1], at.weight + i, bytes);
    for (int s = 0; s < states; ++s) {
      padded.states[s] = rest[s + 2];
      __builtin_memcpy(rest[s + 2], at.states[s] + i, bytes);
    }
    step<kHasPenalty>(padded, 0, states, slope, update);
    __builtin_memcpy(at.weight + i, rest[1], bytes);
    for (int s = 0; s < states; ++s) __builtin_memcpy(at.states[s] + i, rest[s + 2], bytes);
  }

  // One vector's worth of entries.
  template <bool kHasPenalty, class VectorSlope, class VectorUpdate>
  R2_INLINE void step(const Pointers& at, int64_t i, int count, const VectorSlope& slope,
                      const VectorUpdate& update) const {
    Vector w = load(at.weight + i);
    Vector gradient = load(at.gradient + i) * broadcast<Vector>(gradient_scale_);
    if constexpr (kHasPenalty) {
      const Vector pull = slope(w);
      if (is_decoupled_) {
        w = w - pull;
      } else {
        gradient = gradient + pull;
      }
    }
    Vector states[Rule::kStates] = {};
    for (int s = 0; s < Rule::kStates; ++s) {
      if (s < count) states[s] = load(at.states[s] + i);
    }
    store(at.weight + i, update(w, gradient, states));
    for (int s = 0; s < Rule::kStates; ++s) {
      if (s < count) store(at.states[s] + i, states[s]);
    }
  }

  // ---- other storages: `count` entries from `begin` on, as T -------------------------------------------------------

  template <class Pointer>
  static T* read(Pointer array, Storage storage, int64_t begin, int64_t count, T* buffer) {
    if (storage == kStorage) return reinterpret_cast<T*>(const_cast<char*>(array)) + begin;
    switch (storage) {
      case kFloat32:
        return converted(reinterpret_cast<const float*>(array) + begin, count, buffer);
      case kFloat64:
        return converted(reinterpret_cast<const double*>(array) + begin, count, buffer);
      case kBFloat16:
        return converted(reinterpret_cast<const BFloat16*>(array) + begin, count, buffer);
      default:
        return converted(reinterpret_cast<const Half*>(array) + begin, count, buffer);
    }
  }
  template <class Stored>
  static T* converted(const Stored* from, int64_t count, T* buffer) {
    int64_t i = 0;
    if constexpr (sizeof(T) == sizeof(float) && sizeof(Stored) == 2) {
      for (; i + kWidth <= count; i += kWidth) store(buffer + i, load(from + i));
    }
    for (; i < count; ++i) buffer[i] = static_cast<T>(from[i]);
    return buffer;
  }

  // `array_index` keeps the random bits of the weight and of each state apart.
  void write(char* array, Storage storage, int64_t begin, int64_t count, const T* from, uint32_t array_index) const {
    if (storage == kStorage) return;
    switch (storage) {
      case kFloat32:
        return convert_back(reinterpret_cast<float*>(array) + begin, count, from);
      case kFloat64:
        return convert_back(reinterpret_cast<double*>(array) + begin, count, from);
      case kBFloat16:
        if (rounding_.is_stochastic) {
          return round_back(reinterpret_cast<BFloat16*>(array) + begin, begin, count, from, array_index);
        }
        return convert_back(reinterpret_cast<BFloat16*>(array) + begin, count, from);
      default:
        return convert_back(reinterpret_cast<Half*>(array) + begin, count, from);
    }
  }
  template <class Stored>
  static void convert_back(Stored* to, int64_t count, const T* from) {
    int64_t i = 0;
    if constexpr (sizeof(T) == sizeof(float) && sizeof(Stored) == 2) {
      for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
    }
    for (; i < count; ++i) to[i] = static_cast<Stored>(static_cast<scalar_t<Stored>>(from[i]));
  }
  void round_back(BFloat16* to, int64_t begin, int64_t count, const T* from, uint32_t array_index) const {
    constexpr int kFloats = kLanes<FloatVector>;
    const uint32_t second = rounding_.second + array_index;
    for (int64_t i = 0; i < count; i += kFloats) {
      const int64_t lanes = count - i < kFloats ? count - i : kFloats;
      float x[kFloats] = {};
      BFloat16 rounded[kFloats];
      for (int64_t lane = 0; lane < lanes; ++lane) x[lane] = static_cast<float>(from[i + lane]);
      store_stochastically(rounded, load(x), static_cast<uint32_t>(begin + i), rounding_.first, second);
      __builtin_memcpy(to + i, rounded, lanes * sizeof(BFloat16));
    }
  }

  const StepArrays& arrays_;
  const Scalars& scalars_;
  const double gradient_scale_;
  const bool is_decoupled_;
  const RoundingKey& rounding_;
};

// ---- the table -----------------------------------------------------------------------------------------------------

template <class Penalty>
struct ApplyPenalty {
  template <class Chunk>
  static void to(const Chunk& chunk, const StepPenalty& penalty) {
    typename Penalty::Row row;
    __builtin_memcpy(&row, penalty.row, sizeof(row));
    Penalty::apply(chunk, row, penalty.parameter, penalty.coefficient);
  }
};
template <>
struct ApplyPenalty<NoPenalty> {
  template <class Chunk>
  static void to(const Chunk& chunk, const StepPenalty&) {
    chunk.template apply<NoPenalty::Slope>();
  }
};

template <class Rule, class Penalty>
void step_chunk(const StepArrays& arrays, const typename Rule::Scalars& scalars, double gradient_scale,
                const StepPenalty& penalty, const RoundingKey& rounding) {
  if (arrays.weight_storage == kFloat64) {
    ApplyPenalty<Penalty>::to(StepChunk<Rule, double>(arrays, scalars, gradient_scale, penalty.is_decoupled, rounding),
                              penalty);
  } else {
    ApplyPenalty<Penalty>::to(StepChunk<Rule, float>(arrays, scalars, gradient_scale, penalty.is_decoupled, rounding),
                              penalty);
  }
}

template <class Penalty>
constexpr StepKernels step_kernels() {
  return {step_chunk<AdamW, Penalty>, step_chunk<Sgd, Penalty>};
}

}  // namespace R2_INSTRUCTION_SET

const StepTable R2_STEP_TABLE = {
    {step_kernels<LInf>(), step_kernels<Margin>(), step_kernels<SoftMinMax>(), step_kernels<NoPenalty>()}};

}  // namespace r2
