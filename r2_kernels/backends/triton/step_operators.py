"""The operators of ``r2_kernels.optimizer_ops`` on a GPU: two launches per combination of dtypes, nothing read back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from r2_kernels.backends.triton import operators
from r2_kernels.backends.triton.checks import check_float64, check_parameter, check_scalars
from r2_kernels.backends.triton.operators import LANGUAGE_DTYPES
from r2_kernels.backends.triton.penalties import FUNCTIONS
from r2_kernels.backends.triton.step_kernel import finish_tensors, step_chunks
from r2_kernels.backends.triton.step_table import Dtypes, StepTable, StepTensors, find_tables
from r2_kernels.backends.triton.update_rules import RULES
from r2_kernels.penalties import CHUNK_SIZE, by_name

# A thread's registers by the bytes of a weight: as few as NVIDIA's compiler can do with without spilling any.
REGISTERS = {2: 80, 4: 64, 8: 128}


class _Regularization(NamedTuple):
    """The penalty's arguments, as in ``r2_kernels.optimizer_ops``."""

    penalty: str | None
    parameter: Tensor | None
    next_parameter: Tensor | None
    statistics: Tensor
    partials: Tensor
    coefficients: Tensor


class _Scaling(NamedTuple):
    lr: Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None
    clip_coefficient: Tensor | None


class Variant(NamedTuple):
    """What a step is compiled for, besides its penalty and dtypes."""

    rule: str
    states: int
    is_nesterov: bool = False
    is_maximized: bool = False
    is_decoupled: bool = False
    is_stochastic: bool = False


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
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs:
        states["max_exp_avg_sqs"] = max_exp_avg_sqs
    if len(steps) != len(weights):
        raise RuntimeError(f"steps: expected {len(weights)} tensors, one per weight, got {len(steps)}")
    settings = (beta1, beta2, _logarithm(beta1), _logarithm(beta2), eps, weight_decay)
    _step(StepTensors(weights, gradients, states, steps, ()), "adamw", False, maximize, settings, lr, *shared)


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
    has_momentum = momentum != 0
    if has_momentum and len(started) != len(weights):
        raise RuntimeError(f"started: expected {len(weights)} entries, one per weight, got {len(started)}")
    states = {"momentum_buffers": momentum_buffers} if has_momentum else {}
    given = StepTensors(weights, gradients, states, (), started if has_momentum else ())
    _step(given, "sgd", nesterov, maximize, (momentum, dampening, weight_decay, 0.0, 0.0, 0.0), lr, *shared)


@cache
def step_constants(
    penalty: str | None, dtypes: Dtypes, variant: Variant, is_amd: bool = torch.version.hip is not None
) -> dict[str, Any]:
    """The compile-time arguments of ``step_chunks``."""
    rule = RULES[variant.rule]
    functions = None if penalty is None else FUNCTIONS[penalty]
    names = ("prepare", "slope_regime", "gradient", "extremes", "neutral", "anchor", "regime", "terms")
    # Blocks and programs as of ``reduce_chunks``, whose sums are to be found; these do not depend on the penalty.
    reduce = operators.reduce_constants(penalty or "linf", dtypes.weight, is_amd)
    return {
        "prepare_update": rule.prepare,
        "update": rule.update,
        **{name: getattr(functions, name, None) for name in names},
        "STATISTICS": 0 if penalty is None else len(by_name(penalty).statistics),
        "EXTREMES": getattr(functions, "ends", 0),
        "REGIMES": getattr(functions, "regimes", 0),
        "SLOPE_REGIMES": getattr(functions, "slope_regimes", 0),
        "STATES": variant.states,
        "IS_NESTEROV": variant.is_nesterov,
        "IS_MAXIMIZED": variant.is_maximized,
        "IS_DECOUPLED": variant.is_decoupled,
        "IS_STOCHASTIC": variant.is_stochastic,
        "DTYPE": LANGUAGE_DTYPES[dtypes.weight],
        "GRADIENT": LANGUAGE_DTYPES[dtypes.gradient],
        "STATE": LANGUAGE_DTYPES[dtypes.state],
        "COUNT": LANGUAGE_DTYPES[dtypes.count],
        **{name: reduce[name] for name in ("ACCUMULATOR", "CHUNK", "BLOCK", "VECTOR", "num_warps")},
        **({} if is_amd else {"maxnreg": REGISTERS[dtypes.weight.itemsize]}),
    }


