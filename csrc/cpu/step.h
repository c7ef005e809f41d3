// The skeleton of an optimizer's step on a CPU core: load, slope, update, store, and add up the new weights while they
// are in registers. It knows neither penalty nor rule; included once per instruction set.
#pragma once

#include <type_traits>

#include "chunk.h"
#include "square_root.h"  // before the rules, which call it
#include "staging.h"

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

// What becomes of one vector's worth of entries.
template <class Rule, class VectorSlope, class V>
struct VectorStep {
  using Vector = V;
  using Scalar = lane_t<V>;
  using Blocks = Staging<Scalar, Rule::kStates>;
  using Block = typename Blocks::Block;
  static constexpr int kUsualStates = Rule::kUsualStates;
  // Entries that are asked for in advance: the arithmetic of a step fills a core's window before that sees enough of
  // what comes next to keep the memory busy.
  static constexpr int64_t kAhead = 512;

  VectorSlope slope;
  typename Rule::template Update<V> update;
  V gradient_scale;
  int states;
  bool is_decoupled;

  // Whether the settings are the usual ones, and a copy that compilers see to be so, without a branch.
  bool is_usual() const { return !is_decoupled && states == Rule::kUsualStates && update.is_usual(); }
  R2_INLINE void specialize() {
    is_decoupled = false;
    states = Rule::kUsualStates;
    update.specialize();
  }

  // Steps the entries from the i-th of the block on; returns the new weights.
  template <bool kAsksAhead = true>
  R2_INLINE V step(const Block& at, int64_t i) const {
    V w = load(at.weight + i);
    V gradient = load(at.gradient + i) * gradient_scale;
    if constexpr (!std::is_same_v<VectorSlope, NoPenalty::Slope<V>>) {
      const V pull = slope(w);
      if (is_decoupled) {
        w = w - pull;
      } else {
        gradient = gradient + pull;
      }
    }
    if constexpr (kAsksAhead) {
      __builtin_prefetch(at.weight + i + kAhead);
      __builtin_prefetch(at.gradient + i + kAhead);
    }
    V state[Rule::kStates] = {};
    for (int s = 0; s < Rule::kStates; ++s) {
      if (s >= states) continue;
      state[s] = load(at.states[s] + i);
      if constexpr (kAsksAhead) __builtin_prefetch(at.states[s] + i + kAhead);
    }
    w = update(w, gradient, state);
    store(at.weight + i, w);
    for (int s = 0; s < Rule::kStates; ++s) {
      if (s < states) store(at.states[s] + i, state[s]);
    }
    return w;
  }

  // Fewer entries than a vector has, in one of their own, so that what becomes of an entry does not depend on where it
  // lies.
  void rest(const Block& at, int64_t i) const {
    Scalar padded[Rule::kStates + 2][kLanes<V>] = {};
    const int64_t bytes = (at.count - i) * sizeof(Scalar);
    Block block{0, at.count - i, padded[0], padded[1], {}};
    __builtin_memcpy(padded[0], at.gradient + i, bytes);
    __builtin_memcpy(padded[1], at.weight + i, bytes);
    for (int s = 0; s < states; ++s) {
      block.states[s] = padded[s + 2];
      __builtin_memcpy(padded[s + 2], at.states[s] + i, bytes);
    }
    step<false>(block, 0);
    __builtin_memcpy(at.weight + i, padded[1], bytes);
    for (int s = 0; s < states; ++s) __builtin_memcpy(at.states[s] + i, padded[s + 2], bytes);
  }

  // Steps the entries in [begin, end).
  R2_INLINE void all(Blocks& blocks, int64_t begin, int64_t end) const {
    const VectorStep kept = *this;  // in registers, which memory that is written cannot alias
    for (int64_t next; begin < end; begin = next) {
      next = end - begin < blocks.most() ? end : begin + blocks.most();
      const Block at = blocks.open(begin, next - begin);
      int64_t i = 0;
      for (; i + kLanes<V> <= at.count; i += kLanes<V>) kept.step(at, i);
      if (i < at.count) rest(at, i);
      blocks.close(at);
    }
  }
};

