"""The operators of ``r2_kernels.ops`` over channels and groups: four launches per dtype and block of a tile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from r2_kernels.backends.triton import operators
from r2_kernels.backends.triton.checks import check_float64, check_parameter, check_scalars
from r2_kernels.backends.triton.chunk_table import TableCache
from r2_kernels.backends.triton.operators import LANGUAGE_DTYPES, launch, new_sums
from r2_kernels.backends.triton.penalties import FUNCTIONS
from r2_kernels.backends.triton.penalty_functions import Functions
from r2_kernels.backends.triton.segment_kernels import (
    apply_segments,
    finish_segments,
    prepare_segments,
    reduce_segments,
)
from r2_kernels.backends.triton.segment_table import LANES, TILE, SegmentTable
from r2_kernels.penalties import Penalty, by_name

_segment_tables: TableCache[SegmentTable] = TableCache()


def reduce(
    penalty: str, weights: Sequence[Tensor], parameter: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table, weights = _segment_table(weights, group_size)
    values, slopes, statistics = _reduce(penalty, table, weights, parameter)
    return values, slopes, statistics, statistics.new_empty(0)


def apply(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
    group_size: int,
) -> list[Tensor]:
    table, weights = _segment_table(weights, group_size)
    gradients = [torch.empty_like(weight) for weight in weights]
    check_float64(partials, "partials", (0,), weights[0].device)
    _apply(penalty, table, weights, parameter, statistics, coefficients, gradients, False)
    return gradients


def apply_(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    group_size: int,
) -> None:
    table, weights = _segment_table(weights, group_size)
    check_float64(partials, "partials", (0,), weights[0].device)
    _apply(penalty, table, weights, parameter, statistics, coefficients, gradients, True)


def reduce_apply_(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    group_size: int,
) -> tuple[Tensor, Tensor]:
    table, weights = _segment_table(weights, group_size)
    values, slopes, statistics = _reduce(penalty, table, weights, parameter)
    _apply(penalty, table, weights, parameter, statistics, coefficients, gradients, True)
    return values, slopes


@cache
def reduce_constants(penalty: str, dtype: torch.dtype, block: int, is_shared: bool) -> dict[str, Any]:
    """The compile-time arguments of ``reduce_segments``."""
    functions = FUNCTIONS[penalty]
    return {
        "extremes": functions.extremes,
        "neutral": functions.neutral,
        "anchor": functions.anchor,
        "regime": functions.regime,
        "terms": functions.terms,
        "EXTREMES": functions.ends,
        "REGIMES": functions.regimes,
        "SUMS": functions.sums_of(dtype),
        "SHARED": is_shared,
        **_tile_constants(functions, dtype, block),
    }


@cache
def finish_constants(penalty: str, dtype: torch.dtype, is_shared: bool) -> dict[str, Any]:
    """The compile-time arguments of ``finish_segments``."""
    functions = FUNCTIONS[penalty]
    return {
        "convert": functions.convert,
        "finalize": functions.finalize,
        "EXTREMES": functions.ends,
        "STATISTICS": len(by_name(penalty).statistics),
        "SUMS": functions.sums_of(dtype),
        "SHARED": is_shared,
        **_lane_constants(functions, dtype),
    }


@cache
def prepare_constants(
    penalty: str, dtype: torch.dtype, is_shared: bool, has_shared_coefficients: bool
) -> dict[str, Any]:
    """The compile-time arguments of ``prepare_segments``."""
    functions = FUNCTIONS[penalty]
    return {
        "constants": functions.constants,
        "slope_regime": functions.slope_regime,
        "SLOPE_REGIMES": functions.slope_regimes,
        "STATISTICS": len(by_name(penalty).statistics),
        "SHARED": is_shared,
        "SHARED_COEFFICIENTS": has_shared_coefficients,
        **_lane_constants(functions, dtype),
    }


@cache
def apply_constants(penalty: str, dtype: torch.dtype, block: int, add: bool) -> dict[str, Any]:
    """The compile-time arguments of ``apply_segments``."""
    functions = FUNCTIONS[penalty]
    return {
        "gradient": functions.gradient,
        "SLOPE_REGIMES": functions.slope_regimes,
        "CONSTANTS": functions.constant_count,
        "ADD": add,
        **_tile_constants(functions, dtype, block),
    }


def _tile_constants(functions: Functions, dtype: torch.dtype, block: int) -> dict[str, Any]:
    return {
        "DTYPE": LANGUAGE_DTYPES[dtype],
        "ACCUMULATOR": functions.accumulator(dtype),
        "ROWS": TILE // block,
        "BLOCK": block,
        "num_warps": 8,
    }


def _lane_constants(functions: Functions, dtype: torch.dtype) -> dict[str, Any]:
    return {"ACCUMULATOR": functions.accumulator(dtype), "LANES": LANES, "num_warps": LANES // 32}


def _reduce(
    penalty: str, table: SegmentTable, weights: Sequence[Tensor], parameter: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, slopes and statistics."""
    rule = by_name(penalty)
    is_shared = _is_shared(parameter, rule, table, weights)
    dtype = torch.float64 if table.is_float64 else torch.float32
    new_empty = weights[0].new_empty
    values = new_empty(table.count, dtype=dtype)
    slopes = new_empty(0 if rule.parameter is None else table.count, dtype=dtype)
    statistics = new_empty((table.count, len(rule.statistics)), dtype=torch.float64)
    sums = new_sums(penalty, weights[0], dtype, table.count)
    shared = (table.weights, parameter, 0 if parameter is None else parameter.stride(0), sums, table.count)
    outputs = (statistics, values, slopes if len(slopes) else None)
    with operators.on_device(weights[0].device):
        for group in table.groups:
            constants = reduce_constants(penalty, group.dtype, group.block, is_shared)
            launch(reduce_segments, len(group.tiles), (group.tiles, *shared), constants)
            constants = finish_constants(penalty, group.dtype, is_shared)
            launch(finish_segments, len(group.lanes), (group.lanes, *shared, *outputs), constants)
    return values, slopes, statistics


