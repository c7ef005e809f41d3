"""What a penalty should give, by float64 autograd of ``r2_kernels.reference``: the judge of every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import r2_kernels
from r2_kernels import reference

PENALTIES = ("linf", "margin", "soft_min_max", "kurtosis")
PARAMETERS = {"linf": None, "margin": "margin", "soft_min_max": "temperature", "kurtosis": None}


# Rounding of float64 itself in what follows; it matters where the exact result is zero.
NOISE = 1e-14


class Expected(NamedTuple):
    """All float64 on the CPU: values (N,), gradients like the weights, parameter_gradient (N,) or None.

    The scales are what rounding is relative to: the value itself, or where signs let the terms of a sum cancel, the sum
    of their magnitudes. For soft-min-max these are the soft range and exp(-a), the variances and exp(-a). The noises
    are float64's own in the sum of a weight's gradients.
    """

    values: Tensor
    gradients: list[Tensor]
    parameter_gradient: Tensor | None
    value_scales: Tensor
    parameter_scales: Tensor | None
    noises: list[float]


def call(penalty: str, weights: Sequence[Tensor], parameter: Tensor | None = None) -> Tensor:
    """The public function of that name, whatever its number of arguments."""
    function = getattr(r2_kernels, penalty)
    return function(weights) if parameter is None else function(weights, parameter)


def call_reference(penalty: str, weights: Sequence[Tensor], parameter: Tensor | None = None) -> Tensor:
    function = getattr(reference, penalty)
    return function(weights) if parameter is None else function(weights, parameter)


def expected(
    penalty: str, weights: Sequence[Tensor], parameter: Tensor | None, coefficients: Tensor | None = None
) -> Expected:
    """Values and gradients of ``(coefficients * values).sum()`` of the same stored numbers, in float64."""
    doubles = [weight.detach().cpu().double().clone() for weight in weights]
    if penalty in ("soft_min_max", "kurtosis"):
        doubles = [_centered(double) for double in doubles]
    for double in doubles:
        double.requires_grad_()
    scalars = None if parameter is None else parameter.detach().cpu().double().clone().requires_grad_()
    values = call_reference(penalty, doubles, scalars)
    upstream = torch.ones_like(values) if coefficients is None else coefficients.detach().cpu().double()
    inputs = doubles if scalars is None else [*doubles, scalars]
    gradients = list(torch.autograd.grad(values, inputs, upstream))
    parameter_gradient = None if scalars is None else gradients.pop()
    values = values.detach()
    noises = [NOISE] * len(weights)
    if penalty == "kurtosis":
        excess = values.sqrt()  # K is at most 1.8 and this; the terms of a gradient are K and its powers over std(w).
        deviations = torch.stack([double.detach().std(correction=0) for double in doubles])
        noises = (NOISE * (2.8 + excess) ** 2 / deviations).nan_to_num(NOISE, NOISE, NOISE).tolist()
        return Expected(values, gradients, None, values + 1.8 * excess, None, noises)
    if penalty != "soft_min_max":
        scales = None if parameter_gradient is None else parameter_gradient.abs()
        return Expected(values, gradients, parameter_gradient, values.abs(), scales, noises)
    aging = torch.exp(-scalars.detach())
    variances = parameter_gradient + upstream * aging
    extents = torch.stack([double.detach().amax() - double.detach().amin() for double in doubles])
    noise = torch.where(extents.isfinite(), NOISE * extents.square() / 1e-5, 0)
    scales = variances.abs() + (upstream * aging).abs() + noise
    return Expected(values, gradients, parameter_gradient, (values - aging).abs() + aging, scales, noises)


def _centered(weight: Tensor) -> Tensor:
    """What does not depend on where zero is: far from there, float64 itself would be the less exact one."""
    middle = (weight.amax() / 2 + weight.amin() / 2) if weight.numel() else weight.new_zeros(())
    return weight - torch.where(middle.isfinite(), middle, 0)


def default_parameter(penalty: str, weights: Sequence[Tensor]) -> Tensor | None:
    """An M or a temperature that puts every part of the formula to work: some weights outside M, a soft softmax."""
    if PARAMETERS[penalty] is None:
        return None
    scale = torch.stack([weight.detach().double().abs().mean() for weight in weights])
    scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    parameter = 1.3 * scale if penalty == "margin" else 1.1 / scale
    return parameter.float()