// New weights, each of which is stepped when it is asked for.
template <class Step>
class SteppedEntries {
 public:
  using Vector = typename Step::Vector;

  R2_INLINE SteppedEntries(const Step& step, const typename Step::Blocks& blocks, int64_t begin, int64_t size)
      : step_(step), at_(blocks.in_place(begin, size, Step::kUsualStates)) {
    step_.specialize();
  }

  R2_INLINE Vector vector(int64_t i) const { return step_.step(at_, i); }
  R2_INLINE Pair<Vector> pair(int64_t i) const {
    const Vector first = vector(i);
    return {first, vector(i + kLanes<Vector>)};
  }

 private:
  Step step_;  // in registers, as above
  const typename Step::Block at_;
};

// A chunk whose entries are stepped when they are first summed up: what a penalty's reduce() takes, which so sees the
// new weights. Its sums are those of Chunk, bit by bit, whatever was in registers when.
template <class Step>
class SteppedChunk {
 public:
  using Scalar = typename Step::Scalar;

  // The first `stepped` entries of the blocks have been stepped; `weight` is of the first one.
  SteppedChunk(const Step& step, typename Step::Blocks& blocks, Scalar* weight, int64_t size, int64_t& stepped)
      : SteppedChunk(step, blocks, weight, 0, size, stepped) {}

  int64_t size() const { return size_; }
  SteppedChunk part(int64_t begin, int64_t size) const {
    return SteppedChunk(step_, blocks_, weight_, begin_ + begin, begin + size < size_ ? size : size_ - begin, stepped_);
  }
  auto in_float64() const { return stored().in_float64(); }
  auto widened() const { return stored().widened(); }

  template <template <class> class Sums, class... Arguments>
  Sums<double> sum(const Arguments&... arguments) const {
    // What is not a first look is added up once all is stepped, which keeps the combinations few.
    if constexpr (Sums<Vector>::kIsFirstLook) {
      if (stepped_ < begin_ + size_) return sum_and_step<Sums>(arguments...);
    }
    return stored().template sum<Sums>(arguments...);
  }

  // The entries, all of them stepped.
  Chunk<Scalar> stored() const {
    if (stepped_ < begin_ + size_) step_.all(blocks_, stepped_, begin_ + size_);
    stepped_ = stepped_ < begin_ + size_ ? begin_ + size_ : stepped_;
    return Chunk<Scalar>(weight_ + begin_, nullptr, size_);
  }

 private:
  using Vector = typename Step::Vector;

  template <template <class> class Sums, class... Arguments>
  Sums<double> sum_and_step(const Arguments&... arguments) const {
    const Scalar* weight = weight_ + begin_;
    const Sums<Vector> zero(arguments...);
    Sums<Vector> sums = zero;
    int64_t i = add_blocks(StoredEntries<Scalar>{weight}, 0, stepped_ - begin_, zero, sums);
    i = add_blocks(SteppedEntries<Step>(step_, blocks_, begin_, size_), i, size_, zero, sums);
    stepped_ = begin_ + i;
    stored();
    return total_of<Sums, Vector>(sums, weight + i, size_ - i, arguments...);
  }

  SteppedChunk(const Step& step, typename Step::Blocks& blocks, Scalar* weight, int64_t begin, int64_t size,
               int64_t& stepped)
      : step_(step), blocks_(blocks), weight_(weight), begin_(begin), size_(size), stepped_(stepped) {}

  const Step& step_;
  typename Step::Blocks& blocks_;
  Scalar* const weight_;
  const int64_t begin_, size_;
  int64_t& stepped_;
};

// A chunk whose apply() steps: what a penalty's apply() takes. Computes in T, which is float, or double for weights of
// float64 and where a penalty asks for it.
template <class Rule, class Penalty, class T>
class StepChunk {
 public:
  using Scalar = T;
  using Vector = vector_t<T>;
  using Scalars = typename Rule::Scalars;