def _apply(
    penalty: str,
    table: SegmentTable,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    statistics: Tensor,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    add: bool,
) -> None:
    rule = by_name(penalty)
    device = weights[0].device
    check_float64(statistics, "statistics", (table.count, len(rule.statistics)), device)
    is_shared = _is_shared(parameter, rule, table, weights)
    has_shared = len(coefficients) == len(weights)
    check_scalars(coefficients, "coefficients", len(weights) if has_shared else table.count, device)
    destinations = operators.destination_table(table, weights, gradients)
    functions = FUNCTIONS[penalty]
    dtype = torch.float64 if table.is_float64 else torch.float32
    prepared = statistics.new_empty((1 + functions.constant_count, table.count), dtype=functions.stored(dtype))
    given = (parameter, 0 if parameter is None else parameter.stride(0), coefficients, coefficients.stride(0))
    prepare = (table.weights, *given, statistics.contiguous(), prepared, table.count)
    arguments = (table.weights, destinations.table.addresses, prepared, table.count)
    with operators.on_device(device):
        for group in table.groups:
            constants = prepare_constants(penalty, group.dtype, is_shared, has_shared)
            launch(prepare_segments, len(group.lanes), (group.lanes, *prepare), constants)
            constants = apply_constants(penalty, group.dtype, group.block, add)
            launch(apply_segments, len(group.tiles), (group.tiles, *arguments), constants)
    for index in destinations.copied:
        gradients[index].copy_(destinations.in_place[index])


def _is_shared(parameter: Tensor | None, rule: Penalty, table: SegmentTable, weights: Sequence[Tensor]) -> bool:
    """Whether the segments of a weight share an entry of the parameter, which is checked."""
    is_shared = parameter is not None and len(parameter) == len(weights)
    check_parameter(parameter, rule, len(weights) if is_shared else table.count, weights[0].device)
    return is_shared


def _segment_table(weights: Sequence[Tensor], group_size: int) -> tuple[SegmentTable, Sequence[Tensor]]:
    """The table, and the weights that it is made of, whose segments follow one another in memory."""
    if not weights:
        raise RuntimeError("weights: expected at least one tensor")
    if group_size < -1:
        raise RuntimeError(f"group_size: expected 0, -1 or the size of a group, got {group_size}")
    table = _segment_tables.find(weights, group_size, lambda: SegmentTable(weights, group_size))
    if table.copied:
        dense = list(weights)
        for index in table.copied:
            dense[index] = weights[index].contiguous()
        return _segment_table(dense, group_size)
    return table, weights
