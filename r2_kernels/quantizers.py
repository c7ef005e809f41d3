"""Quantizers that learn their bounds while a network is trained: one fused pass forward and one backward.

Source: Lee, Kim and Ham, "Network Quantization with Element-wise Gradient Scaling" (EWGS), arXiv 2104.00903;
``docs/derivation.md`` derives the gradients of the ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2_kernels import ewgs_ops
from r2_kernels.validation import FLOATING_DTYPES

MOST_LEVELS = 65_536


def ewgs(
    values: Tensor, lower: Tensor, upper: Tensor, first: Tensor, last: Tensor, levels: int, delta: float = 1e-3
) -> Tensor:
    """Values between two bounds to the nearest of evenly spaced levels, with scaled gradients.

    With x = (values - lower) / (upper - lower), cut off at 0 and 1, and x_q the nearest of ``levels`` between 0 and 1
    (ties go to the even one), the output is ``first + x_q·(last - first)``. Backward, the gradient g of x_q becomes
    ``g·(1 + delta·sign(g)·(x - x_q))`` for x; values beyond the bounds have none, and
    give none to the bounds. Whatever the dtype, x is computed in float32, or in float64 where the values are float64.
    Gradients are first-order only.

    Args:
        values: any shape, of dtype float32, bfloat16, float16 or float64; no levels for a NaN, which stays.
        lower, upper: the bounds, scalars on the values' device, differentiable, in units of the values. Where they are
            equal, the bounds' gradients are NaN.
        first, last: the outputs of the first and the last level, scalars, differentiable: minus and plus a learnable
            scale for weights, ``lower`` and ``upper`` themselves for activations, zero and one for plain levels.
        levels: 2 to 65,536.
        delta: of EWGS; zero is the straight-through estimator.

    Returns:
        The outputs, of the values' shape and dtype.

    Raises:
        TypeError: not a dense floating-point tensor, or no integer.
        ValueError: another shape or device, or a number of levels that there cannot be.
    """
    _check_values(values)
    for name, end in (("lower", lower), ("upper", upper), ("first", first), ("last", last)):
        _check_end(end, name, values.device)
    if not isinstance(levels, int) or isinstance(levels, bool):
        raise TypeError(f"levels: expected an integer, got {type(levels).__name__}")
    if not 2 <= levels <= MOST_LEVELS:
        raise ValueError(f"levels: expected 2 to {MOST_LEVELS:,}, got {levels}")
    wide = torch.float64 if values.dtype is torch.float64 else torch.float32
    ends = torch.stack([end.to(wide).reshape(()) for end in (lower, upper, first, last)])
    return ewgs_ops.EwgsFunction.apply(values, ends, levels, float(delta))


def _check_values(values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"values: expected a tensor, got {type(values).__name__}")
    if values.layout is not torch.strided or values.dtype not in FLOATING_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)
        raise TypeError(f"values: expected a dense tensor of dtype {expected}, got {values.dtype}, {values.layout}")


def _check_end(end: Tensor, name: str, device: torch.device) -> None:
    if not isinstance(end, Tensor):
        raise TypeError(f"{name}: expected a tensor of one number, got {type(end).__name__}")
    if end.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name}: expected a floating-point tensor, got {end.dtype}")
    if end.numel() != 1:
        raise ValueError(f"{name}: expected one number, got shape {tuple(end.shape)}")
    if end.device != device:
        raise ValueError(f"{name}: expected device {device} of the values, got {end.device}")
