"""The operators of the optimizers: one pass that steps all tensors of a list, the penalty's gradient on its way in.

The arguments that both share, beside those of ``torch.optim``'s of the same names:

    weights         N floating-point tensors on one device, dense, updated in place; the first W of them are watched
    gradients       N tensors of the weights' shapes and strides, of any floating-point dtype, as are the states
    lr              one number, float32 or float64, on the weights' device
    grad_scale      what the gradients are divided by, one number, float32; None for 1
    found_inf       nothing happens where this number is not zero
    clip_coefficient  what the gradients are multiplied with, without the penalty's
    rounding_seed   bfloat16 weights and states are rounded stochastically, by this seed; None: to nearest
    penalty         a name in ``penalties.PENALTIES``, or None where W is 0
    parameter       M or the temperature that the statistics were gathered with, (W,); None where there is none
    next_parameter  the same for the statistics to gather, those of the new weights
    statistics      (W, S) float64, of the watched weights as ``reduce`` gives it; replaced by those of the new weights
    partials        their partials as ``reduce`` gives them, replaced likewise
    coefficients    (W,): what each penalty's gradient is multiplied with before it joins the weight's
    is_decoupled    it does not join: the weight first takes a step of lr times it, the optimizer's step follows
"""

from __future__ import annotations

from r2_kernels import ops

_SHARED = (
    "Tensor? grad_scale, Tensor? found_inf, Tensor? clip_coefficient, int? rounding_seed, "
    "str? penalty, Tensor? parameter, Tensor? next_parameter, Tensor(y!) statistics, Tensor(z!) partials, "
    "Tensor coefficients, bool is_decoupled"
)
SCHEMAS = {
    # `max_exp_avg_sqs` is empty without AMSGrad; `steps`, N tensors of one number, count up
    "adamw_step_": "(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor lr, float beta1, float beta2, float eps, "
    f"float weight_decay, bool maximize, {_SHARED}) -> ()",
    # `momentum_buffers` and `started` are empty without momentum; a buffer that has not started becomes the gradient
    "sgd_step_": "(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] momentum_buffers, int[] started, Tensor lr, "
    f"float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, {_SHARED}) -> ()",
}

ops.define(SCHEMAS)


def _nothing(*arguments: object) -> None:
    """They only mutate: there is no result to fake."""


for _name in SCHEMAS:
    ops.fake(_name)(_nothing)
