"""The specification: the three penalties in plain PyTorch, differentiable by autograd alone.

Every other implementation is tested against these functions, run in float64. They are written to be read, not to be
fast: one tensor after the other, each formula as the paper states it (arXiv 2303.08253, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from r2_kernels.validation import check_parameter, check_weights, value_dtype


def linf(weights: Sequence[Tensor]) -> Tensor:
    """``max|w|`` of each weight; tied entries share the gradient evenly.

    Takes N floating-point tensors of any shapes and returns shape (N,): float32, or float64 where a weight is float64.
    """
    check_weights(weights)
    return _each(weights, None, lambda w, _: w.abs().amax())


def margin(weights: Sequence[Tensor], margin: Tensor) -> Tensor:
    """``|M| + sum(max(|w| - |M|, 0))`` of each weight, with M of shape (N,); returns shape (N,)."""
    check_weights(weights)
    check_parameter(margin, "margin", weights)
    return _each(weights, margin, lambda w, m: m.abs() + torch.relu(w.abs() - m.abs()).sum())


def soft_min_max(weights: Sequence[Tensor], temperature: Tensor) -> Tensor:
    """``s_max - s_min + exp(-a)`` of each weight, with the temperature a of shape (N,); returns shape (N,).

    ``s_max`` is the mean of w under softmax(a·w) and ``s_min`` the mean of w under softmax(-a·w).
    """
    check_weights(weights)
    check_parameter(temperature, "temperature", weights)
    return _each(weights, temperature, _soft_range)


def _soft_range(weight: Tensor, temperature: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    soft_maximum = (torch.softmax(temperature * flat, 0) * flat).sum()
    soft_minimum = (torch.softmax(-temperature * flat, 0) * flat).sum()
    return soft_maximum - soft_minimum + torch.exp(-temperature)


def _each(weights: Sequence[Tensor], parameter: Tensor | None, penalty: Callable[[Tensor, Any], Tensor]) -> Tensor:
    dtype = value_dtype(weights)
    scalars = [None] * len(weights) if parameter is None else parameter.to(dtype).unbind()
    return torch.stack([penalty(w.to(dtype), scalar) for w, scalar in zip(weights, scalars, strict=True)])
