"""The kernels over channels and groups: a program takes a tile of segments, side by side.

A tile is ROWS consecutive segments of one weight, of which it looks at BLOCK entries at a time: a segment of 128
entries is one look, a channel of 5,000 several. What a segment is anchored to is a column of the tile, so that
neighbours may differ in everything. How segments are added up depends on their size alone. What is computed once a
segment in float64, between the looks at entries, are kernels of their own, a segment a lane: in a tile, all threads
that share a segment would compute it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r2_kernels.backends.triton.reduce_kernels import load_scalar
from r2_kernels.backends.triton.storage import narrowed, widened


# tiles         int32 (tiles of this dtype and block, 2): the weight's index, the tile's number in it
# weights       int64 (N, 6): address, entries of a channel, of a segment, segments of a channel, of the weight, of all
#               weights before it
# parameters    float32 or float64, stride ``parameter_stride``, or None: M or the temperature, one per segment, or
#               where ``SHARED`` one per weight
# sums          float32 or float64 (SUMS, count): the segments' extremes and sums, written
@triton.jit
def reduce_segments(
    tiles,
    weights,
    parameters,
    parameter_stride,
    sums,
    count,
    extremes: tl.constexpr,
    neutral: tl.constexpr,
    anchor: tl.constexpr,
    regime: tl.constexpr,
    terms: tl.constexpr,
    EXTREMES: tl.constexpr,
    REGIMES: tl.constexpr,
    SUMS: tl.constexpr,
    SHARED: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    weight, numbers, is_there, address, offsets, lengths, longest = _tile(tiles, weights, ROWS)
    entries = address.to(tl.pointer_type(DTYPE)) + offsets[:, None]
    parameter = _of_segments(parameters, parameter_stride, weight, numbers, is_there, SHARED)
    columns = tl.arange(0, BLOCK)[None, :]
    found = neutral(ROWS, ACCUMULATOR)
    otherwise = neutral(BLOCK, ACCUMULATOR)
    if EXTREMES > 0:
        for start in range(0, longest, BLOCK):
            mask = start + columns < lengths[:, None]
            looked_at = extremes(widened(tl.load(entries + (start + columns), mask=mask, other=0.0), ACCUMULATOR))
            joined = ()
            for field in tl.static_range(EXTREMES):
                value = tl.where(mask, looked_at[field], otherwise[field][None, :])
                if field == 0:
                    joined = joined + (tl.maximum(found[0], tl.max(value, axis=1)),)
                else:
                    joined = joined + (tl.minimum(found[1], tl.min(value, axis=1)),)
            found = joined
    anchors = anchor(found, parameter, ACCUMULATOR)
    columns_of_anchors = ()
    for field in tl.static_range(len(anchors)):
        columns_of_anchors = columns_of_anchors + (anchors[field][:, None],)
    chosen = tl.zeros((ROWS,), tl.int32) + regime(anchors)
    totals = ()
    for _ in tl.static_range(SUMS - EXTREMES):
        totals = totals + (tl.zeros((ROWS,), ACCUMULATOR),)
    for REGIME in tl.static_range(REGIMES):
        is_chosen = chosen == REGIME
        if tl.max(is_chosen.to(tl.int32), axis=0) > 0:
            for start in range(0, longest, BLOCK):
                mask = start + columns < lengths[:, None]
                w = widened(tl.load(entries + (start + columns), mask=mask, other=0.0), ACCUMULATOR)
                parts = terms(w, columns_of_anchors, REGIME)
                added = ()
                for field in tl.static_range(len(totals)):
                    if field < len(parts):
                        part = tl.sum(tl.where(mask & is_chosen[:, None], parts[field], 0.0), axis=1)
                        added = added + (totals[field] + part,)
                    else:
                        added = added + (totals[field],)
                totals = added
    for field in tl.static_range(EXTREMES):
        tl.store(sums + field * count + numbers, anchors[field], mask=is_there)
    for field in tl.static_range(len(totals)):
        tl.store(sums + (EXTREMES + field) * count + numbers, totals[field], mask=is_there)


# lanes         int32 (programs of this dtype, 2): as ``tiles``, in tiles of LANES segments
# sums          as above; read
# statistics    float64 (count, STATISTICS): written, as are
# values        float32 or float64 (count,)
# slopes        the same, or None: the gradients with respect to the parameters
@triton.jit
def finish_segments(
    lanes,
    weights,
    parameters,
    parameter_stride,
    sums,
    count,
    statistics,
    values,
    slopes,
    convert: tl.constexpr,
    finalize: tl.constexpr,
    EXTREMES: tl.constexpr,
    STATISTICS: tl.constexpr,
    SUMS: tl.constexpr,
    SHARED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    LANES: tl.constexpr,
):
    weight, numbers, is_there, _, _, lengths, _ = _tile(lanes, weights, LANES)
    parameter = _of_segments(parameters, parameter_stride, weight, numbers, is_there, SHARED)
    fields = ()
    for field in tl.static_range(SUMS):
        column = tl.load(sums + field * count + numbers, mask=is_there, other=0.0)
        fields = fields + (column.to(ACCUMULATOR),)
    row = ()
    for field in tl.static_range(EXTREMES):
        row = row + (fields[field].to(tl.float64),)
    converted = convert(fields, row, parameter, lengths)
    for field in tl.static_range(len(converted)):
        row = row + (tl.where(lengths > 0, converted[field], 0.0),)
    for field in tl.static_range(STATISTICS):
        tl.store(statistics + numbers * STATISTICS + field, row[field], mask=is_there)
    value, slope = finalize(row, parameter)
    tl.store(values + numbers, value, mask=is_there)
    if slopes is not None:
        tl.store(slopes + numbers, slope, mask=is_there)


# coefficients  as ``parameters``, one per weight where ``SHARED_COEFFICIENTS``: what the gradients are multiplied with
# statistics    float64 (count, STATISTICS)
# prepared      float32 or float64 (1 + CONSTANTS, count): which way to compute the gradients, and the constants for it,
#               written
@triton.jit
def prepare_segments(
    lanes,
    weights,
    parameters,
    parameter_stride,
    coefficients,
    coefficient_stride,
    statistics,
    prepared,
    count,
    constants: tl.constexpr,
    slope_regime: tl.constexpr,
    SLOPE_REGIMES: tl.constexpr,
    STATISTICS: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_COEFFICIENTS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    LANES: tl.constexpr,
):
    weight, numbers, is_there, _, _, _, _ = _tile(lanes, weights, LANES)
    row = ()
    for field in tl.static_range(STATISTICS):
        row = row + (tl.load(statistics + numbers * STATISTICS + field, mask=is_there, other=1.0),)
    parameter = _of_segments(parameters, parameter_stride, weight, numbers, is_there, SHARED)
    coefficient = _of_segments(coefficients, coefficient_stride, weight, numbers, is_there, SHARED_COEFFICIENTS)
    chosen = tl.zeros((LANES,), tl.int32) + slope_regime(constants(row, parameter, coefficient, ACCUMULATOR, 0))
    tl.store(prepared + numbers, chosen.to(ACCUMULATOR), mask=is_there)
    for REGIME in tl.static_range(SLOPE_REGIMES):
        of_regime = constants(row, parameter, coefficient, ACCUMULATOR, REGIME)
        for field in tl.static_range(len(of_regime)):
            number = of_regime[field].to(ACCUMULATOR)
            tl.store(prepared + (1 + field) * count + numbers, number, mask=is_there & (chosen == REGIME))


# destinations  int64 (N,): the address of each weight's gradient, of dtype DTYPE, laid out as its weight
# prepared      as above; read
# ADD           whether to add to the gradients that are there, or to write all of them
@triton.jit
def apply_segments(
    tiles,
    weights,
    destinations,
    prepared,
    count,
    gradient: tl.constexpr,
    SLOPE_REGIMES: tl.constexpr,
    CONSTANTS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    weight, numbers, is_there, address, offsets, lengths, longest = _tile(tiles, weights, ROWS)
    entries = address.to(tl.pointer_type(DTYPE)) + offsets[:, None]
    gradients = tl.load(destinations + weight).to(tl.pointer_type(DTYPE)) + offsets[:, None]
    chosen = tl.load(prepared + numbers, mask=is_there, other=0.0).to(tl.int32)
    of_columns = ()
    for field in tl.static_range(CONSTANTS):
        number = tl.load(prepared + (1 + field) * count + numbers, mask=is_there, other=0.0)
        of_columns = of_columns + (number.to(ACCUMULATOR)[:, None],)
    columns = tl.arange(0, BLOCK)[None, :]
    for REGIME in tl.static_range(SLOPE_REGIMES):
        is_chosen = chosen == REGIME
        if tl.max(is_chosen.to(tl.int32), axis=0) > 0:
            for start in range(0, longest, BLOCK):
                mask = (start + columns < lengths[:, None]) & is_chosen[:, None]
                w = widened(tl.load(entries + (start + columns), mask=mask, other=0.0), ACCUMULATOR)
                result = gradient(w, of_columns, REGIME)
                if ADD:
                    result += widened(tl.load(gradients + (start + columns), mask=mask, other=0.0), ACCUMULATOR)
                tl.store(gradients + (start + columns), narrowed(result, DTYPE), mask=mask)


@triton.jit
def _tile(tiles, weights, ROWS: tl.constexpr):
    """The weight's index, and of the tile's segments the numbers, which are there, where they begin, how long they are.

    With the weight's address, before where they begin, and last the length of the longest.
    """
    pid = tl.program_id(0).to(tl.int64)
    weight = tl.load(tiles + 2 * pid).to(tl.int64)
    tile = tl.load(tiles + 2 * pid + 1).to(tl.int64)
    address = tl.load(weights + 6 * weight)
    channel_size = tl.load(weights + 6 * weight + 1)
    size = tl.load(weights + 6 * weight + 2)
    per_channel = tl.load(weights + 6 * weight + 3)
    count = tl.load(weights + 6 * weight + 4)
    segments = tile * ROWS + tl.arange(0, ROWS)
    is_there = segments < count
    numbers = segments + tl.load(weights + 6 * weight + 5)
    begin = (segments % per_channel) * size
    lengths = tl.where(is_there, tl.minimum(channel_size - begin, size), 0).to(tl.int32)
    return (
        weight,
        numbers,
        is_there,
        address,
        segments // per_channel * channel_size + begin,
        lengths,
        size.to(tl.int32),
    )


@triton.jit
def _of_segments(scalars, stride, weight, numbers, is_there, SHARED: tl.constexpr):
    """The scalars of a tile's segments in float64, zero where there are none."""
    if scalars is None or SHARED:
        value = (numbers * 0).to(tl.float64) + load_scalar(scalars, weight, stride)
    else:
        value = tl.load(scalars + numbers * stride, mask=is_there, other=0.0).to(tl.float64)
    return value
