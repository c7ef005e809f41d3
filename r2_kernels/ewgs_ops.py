"""The operators of the EWGS quantizer: one elementwise pass forward, and one backward that also adds up the ends.

values      a floating-point tensor of any shape; dense layouts are read in place, others are copied
ends        (4,) float32 or float64: the bounds of the values, lower and upper, and the outputs of the first level,
            which values at the lower bound get, and of the last
levels      how many there are, 2 to 65,536
gradient    with respect to the outputs, of the values' shape and dtype
delta       how much a gradient is scaled by the error of rounding
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r2_kernels import backends, ops
from r2_kernels.layout import empty_dense_like

SCHEMAS = {
    "ewgs_forward": "(Tensor values, Tensor ends, int levels) -> Tensor",
    # the gradients with respect to the values, and to the ends, (4,) float64
    "ewgs_backward": "(Tensor values, Tensor ends, Tensor gradient, int levels, float delta) -> (Tensor, Tensor)",
}

ops.define(SCHEMAS)


@ops.fake("ewgs_forward")
def _(values: Tensor, ends: Tensor, levels: int) -> Tensor:
    return empty_dense_like(values)


@ops.fake("ewgs_backward")
def _(values: Tensor, ends: Tensor, gradient: Tensor, levels: int, delta: float) -> tuple[Tensor, Tensor]:
    return empty_dense_like(values), values.new_empty(4, dtype=torch.float64)


class EwgsFunction(torch.autograd.Function):
    """The outputs; for backward it keeps the values, and nothing beside them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ends: Tensor, levels: int, delta: float) -> Tensor:
        ctx.backend, ctx.levels, ctx.delta = backends.requested(), levels, delta
        ctx.save_for_backward(values, ends)
        return ops.kernel_of(ctx.backend, "ewgs_forward", values.device)(values, ends, levels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, ends = ctx.saved_tensors
        backward = ops.kernel_of(ctx.backend, "ewgs_backward", values.device)
        of_values, of_ends = backward(values, ends, gradient, ctx.levels, ctx.delta)
        return of_values, of_ends.to(ends.dtype), None, None
