// A step's arrays as numbers of the type that it computes in: those of another storage pass through a buffer in the
// first cache.
#pragma once

#include "rounding.h"
#include "step_kernels.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

// Computes in T, for up to kStates states of which `states` are in use.
template <class T, int kStates>
class Staging {
 public:
  // Consecutive entries: where they can be read and written as T.
  struct Block {
    int64_t begin, count;
    const T* gradient;
    T* weight;
    T* states[kStates];
  };
  static constexpr int64_t kMost = 1024;

  Staging(const StepArrays& arrays, int states, const RoundingKey& rounding)
      : arrays_(arrays),
        states_(states),
        rounding_(rounding),
        is_needed_(arrays.weight_storage != kStorage || arrays.gradient_storage != kStorage ||
                   (states > 0 && arrays.state_storage != kStorage)) {}

  // Whether anything passes through the buffer.
  bool is_needed() const { return is_needed_; }
  // Entries that a block may have.
  int64_t most() const { return is_needed_ ? kMost : arrays_.size; }

  // Entries where they are stored, with as many states: inlined, so that the pointers never go through memory, where
  // reading them would wait for the stores before.
  R2_INLINE Block in_place(int64_t begin, int64_t count, int states) const {
    Block block{begin, count, in_place(arrays_.gradient, begin), in_place(arrays_.weight, begin), {}};
    for (int i = 0; i < kStates; ++i) {
      if (i < states) block.states[i] = in_place(arrays_.states[i], begin);
    }
    return block;
  }
  R2_INLINE Block open(int64_t begin, int64_t count) {
    Block block = in_place(begin, count, states_);
    if (is_needed_) read_other_storages(block);
    return block;
  }
  // Writes what has changed back.
  R2_INLINE void close(const Block& block) const {
    if (is_needed_) write_other_storages(block);
  }

 private:
  static constexpr int kWidth = kLanes<vector_t<T>>;
  static constexpr Storage kStorage = sizeof(T) == sizeof(double) ? kFloat64 : kFloat32;

  template <class Pointer>
  static T* in_place(Pointer array, int64_t begin) {
    return reinterpret_cast<T*>(const_cast<char*>(array)) + begin;
  }
  __attribute__((noinline)) void read_other_storages(Block& block) {
    block.gradient = read(arrays_.gradient, arrays_.gradient_storage, block.begin, block.count, buffers_[0]);
    block.weight = read(arrays_.weight, arrays_.weight_storage, block.begin, block.count, buffers_[1]);
    for (int i = 0; i < states_; ++i) {
      block.states[i] = read(arrays_.states[i], arrays_.state_storage, block.begin, block.count, buffers_[i + 2]);
    }
  }
  __attribute__((noinline)) void write_other_storages(const Block& block) const {
    write(arrays_.weight, arrays_.weight_storage, block.begin, block.count, block.weight, 0);
    for (int i = 0; i < states_; ++i) {
      write(arrays_.states[i], arrays_.state_storage, block.begin, block.count, block.states[i], i + 1);
    }
  }

  template <class Pointer>
  static T* read(Pointer array, Storage storage, int64_t begin, int64_t count, T* buffer) {
    if (storage == kStorage) return in_place(array, begin);
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
  const int states_;
  const RoundingKey& rounding_;
  const bool is_needed_;
  T buffers_[kStates + 2][kMost];
};

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
