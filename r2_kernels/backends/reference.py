"""The operators in plain PyTorch, one tensor after the other in float64: for any device, and where nothing is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from r2_kernels.backends.dkm_reference import dkm_backward as dkm_backward
from r2_kernels.backends.dkm_reference import dkm_forward as dkm_forward
from r2_kernels.granularity import PER_TENSOR, blocks, counts_of
from r2_kernels.layout import empty_dense_like
from r2_kernels.penalties import CHUNK_SIZE, Penalty, by_name
from r2_kernels.validation import value_dtype

DEVICE_TYPES: tuple[str, ...] = ()  # any

_Store = Callable[[Tensor, Tensor], None]


def why_unavailable() -> str | None:
    return None


def reduce(
    penalty: str, weights: Sequence[Tensor], parameter: Tensor | None, group_size: int = PER_TENSOR
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule = by_name(penalty)
    scalars = _scalars(weights, parameter, group_size)
    rows = [
        torch.cat(_mapped(rule.reduce, weight.detach().to(torch.float64), group_size, of_weight), 1).flatten(0, 1)
        for weight, of_weight in zip(weights, scalars, strict=True)
    ]
    statistics = torch.cat(rows)
    values, parameter_gradients = rule.finalize(statistics, torch.cat(scalars))
    dtype = value_dtype(weights)
    partials = _chunk_maxima(rule, weights, group_size)
    return values.to(dtype), parameter_gradients.to(dtype), statistics, partials


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
    group_size: int = PER_TENSOR,
) -> list[Tensor]:
    gradients = [torch.zeros_like(weight) for weight in weights]
    apply_(penalty, weights, parameter, statistics, partials, coefficients, gradients, group_size)
    return gradients


def apply_(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    group_size: int = PER_TENSOR,
) -> None:
    rule = by_name(penalty)
    counts = counts_of(weights, group_size)
    rows = zip(
        weights,
        statistics.split(counts),
        _scalars(weights, parameter, group_size),
        _by_weight(coefficients, counts),
        gradients,
        strict=True,
    )

    def slope(segment: Tensor, row: Tensor, scalar: Tensor, coefficient: Tensor) -> Tensor:
        return coefficient * rule.gradient(segment, row, scalar)

    for weight, *of_weight, gradient in rows:
        slopes = _mapped(slope, weight.detach().to(torch.float64), group_size, *of_weight)
        slopes = [block.flatten(1) for block in slopes]
        gradient.copy_(gradient.to(torch.float64) + torch.cat(slopes, 1).reshape(weight.shape))


def reduce_apply_(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    group_size: int = PER_TENSOR,
) -> tuple[Tensor, Tensor]:
    values, parameter_gradients, statistics, partials = reduce(penalty, weights, parameter, group_size)
    apply_(penalty, weights, parameter, statistics, partials, coefficients, gradients, group_size)
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
    *shared: Any,
) -> None:
    def update(index: int, w: Tensor, g: Tensor, rate: Tensor, store: _Store) -> Tensor:
        steps[index].add_(1)
        first = exp_avgs[index].to(torch.float64) * beta1 + (1 - beta1) * g
        second = exp_avg_sqs[index].to(torch.float64) * beta2 + (1 - beta2) * g**2
        store(exp_avgs[index], first)
        store(exp_avg_sqs[index], second)
        if max_exp_avg_sqs:
            second = torch.maximum(max_exp_avg_sqs[index].to(torch.float64), second)
            store(max_exp_avg_sqs[index], second)
        count = steps[index].to(torch.float64)
        denominator = (second / (1 - beta2**count)).sqrt() + eps
        return w * (1 - rate * weight_decay) - rate / (1 - beta1**count) * first / denominator

    _step(update, weights, gradients, lr, maximize, *shared)


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
    *shared: Any,
) -> None:
    def update(index: int, w: Tensor, g: Tensor, rate: Tensor, store: _Store) -> Tensor:
        g = g + weight_decay * w
        if momentum != 0:
            buffer = momentum_buffers[index].to(torch.float64)
            buffer = momentum * buffer + (1 - dampening) * g if started[index] else g
            store(momentum_buffers[index], buffer)
            g = g + momentum * buffer if nesterov else buffer
        return w - rate * g

    _step(update, weights, gradients, lr, maximize, *shared)


def _step(
    update: Callable[[int, Tensor, Tensor, Tensor, _Store], Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lr: Tensor,
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
    """A step of a rule whose ``update`` stores the states and returns the new weight, in float64."""
    if found_inf is not None and found_inf.item() != 0:
        return
    rate = lr.to(torch.float64)
    pulls = _pulls(penalty, weights, parameter, statistics, coefficients)
    scale = _gradient_scale(grad_scale, clip_coefficient)
    store = _rounding(rounding_seed, weights[0].device)
    for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        w, g = _with_pull(weight, gradient, scale, pulls[index], rate, maximize, is_decoupled)
        store(weight, update(index, w, g, rate, store))
    _regather(penalty, weights, next_parameter, statistics, partials)


def _pulls(
    penalty: str | None, weights: Sequence[Tensor], parameter: Tensor | None, statistics: Tensor, coefficients: Tensor
) -> list[Tensor | None]:
    """The penalty's gradient at each weight, in float64; None for the weights that are not watched."""
    if penalty is None:
        return [None] * len(weights)
    watched = [weight.detach().to(torch.float64) for weight in weights[: len(statistics)]]
    rows = zip(
        watched, statistics, torch.cat(_scalars(watched, parameter)), coefficients.to(torch.float64), strict=True
    )
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


