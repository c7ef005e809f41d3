"""The operators in plain PyTorch, one tensor after the other in float64: for any device, and where nothing is built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r2_kernels.penalties import CHUNK_SIZE, Penalty, by_name
from r2_kernels.validation import value_dtype

DEVICE_TYPES: tuple[str, ...] = ()  # any


def why_unavailable() -> str | None:
    return None


def reduce(penalty: str, weights: Sequence[Tensor], parameter: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule = by_name(penalty)
    scalars = _scalars(weights, parameter)
    flat = [weight.detach().reshape(-1).to(torch.float64) for weight in weights]
    statistics = torch.stack([rule.reduce(weight, scalar) for weight, scalar in zip(flat, scalars, strict=True)])
    values, parameter_gradients = rule.finalize(statistics, scalars)
    dtype = value_dtype(weights)
    return values.to(dtype), parameter_gradients.to(dtype), statistics, _chunk_maxima(rule, flat)


def finalize(penalty: str, statistics: Tensor, parameter: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scalars = statistics.new_zeros(len(statistics)) if parameter is None else parameter.to(torch.float64)
    values, parameter_gradients = by_name(penalty).finalize(statistics, scalars)
    return values.to(dtype, copy=True), parameter_gradients.to(dtype)


def apply(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
) -> list[Tensor]:
    gradients = [torch.zeros_like(weight) for weight in weights]
    apply_(penalty, weights, parameter, statistics, partials, coefficients, gradients)
    return gradients


def apply_(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
) -> None:
    rule = by_name(penalty)
    rows = zip(
        weights, statistics, _scalars(weights, parameter), coefficients.to(torch.float64), gradients, strict=True
    )
    for weight, row, scalar, coefficient, gradient in rows:
        slope = rule.gradient(weight.detach().to(torch.float64), row, scalar)
        gradient.copy_(gradient.to(torch.float64) + coefficient * slope)


def reduce_apply_(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    values, parameter_gradients, statistics, partials = reduce(penalty, weights, parameter)
    apply_(penalty, weights, parameter, statistics, partials, coefficients, gradients)
    return values, parameter_gradients


def _scalars(weights: Sequence[Tensor], parameter: Tensor | None) -> Tensor:
    if parameter is None:
        return torch.zeros(len(weights), dtype=torch.float64, device=weights[0].device)
    return parameter.detach().to(torch.float64)


def _chunk_maxima(rule: Penalty, weights: Sequence[Tensor]) -> Tensor:
    chunks = [chunk for weight in weights for chunk in weight.split(CHUNK_SIZE) if rule.is_sparse and len(chunk)]
    maxima = [chunk.abs().amax() for chunk in chunks]
    return torch.stack(maxima) if maxima else torch.empty(0, dtype=torch.float64, device=weights[0].device)
