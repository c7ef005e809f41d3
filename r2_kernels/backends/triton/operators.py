"""The operators of ``r2_kernels.ops`` on a GPU: at most three launches per dtype, whatever the number of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2_kernels.backends.triton.apply_kernel import apply_chunks
from r2_kernels.backends.triton.checks import check_float64, check_parameter, check_scalars
from r2_kernels.backends.triton.chunk_table import DestinationTable, TableCache, WeightTable
from r2_kernels.backends.triton.penalties import FUNCTIONS
from r2_kernels.backends.triton.reduce_kernels import finalize_rows, merge_chunks, reduce_chunks
from r2_kernels.penalties import CHUNK_SIZE, by_name

LANGUAGE_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
MERGE_LANES = 512
FINALIZE_LANES = 128
APPLY_THREADS = 128

_weight_tables: TableCache[WeightTable] = TableCache()
_destination_tables: TableCache[DestinationTable] = TableCache()


def reduce(penalty: str, weights: Sequence[Tensor], parameter: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table, weights = _weight_table(weights)
    return _reduce(penalty, table, weights[0], parameter)


def finalize(penalty: str, statistics: Tensor, parameter: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rule = by_name(penalty)
    count, device = len(statistics), statistics.device
    check_float64(statistics, "statistics", (count, len(rule.statistics)), device)
    check_parameter(parameter, rule, count, device)
    if dtype is not torch.float32 and dtype is not torch.float64:
        raise RuntimeError(f"dtype: expected float32 or float64, got {dtype}")
    statistics = statistics.contiguous()
    values = statistics.new_empty(count, dtype=dtype)
    slopes = statistics.new_empty(0 if rule.parameter is None else count, dtype=dtype)
    stride = 0 if parameter is None else parameter.stride(0)
    arguments = (statistics, parameter, stride, values, slopes if len(slopes) else None, count)
    with on_device(device):
        launch(finalize_rows, triton.cdiv(count, FINALIZE_LANES), arguments, finalize_constants(penalty))
    return values, slopes


def apply(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
) -> list[Tensor]:
    table, dense = _weight_table(weights)
    _check_reduced(penalty, table, dense[0].device, parameter, statistics, partials, coefficients)
    gradients = [torch.empty_like(weight) for weight in weights]
    destinations = destination_table(table, dense, gradients)
    _apply(penalty, table, parameter, statistics, partials, coefficients, gradients, destinations, False)
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
    table, weights = _weight_table(weights)
    _check_reduced(penalty, table, weights[0].device, parameter, statistics, partials, coefficients)
    destinations = destination_table(table, weights, gradients)
    _apply(penalty, table, parameter, statistics, partials, coefficients, gradients, destinations, True)


def reduce_apply_(
    penalty: str,
    weights: Sequence[Tensor],
    parameter: Tensor | None,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    table, weights = _weight_table(weights)
    check_scalars(coefficients, "coefficients", len(weights), weights[0].device)
    destinations = destination_table(table, weights, gradients)
    values, slopes, statistics, partials = _reduce(penalty, table, weights[0], parameter)
    _apply(penalty, table, parameter, statistics, partials, coefficients, gradients, destinations, True)
    return values, slopes


def launch(kernel: Any, programs: int, arguments: Sequence[Any], constants: dict[str, Any]) -> None:
    """The one place where this backend launches a kernel."""
    kernel[(programs,)](*arguments, **constants)


@cache
def reduce_constants(penalty: str, dtype: torch.dtype, is_amd: bool = torch.version.hip is not None) -> dict[str, Any]:
    """The compile-time arguments of ``reduce_chunks``: a load of 16 bytes a thread at a time."""
    functions = FUNCTIONS[penalty]
    vector = 16 // dtype.itemsize
    threads = {2: 128, 4: 512, 8: 256}[dtype.itemsize]
    return {
        "extremes": functions.extremes,
        "neutral": functions.neutral,
        "anchor": functions.anchor,
        "regime": functions.regime,
        "terms": functions.terms,
        "EXTREMES": functions.ends,
        "REGIMES": functions.regimes,
        "DTYPE": LANGUAGE_DTYPES[dtype],
        "ACCUMULATOR": functions.accumulator(dtype),
        "CHUNK": CHUNK_SIZE,
        "BLOCK": vector * threads,
        "VECTOR": vector,
        "PACKED": functions.ends == 2 and dtype.itemsize == 2 and not is_amd,
        **_options(dtype, threads, is_amd),
    }


@cache
def merge_constants(penalty: str, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of ``merge_chunks``."""
    functions = FUNCTIONS[penalty]
    return {
        "neutral": functions.neutral,
        "convert": functions.convert,
        "finalize": functions.finalize,
        "EXTREMES": functions.ends,
        "STATISTICS": len(by_name(penalty).statistics),
        "SUMS": functions.sums_of(dtype),
        "ACCUMULATOR": functions.accumulator(dtype),
        "CHUNK": CHUNK_SIZE,
        "LANES": MERGE_LANES,
        "num_warps": MERGE_LANES // 32,
    }


