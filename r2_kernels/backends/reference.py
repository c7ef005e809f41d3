"""The operators in plain PyTorch, one tensor after the other in float64: for any device, and where nothing is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def adamw_step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_coefficient: Tensor | None,
    rounding_seed: int | None,
    penalty: str | None,
    parameter: Tensor | None,
    next_parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
    is_decoupled: bool,
) -> None:
    if found_inf is not None and found_inf.item() != 0:
        return
    rate = lr.to(torch.float64)
    pulls = _pulls(penalty, weights, parameter, statistics, coefficients)
    scale = _gradient_scale(grad_scale, clip_coefficient)
    round_to = _rounding(rounding_seed, weights[0].device)
    for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        w, g = _with_pull(weight, gradient, scale, pulls[index], rate, maximize, is_decoupled)
        steps[index].add_(1)
        first = exp_avgs[index].to(torch.float64) * beta1 + (1 - beta1) * g
        second = exp_avg_sqs[index].to(torch.float64) * beta2 + (1 - beta2) * g**2
        round_to(exp_avgs[index], first)
        round_to(exp_avg_sqs[index], second)
        if max_exp_avg_sqs:
            second = torch.maximum(max_exp_avg_sqs[index].to(torch.float64), second)
            round_to(max_exp_avg_sqs[index], second)
        count = steps[index].to(torch.float64)
        denominator = (second / (1 - beta2**count)).sqrt() + eps
        round_to(weight, w * (1 - rate * weight_decay) - rate / (1 - beta1**count) * first / denominator)
    _regather(penalty, weights, next_parameter, statistics, partials)


def sgd_step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    started: Sequence[int],
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_coefficient: Tensor | None,
    rounding_seed: int | None,
    penalty: str | None,
    parameter: Tensor | None,
    next_parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
    is_decoupled: bool,
) -> None:
    if found_inf is not None and found_inf.item() != 0:
        return
    rate = lr.to(torch.float64)
    pulls = _pulls(penalty, weights, parameter, statistics, coefficients)
    scale = _gradient_scale(grad_scale, clip_coefficient)
    round_to = _rounding(rounding_seed, weights[0].device)
    for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        w, g = _with_pull(weight, gradient, scale, pulls[index], rate, maximize, is_decoupled)
        g = g + weight_decay * w
        if momentum != 0:
            buffer = momentum_buffers[index].to(torch.float64)
            buffer = momentum * buffer + (1 - dampening) * g if started[index] else g
            round_to(momentum_buffers[index], buffer)
            g = g + momentum * buffer if nesterov else buffer
        round_to(weight, w - rate * g)
    _regather(penalty, weights, next_parameter, statistics, partials)


def _pulls(
    penalty: str | None, weights: Sequence[Tensor], parameter: Tensor | None, statistics: Tensor, coefficients: Tensor
) -> list[Tensor | None]:
    """The penalty's gradient at each weight, in float64; None for the weights that are not watched."""
    if penalty is None:
        return [None] * len(weights)
    watched = [weight.detach().to(torch.float64) for weight in weights[: len(statistics)]]
    rows = zip(watched, statistics, _scalars(watched, parameter), coefficients.to(torch.float64), strict=True)
    slopes = [coefficient * by_name(penalty).gradient(w, row, scalar) for w, row, scalar, coefficient in rows]
    return [*slopes, *[None] * (len(weights) - len(watched))]


def _gradient_scale(grad_scale: Tensor | None, clip_coefficient: Tensor | None) -> Tensor | float:
    scale: Tensor | float = 1.0 if clip_coefficient is None else clip_coefficient.to(torch.float64)
    return scale if grad_scale is None else scale / grad_scale.to(torch.float64)


def _with_pull(
    weight: Tensor,
    gradient: Tensor,
    scale: Tensor | float,
    pull: Tensor | None,
    rate: Tensor,
    maximize: bool,
    is_decoupled: bool,
) -> tuple[Tensor, Tensor]:
    """The weight and the gradient as the update rule sees them, in float64."""
    w, g = weight.detach().to(torch.float64), gradient.to(torch.float64) * scale
    if pull is not None and is_decoupled:
        return w - rate * pull, -g if maximize else g
    g = g if pull is None else g + pull
    return w, -g if maximize else g


def _rounding(seed: int | None, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """What stores float64 in a tensor: rounded to nearest, or with a seed bfloat16 stochastically."""
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def store(to: Tensor, exact: Tensor) -> None:
        if generator is None or to.dtype is not torch.bfloat16:
            to.copy_(exact)
            return
        bits = exact.to(torch.float32).view(torch.int32)
        noise = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=device)
        rounded = ((bits + noise) & ~0xFFFF).view(torch.float32)
        to.copy_(torch.where(exact.isfinite(), rounded, exact.to(torch.float32)))

    return store


def _regather(
    penalty: str | None,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
) -> None:
    if penalty is not None:
        _, _, new_statistics, new_partials = reduce(penalty, weights[: len(statistics)], parameter)
        statistics.copy_(new_statistics)
        partials.copy_(new_partials)


def _scalars(weights: Sequence[Tensor], parameter: Tensor | None) -> Tensor:
    if parameter is None:
        return torch.zeros(len(weights), dtype=torch.float64, device=weights[0].device)
    return parameter.detach().to(torch.float64)


def _chunk_maxima(rule: Penalty, weights: Sequence[Tensor]) -> Tensor:
    chunks = [chunk for weight in weights for chunk in weight.split(CHUNK_SIZE) if rule.is_sparse and len(chunk)]
    maxima = [chunk.abs().amax() for chunk in chunks]
    return torch.stack(maxima) if maxima else torch.empty(0, dtype=torch.float64, device=weights[0].device)