  // The row of the new weights goes to `new_row`, unless that is null, and `has_row` becomes true if it did.
  StepChunk(const StepArrays& arrays, const Scalars& scalars, double gradient_scale, const StepPenalty& penalty,
            const RoundingKey& rounding, double* new_row, bool& has_row)
      : arrays_(arrays),
        scalars_(scalars),
        gradient_scale_(gradient_scale),
        penalty_(penalty),
        rounding_(rounding),
        new_row_(new_row),
        has_row_(has_row) {}

  int64_t size() const { return arrays_.size; }
  StepChunk<Rule, Penalty, double> in_float64() const {
    return StepChunk<Rule, Penalty, double>(arrays_, scalars_, gradient_scale_, penalty_, rounding_, nullptr, has_row_);
  }
  StepChunk<Rule, Penalty, double> widened() const { return in_float64(); }

  template <template <class> class Slope, class... Arguments>
  void apply(const Arguments&... arguments) const {
    using Step = VectorStep<Rule, Slope<Vector>, Vector>;
    const int states = Rule::states(scalars_);
    const Step step{Slope<Vector>(arguments...), typename Rule::template Update<Vector>(scalars_),
                    broadcast<Vector>(gradient_scale_), states, penalty_.is_decoupled};
    typename Step::Blocks blocks(arrays_, states, rounding_);
    if constexpr (std::is_same_v<T, float> && !std::is_same_v<Penalty, NoPenalty>) {
      // In registers are the weights as they are stored only where storing does not round them.
      if (new_row_ != nullptr && arrays_.weight_storage == kStorage) {
        int64_t stepped = 0;
        if (!step.is_usual() || blocks.is_needed()) {
          step.all(blocks, 0, size());
          stepped = size();
        }
        const SteppedChunk<Step> chunk(step, blocks, reinterpret_cast<float*>(arrays_.weight), size(), stepped);
        const typename Penalty::Row row = Penalty::reduce(chunk, penalty_.next_parameter);
        chunk.stored();
        __builtin_memcpy(new_row_, &row, sizeof(row));
        has_row_ = true;
        return;
      }
    }
    step.all(blocks, 0, size());
  }

 private:
  static constexpr Storage kStorage = sizeof(T) == sizeof(double) ? kFloat64 : kFloat32;

  const StepArrays& arrays_;
  const Scalars& scalars_;
  const double gradient_scale_;
  const StepPenalty& penalty_;
  const RoundingKey& rounding_;
  double* const new_row_;
  bool& has_row_;
};

// ---- the table -----------------------------------------------------------------------------------------------------

template <class Penalty>
struct ApplyPenalty {
  template <class Chunk>
  static void to(const Chunk& chunk, const StepPenalty& penalty) {
    if (!penalty.has_slope) return chunk.template apply<NoPenalty::Slope>();
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
bool step_chunk(const StepArrays& arrays, const typename Rule::Scalars& scalars, double gradient_scale,
                const StepPenalty& penalty, const RoundingKey& rounding, double* new_row) {
  bool has_row = false;
  if (arrays.weight_storage == kFloat64) {
    const StepChunk<Rule, Penalty, double> chunk(arrays, scalars, gradient_scale, penalty, rounding, nullptr, has_row);
    ApplyPenalty<Penalty>::to(chunk, penalty);
  } else {
    const StepChunk<Rule, Penalty, float> chunk(arrays, scalars, gradient_scale, penalty, rounding, new_row, has_row);
    ApplyPenalty<Penalty>::to(chunk, penalty);
  }
  return has_row;
}

template <class Penalty>
constexpr StepKernels step_kernels() {
  return {step_chunk<AdamW, Penalty>, step_chunk<Sgd, Penalty>};
}

template <class... Of>
constexpr StepTable step_table(PenaltyList<Of...>) {
  return {{step_kernels<Of>()..., step_kernels<NoPenalty>()}};
}

extern const StepTable kSteps;
constexpr StepTable kSteps = step_table(Penalties());

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
