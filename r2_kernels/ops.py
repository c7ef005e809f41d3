"""The operators: their schemas, their fake kernels, which backend runs them, and the autograd function over them.

Two primitives, each one pass over all tensors of a list: ``reduce`` (weights to statistics) and ``apply`` (weights,
statistics and one coefficient per segment to gradients). The arguments that all share:

    penalty        a name in ``penalties.PENALTIES``
    weights        N floating-point tensors on one device, of any dense layout (others are copied), empty ones allowed
    parameter      M or the temperature, float32 or float64, one per segment, (M,), or one per weight, (N,), which all
                   its segments share; None where the penalty has none
    statistics     (M, S) float64, a row per segment in the order of the penalty's ``statistics``
    partials       what ``reduce`` leaves for ``apply`` of the same backend: the chunks' maxima for a sparse penalty
                   whose segments are whole weights
    coefficients   (M,) or (N,), float32 or float64: what the gradient of each segment, or weight, is multiplied with
    gradients      N tensors of the weights' shapes and dtypes
    group_size     what the M segments are: 0 the weights, so that M is N; -1 their channels; else groups of that many
                   entries. ``granularity.py`` says how they are numbered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r2_kernels import backends, distributed
from r2_kernels.granularity import PER_TENSOR, are_consecutive, counts_of, summed_by_weight
from r2_kernels.penalties import CHUNK_SIZE, by_name
from r2_kernels.validation import value_dtype

_SHARED = "str penalty, Tensor[] weights, Tensor? parameter"
_REDUCED = "Tensor statistics, Tensor partials"
_LAST = "int group_size=0"
SCHEMAS = {
    # values (M,), their gradients with respect to the parameter (M,) or (0,), statistics, partials
    "reduce": f"({_SHARED}, {_LAST}) -> (Tensor, Tensor, Tensor, Tensor)",
    # values and parameter gradients of statistics that were merged elsewhere
    "finalize": "(str penalty, Tensor statistics, Tensor? parameter, ScalarType dtype) -> (Tensor, Tensor)",
    # fresh gradients
    "apply": f"({_SHARED}, {_REDUCED}, Tensor coefficients, {_LAST}) -> Tensor[]",
    # added into the gradients that are there
    "apply_": f"({_SHARED}, {_REDUCED}, Tensor coefficients, Tensor(a!)[] gradients, {_LAST}) -> ()",
    # both in one parallel region: values and parameter gradients, and the gradients added into those that are there
    "reduce_apply_": f"({_SHARED}, Tensor coefficients, Tensor(a!)[] gradients, {_LAST}) -> (Tensor, Tensor)",
}

_library = torch.library.Library("r2_kernels", "DEF")
_dispatched: dict[str, Callable[..., Any]] = {}


def _from_backend(backend: str, name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        return _of_backend(backend, name)(*args)

    return kernel


def _of_backend(backend: str, name: str, device_type: str | None = None) -> Callable[..., Any]:
    module = backends.load(backend, device_type)
    try:
        return getattr(module, name)
    except AttributeError:
        raise NotImplementedError(
            f"{name}: the backend {backend!r} does not have it; `with use_backend('reference'):` computes it in PyTorch"
        ) from None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"r2_kernels computes with the slow reference in PyTorch, since the CPU backend is not available: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _from_reference_with_warning(name: str, reason: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        _warn_once(reason)
        return getattr(backends.load("reference"), name)(*args)

    return kernel


def define(schemas: dict[str, str]) -> None:
    """Operators by name, each with the backends' kernels."""
    for name, schema in schemas.items():
        _library.define(name + schema)
    reason = backends.by_name("cpu").why_unavailable()
    for name in schemas:
        if reason is not None:
            _library.impl(name, _from_reference_with_warning(name, reason), "CPU")
        _library.impl(name, _from_backend("triton", name), "CUDA")
        _dispatched[name] = getattr(torch.ops.r2_kernels, name).default


define(SCHEMAS)


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the fake kernel of an operator."""
    return torch.library.register_fake(f"r2_kernels::{name}", lib=_library)


@fake("reduce")
def _(
    penalty: str, weights: Sequence[Tensor], parameter: Tensor | None, group_size: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule = by_name(penalty)
    count = sum(counts_of(weights, group_size))
    dtype = value_dtype(weights)
    chunks = 0
    if rule.is_sparse and group_size == PER_TENSOR:
        chunks = sum((weight.numel() + CHUNK_SIZE - 1) // CHUNK_SIZE for weight in weights)
    new_empty = weights[0].new_empty
    return (
        new_empty(count, dtype=dtype),
        new_empty(0 if rule.parameter is None else count, dtype=dtype),
        new_empty(count, len(rule.statistics), dtype=torch.float64),
        new_empty(chunks, dtype=torch.float64),
    )


@fake("finalize")
def _(penalty: str, statistics: Tensor, parameter: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    count = statistics.shape[0]
    parameters = 0 if by_name(penalty).parameter is None else count
    return statistics.new_empty(count, dtype=dtype), statistics.new_empty(parameters, dtype=dtype)


@fake("apply")
def _(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
    group_size: int = 0,
) -> list[Tensor]:
    return [
        torch.empty_like(weight)
        if group_size == PER_TENSOR or are_consecutive(weight, group_size)
        else weight.new_empty(weight.shape)
        for weight in weights
    ]


@fake("apply_")
def _(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    group_size: int = 0,
) -> None:
    return None


@fake("reduce_apply_")
def _(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    group_size: int = 0,
) -> tuple[Tensor, Tensor]:
    count = sum(counts_of(weights, group_size))
    dtype = value_dtype(weights)
    parameters = 0 if by_name(penalty).parameter is None else count
    return weights[0].new_empty(count, dtype=dtype), weights[0].new_empty(parameters, dtype=dtype)


def kernel(name: str, device: torch.device) -> Callable[..., Any]:
    """The operator ``name`` for tensors on ``device``: of the backend that was asked for, else the dispatcher's."""
    return kernel_of(backends.requested(), name, device)


