"""The optimizers' update rules as Triton functions: what becomes of an entry, its gradient and its moments.

A rule is two functions that the step's kernel takes as compile-time arguments; it knows nothing of penalties, chunks or
addresses:

    prepare  constants of a tensor's update, once in float64, rounded to the precision of its entries: from the learning
             rate, the rule's settings (a tuple of six numbers in float64), which step of the tensor this is, and
             whether its states are yet to start
    update   the new entries and their new states, from the old ones and the gradient

``csrc/optimizers.h`` has the same rules for C++ and names their sources.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Rule(NamedTuple):
    """One rule's functions, by what they do."""

    prepare: triton.JITFunction
    update: triton.JITFunction


@triton.jit
def _square_root(x):
    """To a unit in the last place or so. ``tl.sqrt`` takes what is subnormal in float32 for zero, so scale that up."""
    if x.dtype == tl.float32:
        is_tiny = x < 2.0**-100
        root = tl.sqrt(tl.where(is_tiny, x * 2.0**64, x))
        root = tl.where(is_tiny, root * 2.0**-32, root)
    else:
        root = tl.sqrt(x)
    return root


# AdamW. Settings: beta1, beta2, their logarithms, eps, weight decay. States: exp_avg, exp_avg_sq, and with AMSGrad
# max_exp_avg_sq.


@triton.jit
def adamw_prepare(lr, settings, step, is_first, dtype: tl.constexpr):
    beta1, beta2, log_beta1, log_beta2, eps, weight_decay = settings
    correction1, correction2 = 1 - tl.exp(step * log_beta1), 1 - tl.exp(step * log_beta2)
    constants = ((1 - lr * weight_decay).to(dtype), (1 - beta1).to(dtype), beta2.to(dtype), (1 - beta2).to(dtype))
    return constants + (eps.to(dtype), (lr / correction1).to(dtype), (1 / tl.sqrt(correction2)).to(dtype))


@triton.jit
def adamw_update(w, gradient, states, constants, IS_NESTEROV: tl.constexpr):
    decay, share1, beta2, share2, eps, step_size, inverse_root = constants
    first = states[0] + share1 * (gradient - states[0])
    second = beta2 * states[1] + share2 * (gradient * gradient)
    updated = (first, second)
    if len(states) == 3:
        second = tl.where(states[2] > second, states[2], second)  # asked this way round, a NaN of the gradient stays
        updated = updated + (second,)
    return decay * w - step_size * first / (_square_root(second) * inverse_root + eps), updated


# Gradient descent. Settings: momentum, dampening, weight decay. State: momentum_buffer, or none without momentum.


@triton.jit
def sgd_prepare(lr, settings, step, is_first, dtype: tl.constexpr):
    momentum, dampening, weight_decay, _, _, _ = settings
    share = tl.where(is_first, 1.0, 1 - dampening)
    return lr.to(dtype), momentum.to(dtype), share.to(dtype), weight_decay.to(dtype), is_first


@triton.jit
def sgd_update(w, gradient, states, constants, IS_NESTEROV: tl.constexpr):
    lr, momentum, share, weight_decay, is_first = constants
    gradient += weight_decay * w
    updated = ()
    if len(states) == 1:
        buffer = momentum * tl.where(is_first, 0.0, states[0]) + share * gradient
        gradient = gradient + momentum * buffer if IS_NESTEROV else buffer
        updated = (buffer,)
    return w - lr * gradient, updated


RULES = {"adamw": Rule(adamw_prepare, adamw_update), "sgd": Rule(sgd_prepare, sgd_update)}
