// The update rules of the optimizers: what becomes of an entry, its gradient and its moments.
//
// Written once for all C++ backends. A rule is a struct of
//
//   Scalars    what is the same for all entries of a tensor, in float64
//   kStates    how many numbers it keeps for each entry, and how many of them these scalars use: states()
//   Update<V>  the new entry from the old one and its gradient; the states are updated in place. specialize() makes
//              constants of the flags where is_usual() says that they are so: with kUsualStates, the common case
//
// V is a vector of float or double, as in penalties.h, which says why constructors are written out.
#pragma once

#include "penalties.h"

namespace r2 {

struct AdamWScalars {
  double decay;  // 1 - learning rate · weight decay
  double beta1, beta2, eps;
  double step_size;     // learning rate / (1 - beta1^step)
  double inverse_root;  // 1 / sqrt(1 - beta2^step)
  bool is_amsgrad;
};

struct SgdScalars {
  double learning_rate, weight_decay, momentum;
  double share;  // of the gradient in the momentum: 1 - dampening, or 1 where the momentum starts
  bool is_nesterov;
};

inline namespace R2_INSTRUCTION_SET {

// Adam with decoupled weight decay: arXiv 1711.05101, AMSGrad: arXiv 1904.09237. States: exp_avg, exp_avg_sq and
// max_exp_avg_sq.
struct AdamW {
  using Scalars = AdamWScalars;
  static constexpr int kStates = 3, kUsualStates = 2;
  static int states(const Scalars& scalars) { return scalars.is_amsgrad ? 3 : 2; }

  template <class V>
  struct Update {
    V decay, share1, beta2, share2, eps, step_size, inverse_root;
    bool is_amsgrad;

    R2_INLINE explicit Update(const Scalars& scalars)
        : decay(broadcast<V>(scalars.decay)),
          share1(broadcast<V>(1 - scalars.beta1)),
          beta2(broadcast<V>(scalars.beta2)),
          share2(broadcast<V>(1 - scalars.beta2)),
          eps(broadcast<V>(scalars.eps)),
          step_size(broadcast<V>(scalars.step_size)),
          inverse_root(broadcast<V>(scalars.inverse_root)),
          is_amsgrad(scalars.is_amsgrad) {}

    bool is_usual() const { return !is_amsgrad; }
    R2_INLINE void specialize() { is_amsgrad = false; }

    R2_INLINE V operator()(V w, V gradient, V (&states)[kStates]) const {
      states[0] = states[0] + share1 * (gradient - states[0]);
      states[1] = beta2 * states[1] + share2 * (gradient * gradient);
      V second = states[1];
      if (is_amsgrad) {
        second = select(states[2] > second, states[2], second);  // asked this way round, a NaN of the gradient stays
        states[2] = second;
      }
      return decay * w - step_size * states[0] / (square_root(second) * inverse_root + eps);
    }
  };
};

// Gradient descent, with momentum as in Sutskever et al., ICML 2013, in the form that scales the momentum by the
// learning rate when it is applied. State: momentum_buffer.
struct Sgd {
  using Scalars = SgdScalars;
  static constexpr int kStates = 1, kUsualStates = 1;
  static int states(const Scalars& scalars) { return scalars.momentum != 0 ? 1 : 0; }

  template <class V>
  struct Update {
    V learning_rate, weight_decay, momentum, share;
    bool has_momentum, is_nesterov;

    R2_INLINE explicit Update(const Scalars& scalars)
        : learning_rate(broadcast<V>(scalars.learning_rate)),
          weight_decay(broadcast<V>(scalars.weight_decay)),
          momentum(broadcast<V>(scalars.momentum)),
          share(broadcast<V>(scalars.share)),
          has_momentum(scalars.momentum != 0),
          is_nesterov(scalars.is_nesterov) {}

    bool is_usual() const { return has_momentum && !is_nesterov; }
    R2_INLINE void specialize() {
      has_momentum = true;
      is_nesterov = false;
    }

    R2_INLINE V operator()(V w, V gradient, V (&states)[kStates]) const {
      gradient = gradient + weight_decay * w;
      if (has_momentum) {
        states[0] = momentum * states[0] + share * gradient;
        gradient = is_nesterov ? gradient + momentum * states[0] : states[0];
      }
      return w - learning_rate * gradient;
    }
  };
};

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