@cache
def finish_constants(penalty: str | None, dtypes: Dtypes) -> dict[str, Any]:
    """The compile-time arguments of ``finish_tensors``."""
    count = {"COUNT": LANGUAGE_DTYPES[dtypes.count]}
    if penalty is not None:
        return operators.merge_constants(penalty, dtypes.weight) | count
    nothing = dict.fromkeys(("neutral", "convert", "finalize"))
    unused = {
        "EXTREMES": 0,
        "STATISTICS": 0,
        "SUMS": 0,
        "ACCUMULATOR": tl.float32,
        "CHUNK": CHUNK_SIZE,
        "LANES": 1,
        "num_warps": 1,
    }
    return nothing | unused | count


def _step(
    given: StepTensors,
    rule: str,
    is_nesterov: bool,
    is_maximized: bool,
    settings: tuple[float, ...],
    lr: Tensor,
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
    """A step of a rule, whose ``settings`` are six numbers; the rest as in ``r2_kernels.optimizer_ops``."""
    variant = Variant(rule, len(given.states), is_nesterov, is_maximized, is_decoupled, rounding_seed is not None)
    scaling = _Scaling(lr, grad_scale, found_inf, clip_coefficient)
    if not given.weights:
        raise RuntimeError("weights: expected at least one tensor, got an empty list")
    table, gradients = find_tables(given, CHUNK_SIZE)
    device = given.weights[0].device
    _check_scaling(scaling, device)
    regularization = _Regularization(penalty, parameter, next_parameter, statistics, partials, coefficients)
    watched = _check_regularization(regularization, table, device)
    chunks = table.first_chunks[watched]
    gathered: tuple[Any, ...] = (None, chunks, None, None, None)
    if penalty is not None:
        dtype = torch.float64 if table.is_float64 else torch.float32
        sums = operators.new_sums(penalty, statistics, dtype, chunks)
        values = statistics.new_empty(watched, dtype=dtype)
        gathered = (sums, chunks, statistics, values, partials if by_name(penalty).is_sparse else None)
    sums, _, found, _, maxima = gathered
    step_arguments = (
        *(table.segments, gradients.addresses, table.states, table.counts, table.started),
        *scaling,
        *settings,
        rounding_seed or 0,
        watched,
        *(*_strided(parameter), *_strided(next_parameter), *_strided(coefficients if watched else None)),
        *(found, maxima, sums, chunks),
    )
    finish_arguments = (table.counts, scaling.found_inf, watched, table.segments, *_strided(next_parameter), *gathered)
    with operators.on_device(device):
        for group in table.groups:
            if len(group.chunks):
                constants = step_constants(penalty, group.dtypes, variant)
                operators.launch(step_chunks, len(group.chunks), (group.chunks, *step_arguments), constants)
            if penalty is not None or table.counts is not None:
                constants = finish_constants(penalty, group.dtypes)
                operators.launch(finish_tensors, len(group.rows), (group.rows, *finish_arguments), constants)


def _logarithm(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _strided(numbers: Tensor | None) -> tuple[Tensor | None, int]:
    return numbers, 0 if numbers is None else numbers.stride(0)


def _check_scaling(scaling: _Scaling, device: torch.device) -> None:
    for name, number in zip(scaling._fields, scaling, strict=True):
        if number is None:
            continue
        if number.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"{name}: expected dtype float32 or float64, got {number.dtype}")
        if number.numel() != 1 or number.device != device:
            raise RuntimeError(
                f"{name}: expected one number on {device}, got shape {tuple(number.shape)} on {number.device}"
            )


def _check_regularization(given: _Regularization, table: StepTable, device: torch.device) -> int:
    """How many tensors are watched."""
    count = len(table.segments)
    shape = tuple(given.statistics.shape)
    watched = shape[0] if shape else -1
    if len(shape) != 2 or watched > count or (watched > 0) != (given.penalty is not None):
        raise RuntimeError(
            f"statistics: expected shape (W, S), W from 1 to {count}, or 0 without a penalty, got {shape}"
        )
    if given.penalty is None:
        return 0
    rule = by_name(given.penalty)
    chunks = table.first_chunks[watched] if rule.is_sparse else 0
    check_float64(given.statistics, "statistics", (watched, len(rule.statistics)), device)
    check_float64(given.partials, "partials", (chunks,), device)
    for name in ("statistics", "partials"):
        if not getattr(given, name).is_contiguous():
            raise RuntimeError(f"{name}: expected a contiguous tensor, got strides {getattr(given, name).stride()}")
    check_scalars(given.coefficients, "coefficients", watched, device)
    check_parameter(given.parameter, rule, watched, device)
    check_parameter(given.next_parameter, rule, watched, device, "next_parameter")
    return watched
