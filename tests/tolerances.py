"""The one table of tolerances, and the comparisons that use it.

Values and gradients are judged against float64 arithmetic on the same stored numbers. A value may be off by a share of
itself, a gradient by a share of the largest gradient of its layer, and by the rounding of the dtype it is stored in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from oracle import NOISE, Expected
from torch import Tensor


class Tolerance(NamedTuple):
    value: float  # relative to the value
    gradient: float  # relative to the largest gradient of the layer
    storage: float  # relative to the stored number: half a unit in the last place of the dtype
    smallest: float  # half of the smallest subnormal


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-9, 2**-53, 0.0),
    torch.float32: Tolerance(1e-6, 1e-5, 2**-24, 2**-150),
    torch.bfloat16: Tolerance(1e-6, 1e-5, 2**-8, 2**-134),
    torch.float16: Tolerance(1e-6, 1e-5, 2**-11, 2**-25),
}


def assert_values(actual: Tensor, expected: Tensor, weights: Sequence[Tensor], scales: Tensor | None = None) -> None:
    """Each value to its weight's tolerance; ``scales`` are what it is relative to where the value itself cancels."""
    dtype = torch.float64 if any(weight.dtype is torch.float64 for weight in weights) else torch.float32
    assert actual.dtype is dtype
    assert actual.shape == (len(weights),)
    share = torch.tensor([TOLERANCES[weight.dtype].value for weight in weights], dtype=torch.float64)
    scales = expected.abs() if scales is None else scales
    _assert_within(actual, expected, share * scales + TOLERANCES[dtype].smallest, "value")


def assert_gradient(
    actual: Tensor,
    expected: Tensor,
    *,
    before: Tensor | None = None,
    index: int = 0,
    coefficient: float = 1.0,
    noise: float = NOISE,
) -> None:
    """A weight's gradient, or what became of ``before`` when it was added."""
    tolerance = TOLERANCES[actual.dtype]
    assert actual.shape == expected.shape, f"gradient {index}: shape {tuple(actual.shape)}"
    if expected.numel() == 0:
        return
    finite = expected[expected.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    noise = noise * abs(coefficient) / expected.numel()
    total = expected if before is None else expected + before.detach().cpu().double()
    allowed = tolerance.gradient * largest + tolerance.storage * total.abs() + tolerance.smallest + noise
    _assert_within(actual, total, allowed, f"gradient {index}")


def assert_parameter_gradient(actual: Tensor, expected: Tensor, scales: Tensor | None = None) -> None:
    """The gradient of M or the temperature, relative to itself, or to ``scales`` where it is a difference."""
    tolerance = TOLERANCES[actual.dtype]
    scales = expected.abs() if scales is None else scales
    allowed = tolerance.gradient * scales + tolerance.storage * expected.abs() + tolerance.smallest
    _assert_within(actual, expected, allowed, "parameter gradient")


def assert_all(
    values: Tensor, weights: Sequence[Tensor], parameter: Tensor | None, expected: Expected, coefficients: Tensor
) -> None:
    """Values, the weights' ``.grad`` and the parameter's, after ``backward`` with ``coefficients``."""
    assert_values(values.detach(), expected.values, weights, expected.value_scales)
    for index, (weight, gradient) in enumerate(zip(weights, expected.gradients, strict=True)):
        assert weight.grad is not None, f"gradient {index} is missing"
        assert weight.grad.dtype is weight.dtype
        coefficient, noise = coefficients[index].item(), expected.noises[index]
        assert_gradient(weight.grad, gradient, index=index, coefficient=coefficient, noise=noise)
    if parameter is not None:
        assert parameter.grad is not None
        assert_parameter_gradient(parameter.grad, expected.parameter_gradient, expected.parameter_scales)


def _assert_within(actual: Tensor, expected: Tensor, allowed: Tensor | float, what: str) -> None:
    overflow = torch.finfo(actual.dtype).max
    expected = torch.where(expected.abs() > overflow, expected.sign() * torch.inf, expected)
    stored = actual.detach().cpu().double()
    allowed = torch.as_tensor(allowed, dtype=torch.float64).expand(expected.shape)
    is_right = torch.where(
        expected.isfinite(),
        (stored - expected).abs() <= allowed,
        (stored == expected) | (stored.isnan() & expected.isnan()),
    )
    if bool(is_right.all()):
        return
    wrong = (~is_right).nonzero()
    first = tuple(wrong[0].tolist())
    raise AssertionError(
        f"{what}: {len(wrong)} of {expected.numel()} wrong, first at {first}: got {stored[first].item():.17g}, "
        f"expected {expected[first].item():.17g} ± {allowed[first].item():.3g}"
    )