@cache
def apply_constants(
    penalty: str, dtype: torch.dtype, add: bool, is_amd: bool = torch.version.hip is not None
) -> dict[str, Any]:
    """The compile-time arguments of ``apply_chunks``."""
    functions = FUNCTIONS[penalty]
    return {
        "prepare": functions.prepare,
        "gradient": functions.gradient,
        "slope_regime": functions.slope_regime,
        "SLOPE_REGIMES": functions.slope_regimes,
        "STATISTICS": len(by_name(penalty).statistics),
        "DTYPE": LANGUAGE_DTYPES[dtype],
        "ACCUMULATOR": functions.accumulator(dtype),
        "CHUNK": CHUNK_SIZE,
        "BLOCK": APPLY_THREADS * (16 // dtype.itemsize),
        "ADD": add,
        **_options(dtype, APPLY_THREADS, is_amd),
    }


@cache
def finalize_constants(penalty: str) -> dict[str, Any]:
    """The compile-time arguments of ``finalize_rows``."""
    return {
        "finalize": FUNCTIONS[penalty].finalize,
        "STATISTICS": len(by_name(penalty).statistics),
        "LANES": FINALIZE_LANES,
        "num_warps": FINALIZE_LANES // 32,
    }


def _options(dtype: torch.dtype, threads: int, is_amd: bool) -> dict[str, int]:
    """The compiler's options for programs of that many threads."""
    if is_amd:
        return {"num_warps": threads // 64}
    # In float64, NVIDIA's compiler takes more registers than let half of a processor's threads run, unless it may not.
    return {"num_warps": threads // 32} | ({"maxnreg": 64} if dtype is torch.float64 else {})


def new_sums(penalty: str, like: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Where the sums of ``count`` chunks or segments go, for values of that dtype: (SUMS, count)."""
    functions = FUNCTIONS[penalty]
    return like.new_empty((functions.sums_of(dtype), count), dtype=functions.stored(dtype))


def _reduce(
    penalty: str, table: WeightTable, like: Tensor, parameter: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of ``reduce``, on the device of ``like``."""
    rule = by_name(penalty)
    count = len(table.segments)
    check_parameter(parameter, rule, count, like.device)
    dtype = torch.float64 if table.is_float64 else torch.float32
    new_empty = like.new_empty
    values = new_empty(count, dtype=dtype)
    slopes = new_empty(0 if rule.parameter is None else count, dtype=dtype)
    statistics = new_empty((count, len(rule.statistics)), dtype=torch.float64)
    partials = new_empty(table.chunks if rule.is_sparse else 0, dtype=torch.float64)
    sums = new_sums(penalty, like, dtype, table.chunks)
    shared = (table.segments, parameter, 0 if parameter is None else parameter.stride(0), sums, table.chunks)
    outputs = (statistics, values, slopes if len(slopes) else None, partials if rule.is_sparse else None)
    with on_device(like.device):
        for group in table.groups:
            if len(group.chunks):
                constants = reduce_constants(penalty, group.dtype)
                launch(reduce_chunks, len(group.chunks), (group.chunks, *shared), constants)
            constants = merge_constants(penalty, group.dtype)
            launch(merge_chunks, len(group.rows), (group.rows, *shared, *outputs), constants)
    return values, slopes, statistics, partials


def _apply(
    penalty: str,
    table: WeightTable,
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    destinations: Destinations,
    add: bool,
) -> None:
    rule = by_name(penalty)
    arguments = (
        table.segments,
        destinations.table.addresses,
        parameter,
        0 if parameter is None else parameter.stride(0),
        coefficients,
        coefficients.stride(0),
        statistics.contiguous(),
        partials.contiguous() if rule.is_sparse else None,
    )
    with on_device(gradients[0].device):
        for group in table.groups:
            if len(group.chunks):
                constants = apply_constants(penalty, group.dtype, add)
                launch(apply_chunks, len(group.chunks), (group.chunks, *arguments), constants)
    for index in destinations.copied:
        gradients[index].copy_(destinations.in_place[index])


def _check_reduced(
    penalty: str,
    table: WeightTable,
    device: torch.device,
    parameter: Tensor | None,
    statistics: Tensor,
    partials: Tensor,
    coefficients: Tensor,
) -> None:
    """Raise unless these are what ``reduce`` gives for the weights of the table, and coefficients for them."""
    rule = by_name(penalty)
    count = len(table.segments)
    check_float64(statistics, "statistics", (count, len(rule.statistics)), device)
    check_float64(partials, "partials", (table.chunks if rule.is_sparse else 0,), device)
    check_parameter(parameter, rule, count, device)
    check_scalars(coefficients, "coefficients", count, device)


class Destinations(NamedTuple):
    """Where gradients are, these laid out as their weights, and the indices of those that are copies for this."""

    table: DestinationTable
    in_place: Sequence[Tensor]
    copied: Sequence[int]


def _weight_table(weights: Sequence[Tensor]) -> tuple[WeightTable, Sequence[Tensor]]:
    """The table, and the dense weights that it is made of."""
    if not weights:
        raise RuntimeError("weights: expected at least one tensor")
    table = _weight_tables.find(weights, None, lambda: WeightTable(weights, CHUNK_SIZE))
    if table.copied:
        dense = list(weights)
        for index in table.copied:
            dense[index] = weights[index].contiguous()
        return _weight_table(dense)
    return table, weights


def destination_table(table: WeightTable, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Destinations:
    if len(gradients) != len(weights):
        raise RuntimeError(f"gradients: expected {len(weights)} tensors, got {len(gradients)}")
    found = _destination_tables.find(gradients, table, lambda: DestinationTable(gradients, weights, table.strides))
    if not found.copied:
        return Destinations(found, gradients, ())
    in_place = list(gradients)
    for index in found.copied:
        in_place[index] = torch.empty_like(weights[index]).copy_(gradients[index])
    return Destinations(destination_table(table, weights, in_place).table, in_place, found.copied)


def on_device(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
