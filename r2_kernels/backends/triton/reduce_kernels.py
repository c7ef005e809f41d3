"""The kernels that reduce: the sums of every chunk, then one program a segment that merges its chunks and finalizes.

Chunks, and the lanes and steps in which they merge, are fixed by the segment's length alone, and no sum is atomic:
results are bitwise the same from run to run, whatever the device and whatever else is in the list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r2_kernels.backends.triton.storage import larger, smaller, widened


# chunks        int32 (chunks of this dtype, 2): the row of the segment in ``segments``, the chunk's number in it
# segments      int64 (N, 3): address of the first entry, entries, number of the segment's first chunk in ``sums``
# parameters    float32 or float64, stride ``parameter_stride``, (N,), or None: M or the temperature
# sums          float32 or float64 (SUMS, all_chunks): the chunks' extremes and sums, written here
#
# PACKED        whether the extremes are those of 16-bit entries themselves, which a GPU compares two at a time
#
# A chunk is read twice, for its extremes and for its sums: the second time from the processor's L1 or L2 cache.
@triton.jit
def reduce_chunks(
    chunks,
    segments,
    parameters,
    parameter_stride,
    sums,
    all_chunks,
    extremes: tl.constexpr,
    neutral: tl.constexpr,
    anchor: tl.constexpr,
    regime: tl.constexpr,
    terms: tl.constexpr,
    EXTREMES: tl.constexpr,
    REGIMES: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    PACKED: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    segment = tl.load(chunks + 2 * pid).to(tl.int64)
    number = tl.load(chunks + 2 * pid + 1).to(tl.int64)
    address = tl.load(segments + 3 * segment)
    numel = tl.load(segments + 3 * segment + 1)
    sums += tl.load(segments + 3 * segment + 2) + number
    parameter = load_scalar(parameters, segment, parameter_stride)
    length = tl.minimum(numel - number * CHUNK, CHUNK).to(tl.int32)
    weights = address.to(tl.pointer_type(DTYPE)) + number * CHUNK
    if EXTREMES > 0:
        if (length == CHUNK) & (address % 16 == 0):
            aligned = tl.multiple_of(weights, 16)
            if PACKED:
                found = _packed_extremes(aligned, CHUNK, ACCUMULATOR, BLOCK)
            else:
                found = _extremes(aligned, CHUNK, True, extremes, neutral, ACCUMULATOR, BLOCK, VECTOR)
        else:
            found = _extremes(weights, length, False, extremes, neutral, ACCUMULATOR, BLOCK, VECTOR)
    else:
        found = ()
    anchors = anchor(found, parameter, ACCUMULATOR)
    for field in tl.static_range(EXTREMES):
        tl.store(sums + field * all_chunks, anchors[field])
    sums += EXTREMES * all_chunks
    chosen = regime(anchors)
    for REGIME in tl.static_range(REGIMES):
        if chosen == REGIME:
            if (length == CHUNK) & (address % 16 == 0):
                aligned = tl.multiple_of(weights, 16)
                totals = _totals(aligned, CHUNK, True, terms, REGIME, anchors, ACCUMULATOR, BLOCK, VECTOR)
            else:
                totals = _totals(weights, length, False, terms, REGIME, anchors, ACCUMULATOR, BLOCK, VECTOR)
            for field in tl.static_range(len(totals)):
                tl.store(sums + field * all_chunks, totals[field])


@triton.jit
def _extremes(
    weights,
    length,
    IS_FULL: tl.constexpr,
    extremes: tl.constexpr,
    neutral: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The maximum of the first, the minimum of the second of the penalty's ``extremes`` over a chunk."""
    found = neutral(BLOCK // VECTOR, ACCUMULATOR)
    otherwise = neutral(BLOCK, ACCUMULATOR)
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        if IS_FULL:
            values = extremes(widened(tl.load(weights + offsets), ACCUMULATOR))
        else:
            mask = offsets < length
            values = extremes(widened(tl.load(weights + offsets, mask=mask, other=0.0), ACCUMULATOR))
        joined = ()
        for field in tl.static_range(len(values)):
            value = values[field]
            if not IS_FULL:
                value = tl.where(mask, value, otherwise[field])
            value = tl.reshape(value, (BLOCK // VECTOR, VECTOR))
            if field == 0:
                joined = joined + (tl.maximum(found[field], tl.max(value, axis=1)),)
            else:
                joined = joined + (tl.minimum(found[field], tl.min(value, axis=1)),)
        found = joined
    result = (tl.max(found[0], axis=0),)
    if len(found) == 2:
        result = result + (tl.min(found[1], axis=0),)
    return result


@triton.jit
def _packed_extremes(weights, length, ACCUMULATOR: tl.constexpr, BLOCK: tl.constexpr):
    """The maximum and the minimum of a full chunk's entries."""
    maximum = tl.load(weights + tl.arange(0, BLOCK))
    minimum = maximum
    for start in range(BLOCK, length, BLOCK):
        stored = tl.load(weights + (start + tl.arange(0, BLOCK)))
        maximum, minimum = larger(maximum, stored), smaller(minimum, stored)
    return tl.max(widened(maximum, ACCUMULATOR), axis=0), tl.min(widened(minimum, ACCUMULATOR), axis=0)


@triton.jit
def _totals(
    weights,
    length,
    IS_FULL: tl.constexpr,
    terms: tl.constexpr,
    REGIME: tl.constexpr,
    anchors,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The sums of each of the penalty's ``terms`` over a chunk."""
    totals = ()
    for _ in tl.static_range(len(terms(tl.zeros((BLOCK,), ACCUMULATOR), anchors, REGIME))):
        totals = totals + (tl.zeros((BLOCK // VECTOR,), ACCUMULATOR),)
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        if IS_FULL:
            values = terms(widened(tl.load(weights + offsets), ACCUMULATOR), anchors, REGIME)
        else:
            mask = offsets < length
            values = terms(widened(tl.load(weights + offsets, mask=mask, other=0.0), ACCUMULATOR), anchors, REGIME)
        added = ()
        for field in tl.static_range(len(totals)):
            value = values[field]
            if not IS_FULL:
                value = tl.where(mask, value, 0.0)
            within = tl.sum(tl.reshape(value, (BLOCK // VECTOR, VECTOR)), axis=1)
            added = added + (totals[field] + within,)
        totals = added
    result = ()
    for field in tl.static_range(len(totals)):
        result = result + (tl.sum(totals[field], axis=0),)
    return result


# rows          int32 (segments of this dtype,): their rows in ``segments``
# segments, parameters, sums, all_chunks   as above; ``sums`` is read
# statistics    float64 (N, STATISTICS): written, as are
# values        float32 or float64 (N,)
# slopes        float32 or float64 (N,), or None: the gradients with respect to the parameters
# maxima        float64 (all_chunks,), or None: where each chunk's first sum goes, all that ``apply`` needs of it
@triton.jit
def merge_chunks(
    rows,
    segments,
    parameters,
    parameter_stride,
    sums,
    all_chunks,
    statistics,
    values,
    slopes,
    maxima,
    neutral: tl.constexpr,
    convert: tl.constexpr,
    finalize: tl.constexpr,
    EXTREMES: tl.constexpr,
    STATISTICS: tl.constexpr,
    SUMS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    segment = tl.load(rows + tl.program_id(0)).to(tl.int64)
    numel = tl.load(segments + 3 * segment + 1)
    first = tl.load(segments + 3 * segment + 2)
    parameter = load_scalar(parameters, segment, parameter_stride)
    lanes = tl.arange(0, LANES)
    # The ends first: with these known, what a chunk adds is converted once, and the rest are sums.
    found = neutral(LANES, ACCUMULATOR)
    otherwise = found
    for start in range(0, tl.cdiv(numel, CHUNK), LANES):
        numbers = start + lanes
        mask = numbers * CHUNK < numel
        joined = ()
        for field in tl.static_range(EXTREMES):
            column = tl.load(sums + field * all_chunks + first + numbers, mask=mask, other=0.0).to(ACCUMULATOR)
            if field == 0:
                if maxima is not None:
                    tl.store(maxima + first + numbers, column.to(tl.float64), mask=mask)
                column = tl.where(mask, column.to(otherwise[0].dtype, bitcast=True), otherwise[0])
                joined = joined + (tl.maximum(found[0], column),)
            else:
                joined = joined + (tl.minimum(found[1], tl.where(mask, column, otherwise[1])),)
        found = joined
    ends = ()
    for field in tl.static_range(EXTREMES):
        end = tl.max(found[0], axis=0) if field == 0 else tl.min(found[1], axis=0)
        ends = ends + (end.to(ACCUMULATOR, bitcast=True).to(tl.float64),)
    totals = ()
    for _ in tl.static_range(STATISTICS - EXTREMES):
        totals = totals + (tl.zeros((LANES,), tl.float64),)
    for start in range(0, tl.cdiv(numel, CHUNK), LANES):
        numbers = start + lanes
        mask = numbers * CHUNK < numel
        fields = ()
        for field in tl.static_range(SUMS):
            column = tl.load(sums + field * all_chunks + first + numbers, mask=mask, other=0.0)
            fields = fields + (column.to(ACCUMULATOR),)
        part = convert(fields, ends, parameter, tl.minimum(numel - numbers * CHUNK, CHUNK))
        added = ()
        for field in tl.static_range(len(totals)):
            added = added + (totals[field] + tl.where(mask, part[field], 0.0),)
        totals = added
    row = ends
    for field in tl.static_range(len(totals)):
        row = row + (tl.sum(totals[field], axis=0),)
    for field in tl.static_range(STATISTICS):
        tl.store(statistics + segment * STATISTICS + field, row[field])
    value, slope = finalize(row, parameter)
    tl.store(values + segment, value)
    if slopes is not None:
        tl.store(slopes + segment, slope)


# statistics    float64 (N, STATISTICS)
# parameters    as above
# values        float32 or float64 (N,): written, as are
# slopes        the same, or None
@triton.jit
def finalize_rows(
    statistics,
    parameters,
    parameter_stride,
    values,
    slopes,
    count,
    finalize: tl.constexpr,
    STATISTICS: tl.constexpr,
    LANES: tl.constexpr,
):
    segments = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = segments < count
    row = ()
    for field in tl.static_range(STATISTICS):
        row = row + (tl.load(statistics + segments * STATISTICS + field, mask=mask, other=1.0),)
    if parameters is None:
        parameter = row[0] * 0
    else:
        parameter = tl.load(parameters + segments * parameter_stride, mask=mask, other=0.0).to(tl.float64)
    value, slope = finalize(row, parameter)
    tl.store(values + segments, value, mask=mask)
    if slopes is not None:
        tl.store(slopes + segments, slope, mask=mask)


@triton.jit
def load_scalar(scalars, index, stride):
    """``scalars[index]`` in float64, zero where there are none."""
    if scalars is None:
        value = (index * 0).to(tl.float64)
    else:
        value = tl.load(scalars + index * stride).to(tl.float64)
    return value