def _rounding(seed: int | None, device: torch.device) -> _Store:
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


def _scalars(weights: Sequence[Tensor], parameter: Tensor | None, group_size: int = PER_TENSOR) -> list[Tensor]:
    """M or the temperature of each weight's segments, zero where there is none."""
    counts = counts_of(weights, group_size)
    if parameter is None:
        return list(torch.zeros(sum(counts), dtype=torch.float64, device=weights[0].device).split(counts))
    return _by_weight(parameter.detach(), counts)


def _by_weight(numbers: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The numbers of each weight's segments, given one per segment or one per weight."""
    numbers = numbers.to(torch.float64)
    if len(numbers) == len(counts):
        return [number.expand(count) for number, count in zip(numbers, counts, strict=True)]
    return list(numbers.split(counts))


def _mapped(function: Callable[..., Tensor], weight: Tensor, group_size: int, *per_segment: Tensor) -> list[Tensor]:
    """The function of each segment and its entries of ``per_segment``, shapes (channels, segments of a channel, ...).

    More than one where the last segments of the channels are shorter.
    """
    results, first = [], 0
    for block in blocks(weight, group_size):
        channels, count, _ = block.shape
        chosen = [
            numbers.unflatten(0, (channels, -1))[:, first : first + count].flatten(0, 1) for numbers in per_segment
        ]
        if channels * count == 1:
            result = function(block[0, 0], *(numbers[0] for numbers in chosen))[None]
        else:
            result = torch.vmap(function)(block.flatten(0, 1), *chosen)
        results.append(result.unflatten(0, (channels, count)))
        first += count
    return results


def _chunk_maxima(rule: Penalty, weights: Sequence[Tensor], group_size: int) -> Tensor:
    are_kept = rule.is_sparse and group_size == PER_TENSOR
    flat = [weight.detach().reshape(-1).to(torch.float64) for weight in weights if are_kept]
    maxima = [chunk.abs().amax() for weight in flat for chunk in weight.split(CHUNK_SIZE) if len(chunk)]
    return torch.stack(maxima) if maxima else torch.empty(0, dtype=torch.float64, device=weights[0].device)


def ewgs_forward(values: Tensor, ends: Tensor, levels: int) -> Tensor:
    _, level = _clipped_and_rounded(values, ends, levels)
    _, _, first, last = ends.to(torch.float64)
    return _as_stored(first + level * (last - first), values)


def ewgs_backward(values: Tensor, ends: Tensor, gradient: Tensor, levels: int, delta: float) -> tuple[Tensor, Tensor]:
    x, level = _clipped_and_rounded(values, ends, levels)
    lower, upper, first, last = ends.to(torch.float64)
    given = gradient.to(torch.float64)
    g = given * (last - first)
    scaled = g * (1 + delta * g.sign() * (x - level))
    least, most = torch.minimum(lower, upper), torch.maximum(lower, upper)
    wide = values.detach().to(torch.float64)
    passed = torch.where((wide >= least) & (wide <= most) & (lower != upper), scaled, 0)
    of_bounds = (passed * (x - 1)).nansum() / (upper - lower), -(passed * x).nansum() / (upper - lower)
    of_outputs = (given * (1 - level)).sum(), (given * level).sum()
    return _as_stored(passed / (upper - lower), values), torch.stack([*of_bounds, *of_outputs])


def _clipped_and_rounded(values: Tensor, ends: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The values on [0, 1] between the bounds, and the nearest levels there."""
    lower, upper, _, _ = ends.to(torch.float64)
    x = ((values.detach().to(torch.float64) - lower) / (upper - lower)).clamp(0, 1)
    return x, (x * (levels - 1)).round() / (levels - 1)


def _as_stored(exact: Tensor, values: Tensor) -> Tensor:
    """In the values' dtype and, where they are dense, layout."""
    stored = empty_dense_like(values)
    return stored.copy_(exact)