def kernel_of(backend: str | None, name: str, device: torch.device) -> Callable[..., Any]:
    """The operator ``name`` of the named backend, or for None the dispatcher's."""
    if backend is None:
        return _dispatched[name]
    return _of_backend(backend, name, device.type)


def reduce_apply_(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """The operator of that name; for sharded weights in two passes, the statistics being merged between them."""
    device = weights[0].device
    if not any(distributed.is_distributed(weight) for weight in weights):
        return kernel("reduce_apply_", device)(penalty, weights, parameter, coefficients, gradients, group_size)
    shards = [distributed.local(weight) for weight in weights]
    _, _, statistics, partials = kernel("reduce", device)(penalty, shards, parameter, group_size)
    distributed.merge_(by_name(penalty), weights, parameter, statistics)
    local_gradients = [distributed.local(gradient) for gradient in gradients]
    kernel("apply_", device)(
        penalty, shards, parameter, statistics, partials, coefficients, local_gradients, group_size
    )
    return kernel("finalize", device)(penalty, statistics, parameter, value_dtype(weights))


def widened(parameter: Tensor) -> Tensor:
    """M or the temperature as the operators take it, float32 or float64, detached."""
    parameter = parameter.detach()
    return parameter if parameter.dtype in (torch.float32, torch.float64) else parameter.float()


class PenaltyFunction(torch.autograd.Function):
    """values = penalty(weights, parameter), (M,), one per segment; gradients are computed when backward asks for them.

    The parameter has shape (M,), or (N,) where the segments of a weight share it.
    """

    @staticmethod
    def forward(ctx: Any, penalty: str, group_size: int, parameter: Tensor | None, *weights: Tensor) -> Tensor:
        scalars = None if parameter is None else widened(parameter)
        # Partials are one backend's own, and autograd may run backward in another thread or ``use_backend`` block.
        ctx.backend = backends.requested()
        values, parameter_gradients, statistics, partials = kernel_of(ctx.backend, "reduce", weights[0].device)(
            penalty, [distributed.local(weight) for weight in weights], scalars, group_size
        )
        if distributed.merge_(by_name(penalty), weights, scalars, statistics):
            finalize = kernel_of(ctx.backend, "finalize", weights[0].device)
            values, parameter_gradients = finalize(penalty, statistics, scalars, value_dtype(weights))
        ctx.penalty = penalty
        ctx.group_size = group_size
        ctx.parameter_dtype = None if parameter is None else parameter.dtype
        ctx.save_for_backward(scalars, parameter_gradients, statistics, partials, *weights)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_gradients: Tensor) -> tuple[Tensor | None, ...]:
        scalars, parameter_gradients, statistics, partials, *weights = ctx.saved_tensors
        parameter_gradient = None
        if ctx.needs_input_grad[2]:
            parameter_gradient = value_gradients * parameter_gradients
            if scalars.shape != parameter_gradient.shape:
                counts = torch.tensor(counts_of(weights, ctx.group_size), device=scalars.device)
                parameter_gradient = summed_by_weight(parameter_gradient, counts)
            parameter_gradient = parameter_gradient.to(ctx.parameter_dtype)
        needed = ctx.needs_input_grad[3:]
        gradients: list[Tensor | None] = [None] * len(weights)
        if any(needed):
            given, weights = weights, [distributed.local(weight) for weight in weights]
            chosen = [index for index, is_needed in enumerate(needed) if is_needed]
            if len(chosen) < len(weights):
                partials = _chosen_partials(partials, weights, needed)
                rows = _segments_of(chosen, counts_of(weights, ctx.group_size), statistics.device)
                if scalars is not None:
                    is_shared = len(scalars) != len(statistics)
                    scalars = scalars[torch.tensor(chosen, device=statistics.device) if is_shared else rows]
                statistics, value_gradients = statistics[rows], value_gradients[rows]
                weights = [weights[index] for index in chosen]
            fresh = kernel_of(ctx.backend, "apply", weights[0].device)(
                ctx.penalty, weights, scalars, statistics, partials, value_gradients, ctx.group_size
            )
            for index, gradient in zip(chosen, fresh, strict=True):
                gradients[index] = distributed.like(gradient, given[index])
        return None, None, parameter_gradient, *gradients


def _segments_of(chosen: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """The numbers of the chosen weights' segments."""
    starts = [0, *accumulate(counts)]
    ranges = [torch.arange(starts[index], starts[index + 1], device=device) for index in chosen]
    return torch.cat(ranges)


def _chosen_partials(partials: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]) -> Tensor:
    """The partials of the needed weights, where the penalty has any."""
    if partials.numel() == 0:
        return partials
    chunks = [(weight.numel() + CHUNK_SIZE - 1) // CHUNK_SIZE for weight in weights]
    return torch.cat([part for part, is_needed in zip(partials.split(chunks), needed, strict=True) if is_needed])
