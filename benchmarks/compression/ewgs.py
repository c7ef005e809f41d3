"""EWGS (Lee, Kim and Ham, arXiv 2104.00903): quantization whose backward scales each gradient by itself.

The straight-through estimator is the same with a factor of zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Round(torch.autograd.Function):
    """x on [0, 1] to the nearest of evenly spaced levels; backward g · (1 + delta · sign(g) · (x - x_q))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int, delta: float) -> Tensor:
        rounded = (x * (levels - 1)).round() / (levels - 1)
        ctx.save_for_backward(x - rounded)
        ctx.delta = delta
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (error,) = ctx.saved_tensors
        return gradient * (1 + ctx.delta * gradient.sign() * error), None, None


def ewgs(values: Tensor, lower: Tensor, upper: Tensor, levels: int, delta: float) -> Tensor:
    """Values between two bounds to the nearest of ``levels`` on [0, 1].

    Args:
        values: any shape.
        lower, upper: scalars that may learn; values beyond them are clipped, and their gradient goes to the bounds.
        levels: two or more.
        delta: how much a gradient is scaled by the error of rounding; zero is the straight-through estimator.
    """
    normalized = ((values - lower) / (upper - lower)).clamp(0, 1)
    return _Round.apply(normalized, levels, delta)
