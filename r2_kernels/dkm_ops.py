"""The operators of differentiable k-means: some passes over the weights, of which none holds more than K numbers each.

weight        a floating-point tensor of any shape, n entries; dense layouts are read in place, others are copied
centroids     (K,) float32 or float64: those to start from
history       (iterations + 1, K) float32, or float64 where the weight is: the centroids before each iteration and
              after the last; from an early stop on all rows are the same
totals        (iterations, K) float64: what the attention of all weights adds up to, by iteration; zero for those that
              did not take place
gradient      with respect to the outputs, of the weight's shape and dtype

``docs/palettization.md`` has the formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r2_kernels import backends, ops
from r2_kernels.layout import empty_dense_like
from r2_kernels.validation import value_dtype

SCHEMAS = {
    # outputs, of the weight's shape and dtype, history, totals
    "dkm_forward": "(Tensor weight, Tensor centroids, float temperature, int iterations) -> (Tensor, Tensor, Tensor)",
    "dkm_backward": "(Tensor weight, Tensor history, Tensor totals, Tensor gradient, float temperature) -> Tensor",
}

ops.define(SCHEMAS)


@ops.fake("dkm_forward")
def _(weight: Tensor, centroids: Tensor, temperature: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    count = centroids.shape[0]
    return (
        empty_dense_like(weight),
        weight.new_empty(iterations + 1, count, dtype=value_dtype([weight])),
        weight.new_empty(iterations, count, dtype=torch.float64),
    )


@ops.fake("dkm_backward")
def _(weight: Tensor, history: Tensor, totals: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    return empty_dense_like(weight)


class DkmFunction(torch.autograd.Function):
    """The outputs and the last centroids; for backward it keeps the weight and K numbers or two per iteration."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, centroids: Tensor, temperature: float, iterations: int
    ) -> tuple[Tensor, Tensor]:
        ctx.backend, ctx.temperature = backends.requested(), temperature
        forward = ops.kernel_of(ctx.backend, "dkm_forward", weight.device)
        outputs, history, totals = forward(weight, centroids, temperature, iterations)
        ctx.save_for_backward(weight, history, totals)
        last = history[-1].clone()
        ctx.mark_non_differentiable(last)
        return outputs, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None, None, None]:
        weight, history, totals = ctx.saved_tensors
        backward = ops.kernel_of(ctx.backend, "dkm_backward", weight.device)
        return backward(weight, history, totals, gradient, ctx.temperature), None, None, None
