"""The specification: the penalties and DKM in plain PyTorch, differentiable by autograd alone.

Every other implementation is tested against these functions, run in float64. They are written to be read, not to be
fast: one tensor after the other, each formula as its paper states it (arXiv 2303.08253, section 3, and for kurtosis
arXiv 2002.07686).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from r2_kernels.attention import Attention, is_settled
from r2_kernels.granularity import Granularity, group_size_of, segments
from r2_kernels.penalties import UNIFORM_KURTOSIS
from r2_kernels.validation import check_parameter, check_weights, value_dtype


def linf(weights: Sequence[Tensor], *, granularity: Granularity = "tensor") -> Tensor:
    """``max|w|`` of each segment; tied entries share the gradient evenly.

    Takes N floating-point tensors of any shapes and returns one value per segment, of which each weight has one unless
    ``granularity`` says otherwise (``granularity.py``): float32, or float64 where a weight is float64.
    """
    check_weights(weights)
    return _each(weights, None, granularity, lambda w, _: w.abs().amax())


def margin(weights: Sequence[Tensor], margin: Tensor, *, granularity: Granularity = "tensor") -> Tensor:
    """``|M| + sum(max(|w| - |M|, 0))`` of each segment, with one M per segment, or per weight for all its segments."""
    check_weights(weights)
    check_parameter(margin, "margin", weights, granularity)
    return _each(weights, margin, granularity, lambda w, m: m.abs() + torch.relu(w.abs() - m.abs()).sum())


def soft_min_max(weights: Sequence[Tensor], temperature: Tensor, *, granularity: Granularity = "tensor") -> Tensor:
    """``s_max - s_min + exp(-a)`` of each segment, with one temperature a per segment, or per weight for all of its.

    ``s_max`` is the mean of w under softmax(a·w) and ``s_min`` the mean of w under softmax(-a·w).
    """
    check_weights(weights)
    check_parameter(temperature, "temperature", weights, granularity)
    return _each(weights, temperature, granularity, _soft_range)


def kurtosis(weights: Sequence[Tensor], *, granularity: Granularity = "tensor") -> Tensor:
    """``(K - 1.8)^2`` of each segment, K its kurtosis, ``mean(((w - mean(w)) / std(w))^4)``; 0 where it is constant."""
    check_weights(weights)
    return _each(weights, None, granularity, _squared_excess)


def _squared_excess(weight: Tensor, _: None) -> Tensor:
    is_constant = weight.amax() - weight.amin() == 0
    centered = weight - weight.mean()
    variance = torch.where(is_constant, 1, centered.square().mean())
    return torch.where(is_constant, 0, ((centered / variance.sqrt()).pow(4).mean() - UNIFORM_KURTOSIS).square())


def dkm(weight: Tensor, centroids: Tensor, temperature: float = 1e-4, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """DKM with the whole attention matrix; of ``r2_kernels.dkm`` all but the checks and the separation of centroids."""
    entries = weight.reshape(-1).to(value_dtype([weight]))
    inertia: float | None = None
    for _ in range(iterations):
        attention = Attention(entries, centroids, temperature)
        centroids = entries @ attention.raised / attention.raised.sum(0)
        before, inertia = inertia, attention.least.sum().item()
        if is_settled(before, inertia):
            break
    return (attention.raised @ centroids).reshape(weight.shape).to(weight.dtype), centroids.detach()


def _soft_range(weight: Tensor, temperature: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    soft_maximum = (torch.softmax(temperature * flat, 0) * flat).sum()
    soft_minimum = (torch.softmax(-temperature * flat, 0) * flat).sum()
    return soft_maximum - soft_minimum + torch.exp(-temperature)


def _each(
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    granularity: Granularity,
    penalty: Callable[[Tensor, Any], Tensor],
) -> Tensor:
    dtype = value_dtype(weights)
    segments_of_weights = [segments(weight.to(dtype), group_size_of(granularity)) for weight in weights]
    flat = [segment for of_weight in segments_of_weights for segment in of_weight]
    scalars: Sequence[Any] = [None] * len(flat)
    if parameter is not None:
        scalars = parameter.to(dtype).unbind()
        if len(scalars) != len(flat):
            shared = zip(scalars, segments_of_weights, strict=True)
            scalars = [scalar for scalar, of_weight in shared for _ in of_weight]
    return torch.stack([penalty(segment, scalar) for segment, scalar in zip(flat, scalars, strict=True)])
