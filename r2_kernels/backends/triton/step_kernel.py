"""The kernels of an optimizer's step: update all chunks, the penalty's gradient on their way in, then merge.

A chunk's program loads weight, gradient and states, adds the slope, updates, stores, and gathers of the new weights
what ``reduce`` would find, in the same blocks. The first look at these is at registers; a penalty that needs a second
one finds them in the processor's caches. The second kernel, one program a tensor, merges the chunks and counts the
step, which all programs of the first have to see uncounted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r2_kernels.backends.triton.reduce_kernels import _totals, load_scalar, merge_chunks
from r2_kernels.backends.triton.stochastic_rounding import rounded_stochastically, rounding_key
from r2_kernels.backends.triton.storage import narrowed, widened


# chunks, segments   as in ``reduce_kernels.py``, of the tensors of one combination of dtypes
# gradients      int64 (N,): the address of each tensor's gradient, of dtype GRADIENT
# states         int64 (N, STATES): the addresses of its states, of dtype STATE
# counts         int64 (N,): the address of each tensor's count of steps, of dtype COUNT, or None
# started        int8 (N,): whether its states have started, or None where all have
# lr, grad_scale, found_inf, clip_coefficient   one number each, float32 or float64; all but lr may be None
# setting0 to setting5   the rule's settings
# rounding_seed  of bfloat16, where IS_STOCHASTIC
# watched        how many tensors the penalty watches: the first of the list
# parameters, next_parameters, coefficients   float32 or float64 with their strides, (watched,), or None
# statistics     float64 (watched, STATISTICS): of the weights as they are
# maxima         float64 (chunks of the watched,), or None: chunks whose own is below their segment's have no slope
# sums           float32 or float64 (SUMS, all_chunks): what is gathered of the new weights, written here
# gradient and what follows of the penalty   None, and STATISTICS 0, where watched is 0
@triton.jit(do_not_specialize=["rounding_seed", "watched"])
def step_chunks(
    chunks,
    segments,
    gradients,
    states,
    counts,
    started,
    lr,
    grad_scale,
    found_inf,
    clip_coefficient,
    setting0: tl.float64,
    setting1: tl.float64,
    setting2: tl.float64,
    setting3: tl.float64,
    setting4: tl.float64,
    setting5: tl.float64,
    rounding_seed: tl.int64,
    watched,
    parameters,
    parameter_stride,
    next_parameters,
    next_parameter_stride,
    coefficients,
    coefficient_stride,
    statistics,
    maxima,
    sums,
    all_chunks,
    prepare_update: tl.constexpr,
    update: tl.constexpr,
    prepare: tl.constexpr,
    slope_regime: tl.constexpr,
    gradient: tl.constexpr,
    extremes: tl.constexpr,
    neutral: tl.constexpr,
    anchor: tl.constexpr,
    regime: tl.constexpr,
    terms: tl.constexpr,
    STATISTICS: tl.constexpr,
    EXTREMES: tl.constexpr,
    REGIMES: tl.constexpr,
    SLOPE_REGIMES: tl.constexpr,
    STATES: tl.constexpr,
    IS_NESTEROV: tl.constexpr,
    IS_MAXIMIZED: tl.constexpr,
    IS_DECOUPLED: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    STATE: tl.constexpr,
    COUNT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if not _is_skipped(found_inf):
        pid = tl.program_id(0).to(tl.int64)
        segment = tl.load(chunks + 2 * pid).to(tl.int64)
        number = tl.load(chunks + 2 * pid + 1).to(tl.int64)
        rate = load_scalar(lr, 0, 1)
        sign = _float64(-1.0 if IS_MAXIMIZED else 1.0)
        scale = (sign * _gradient_scale(grad_scale, clip_coefficient)).to(ACCUMULATOR)
        is_first = segment < 0 if started is None else tl.load(started + segment) == 0
        settings = (_float64(setting0), _float64(setting1), _float64(setting2))
        settings = settings + (_float64(setting3), _float64(setting4), _float64(setting5))
        step = _next_count(counts, segment, COUNT)
        rule = prepare_update(rate, settings, step, is_first, ACCUMULATOR)
        key = rounding_key(rounding_seed, segment, number) if IS_STOCHASTIC else ()
        RULE: tl.constexpr = (update, IS_NESTEROV, IS_DECOUPLED)
        SHAPE: tl.constexpr = (ACCUMULATOR, CHUNK, BLOCK, VECTOR)

        DTYPES: tl.constexpr = (DTYPE, GRADIENT, STATE)

        if STATISTICS == 0:
            place = _place(segment, number, segments, gradients, states, STATES, DTYPES, CHUNK)
            _update(place, (scale, rule, (), (), key), None, 0, RULE, (None, None, None), SHAPE)
        elif segment >= watched:
            place = _place(segment, number, segments, gradients, states, STATES, DTYPES, CHUNK)
            _update(place, (scale, rule, (), (), key), None, 0, RULE, (None, None, None), SHAPE)
        else:
            row = ()
            for field in tl.static_range(STATISTICS):
                row = row + (tl.load(statistics + segment * STATISTICS + field),)
            parameter = load_scalar(parameters, segment, parameter_stride)
            coefficient = load_scalar(coefficients, segment, coefficient_stride) * (rate if IS_DECOUPLED else sign)
            slopes = prepare(row, parameter, coefficient, ACCUMULATOR)
            # A penalty without extremes has its anchor from the parameter alone, and needs no second look.
            anchors = ()
            if EXTREMES == 0:
                anchors = anchor((), load_scalar(next_parameters, segment, next_parameter_stride), ACCUMULATOR)
            LOOK: tl.constexpr = (None, None, terms) if EXTREMES == 0 else (extremes, neutral, None)
            numbers = (scale, rule, slopes, anchors, key)
            place = _place(segment, number, segments, gradients, states, STATES, DTYPES, CHUNK)
            if maxima is not None:
                if tl.load(maxima + tl.load(segments + 3 * segment + 2) + number) < row[0]:
                    found = _update(place, numbers, None, 0, RULE, LOOK, SHAPE)
                else:
                    found = _update(place, numbers, gradient, 0, RULE, LOOK, SHAPE)
            elif SLOPE_REGIMES == 1:
                found = _update(place, numbers, gradient, 0, RULE, LOOK, SHAPE)
            else:
                tl.static_assert(SLOPE_REGIMES == 2)
                if slope_regime(slopes) == 0:
                    found = _update(place, numbers, gradient, 0, RULE, LOOK, SHAPE)
                else:
                    found = _update(place, numbers, gradient, 1, RULE, LOOK, SHAPE)
            LOOKS: tl.constexpr = (anchor, regime, terms, EXTREMES, REGIMES)
            _store_gathered(
                found, chunks, segments, next_parameters, next_parameter_stride, sums, all_chunks, LOOKS, DTYPE, SHAPE
            )


@triton.jit
def _place(
    segment, number, segments, gradients, states, STATES: tl.constexpr, DTYPES: tl.constexpr, CHUNK: tl.constexpr
):
    """A chunk's arrays, gradient, weight and states; its length; whether it may be loaded 16 bytes at a time."""
    length = tl.minimum(tl.load(segments + 3 * segment + 1) - number * CHUNK, CHUNK).to(tl.int32)
    weight, gradient = tl.load(segments + 3 * segment), tl.load(gradients + segment)
    arrays = (gradient.to(tl.pointer_type(DTYPES[1])) + number * CHUNK,)
    arrays = arrays + (weight.to(tl.pointer_type(DTYPES[0])) + number * CHUNK,)
    addresses = weight | gradient
    for state in tl.static_range(STATES):
        address = tl.load(states + segment * STATES + state)
        arrays = arrays + (address.to(tl.pointer_type(DTYPES[2])) + number * CHUNK,)
        addresses |= address
    return arrays, length, (length == CHUNK) & (addresses % 16 == 0)


@triton.jit
def _store_gathered(
    found,
    chunks,
    segments,
    parameters,
    parameter_stride,
    sums,
    all_chunks,
    LOOKS: tl.constexpr,
    DTYPE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """What the first look has found, and where it has found extremes the sums of a second one."""
    anchor: tl.constexpr = LOOKS[0]
    regime: tl.constexpr = LOOKS[1]
    terms: tl.constexpr = LOOKS[2]
    EXTREMES: tl.constexpr = LOOKS[3]
    CHUNK: tl.constexpr = SHAPE[1]
    # Loaded once more, as the update needs the registers.
    pid = tl.program_id(0).to(tl.int64)
    segment = tl.load(chunks + 2 * pid).to(tl.int64)
    number = tl.load(chunks + 2 * pid + 1).to(tl.int64)
    sums += tl.load(segments + 3 * segment + 2) + number
    if EXTREMES == 0:
        _store_fields(found, sums, all_chunks)
    else:
        address = tl.load(segments + 3 * segment)
        length = tl.minimum(tl.load(segments + 3 * segment + 1) - number * CHUNK, CHUNK).to(tl.int32)
        weights = address.to(tl.pointer_type(DTYPE)) + number * CHUNK
        anchors = anchor(found, load_scalar(parameters, segment, parameter_stride), SHAPE[0])
        for field in tl.static_range(EXTREMES):
            tl.store(sums + field * all_chunks, anchors[field])
        sums += EXTREMES * all_chunks
        # Other threads may look at an entry than the one that has stored it.
        tl.debug_barrier()
        chosen = regime(anchors)
        for REGIME in tl.static_range(LOOKS[4]):
            if chosen == REGIME:
                if (length == CHUNK) & (address % 16 == 0):
                    aligned = tl.multiple_of(weights, 16)
                    totals = _totals(aligned, CHUNK, True, terms, REGIME, anchors, SHAPE[0], SHAPE[2], SHAPE[3])
                else:
                    totals = _totals(weights, length, False, terms, REGIME, anchors, SHAPE[0], SHAPE[2], SHAPE[3])
                _store_fields(totals, sums, all_chunks)


@triton.jit
def _update(
    place,
    numbers,
    gradient: tl.constexpr,
    REGIME: tl.constexpr,
    RULE: tl.constexpr,
    LOOK: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Update a chunk; what has been gathered, as scalars."""
    arrays, length, is_aligned = place
    if is_aligned:
        found = _update_blocks(arrays, SHAPE[1], True, numbers, gradient, REGIME, RULE, LOOK, SHAPE)
    else:
        # Masks take registers, so in half blocks, unless these would change the order of sums.
        TAIL: tl.constexpr = (SHAPE[0], SHAPE[1], SHAPE[2] // 2 if LOOK[2] is None else SHAPE[2], SHAPE[3])
        found = _update_blocks(arrays, length, False, numbers, gradient, REGIME, RULE, LOOK, TAIL)
    return found


# numbers   of the chunk: the gradients' scale, the rule's constants, the penalty's, the anchor of the terms to gather,
#           what random bits follow from; empty where there are none
# gradient  the penalty's function, or None for no slope
# RULE      the rule's function, whether it is Nesterov's momentum, whether the slope does not go through it
# LOOK      what to gather: the penalty's extremes with their neutral elements, or its terms, or neither
# SHAPE     accumulator, chunk, block, vector
@triton.jit
def _update_blocks(
    arrays,
    length,
    IS_FULL: tl.constexpr,
    numbers,
    gradient: tl.constexpr,
    REGIME: tl.constexpr,
    RULE: tl.constexpr,
    LOOK: tl.constexpr,
    SHAPE: tl.constexpr,
):
    scale, rule, slopes, anchors, key = numbers
    update: tl.constexpr = RULE[0]
    ACCUMULATOR: tl.constexpr = SHAPE[0]
    BLOCK: tl.constexpr = SHAPE[2]
    VECTOR: tl.constexpr = SHAPE[3]
    found = _nothing(anchors, LOOK, ACCUMULATOR, BLOCK, VECTOR)
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = None if IS_FULL else offsets < length
        pointers = ()
        loaded = ()
        for array in tl.static_range(len(arrays)):
            block = arrays[array] + start
            if IS_FULL:
                block = tl.multiple_of(block, 16)
            pointers = pointers + (block + tl.arange(0, BLOCK),)
            entries = tl.load(pointers[array]) if IS_FULL else tl.load(pointers[array], mask=mask, other=0.0)
            loaded = loaded + (widened(entries, ACCUMULATOR),)
        g, w = loaded[0] * scale, loaded[1]
        if gradient is not None:
            pull = gradient(w, slopes, REGIME)
            if RULE[2]:
                w -= pull
            else:
                g += pull
        w, states = update(w, g, loaded[2:], rule, RULE[1])
        updated = (w,) + states
        for array in tl.static_range(len(updated)):
            stored = _rounded(updated[array], arrays[array + 1].dtype.element_ty, key, offsets, array)
            tl.store(pointers[array + 1], stored, mask=mask)
            if array == 0:
                found = _joined(found, widened(stored, ACCUMULATOR), mask, anchors, LOOK, BLOCK, VECTOR)
    return _reduced(found, LOOK)


@triton.jit
def _rounded(values, dtype: tl.constexpr, key, offsets, ARRAY: tl.constexpr):
    """Entries as they are stored in the array of that number, by a key stochastically."""
    if dtype == tl.bfloat16 and len(key) > 0:
        stored = rounded_stochastically(values.to(tl.float32), key, offsets, ARRAY)
    else:
        stored = narrowed(values, dtype)
    return stored


# Gathering, block by block as ``reduce_chunks`` does.


@triton.jit
def _nothing(anchors, LOOK: tl.constexpr, dtype: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """What gathering starts from, in lanes."""
    extremes: tl.constexpr = LOOK[0]
    neutral: tl.constexpr = LOOK[1]
    terms: tl.constexpr = LOOK[2]
    found = ()
    if extremes is not None:
        found = neutral(BLOCK // VECTOR, dtype)
    if terms is not None:
        for _ in tl.static_range(len(terms(tl.zeros((BLOCK,), dtype), anchors, 0))):
            found = found + (tl.zeros((BLOCK // VECTOR,), dtype),)
    return found


@triton.jit
def _joined(found, w, mask, anchors, LOOK: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """What has been found, and a block more."""
    extremes: tl.constexpr = LOOK[0]
    neutral: tl.constexpr = LOOK[1]
    terms: tl.constexpr = LOOK[2]
    joined = ()
    if extremes is not None:
        values = extremes(w)
        otherwise = neutral(BLOCK, w.dtype)
        for field in tl.static_range(len(values)):
            value = values[field] if mask is None else tl.where(mask, values[field], otherwise[field])
            value = tl.reshape(value, (BLOCK // VECTOR, VECTOR))
            if field == 0:
                joined = joined + (tl.maximum(found[field], tl.max(value, axis=1)),)
            else:
                joined = joined + (tl.minimum(found[field], tl.min(value, axis=1)),)
    if terms is not None:
        values = terms(w, anchors, 0)
        for field in tl.static_range(len(values)):
            value = values[field] if mask is None else tl.where(mask, values[field], 0.0)
            joined = joined + (found[field] + tl.sum(tl.reshape(value, (BLOCK // VECTOR, VECTOR)), axis=1),)
    return joined


@triton.jit
def _reduced(found, LOOK: tl.constexpr):
    """What has been found in all lanes, as scalars."""
    extremes: tl.constexpr = LOOK[0]
    reduced = ()
    for field in tl.static_range(len(found)):
        if extremes is None:
            reduced = reduced + (tl.sum(found[field], axis=0),)
        elif field == 0:
            reduced = reduced + (tl.max(found[field], axis=0),)
        else:
            reduced = reduced + (tl.min(found[field], axis=0),)
    if len(found) == 0:
        reduced = (tl.full((), 0, tl.int32),)  # The compiler has no branches that yield an empty tuple.
    return reduced


@triton.jit
def _store_fields(fields, sums, all_chunks):
    for field in tl.static_range(len(fields)):
        tl.store(sums + field * all_chunks, fields[field])


@triton.jit
def _float64(number):
    """A setting as a float64 scalar: to the interpreter it is a number of Python's."""
    return tl.full((), number, tl.float64)


@triton.jit
def _gradient_scale(grad_scale, clip_coefficient):
    scale = _float64(1.0)
    if clip_coefficient is not None:
        scale = load_scalar(clip_coefficient, 0, 1)
    if grad_scale is not None:
        scale /= load_scalar(grad_scale, 0, 1)
    return scale


@triton.jit
def _is_skipped(found_inf):
    """Whether the step must not happen."""
    is_skipped = False
    if found_inf is not None:
        is_skipped = tl.load(found_inf) != 0
    return is_skipped


@triton.jit
def _count_pointer(counts, segment, COUNT: tl.constexpr):
    return tl.load(counts + segment).to(tl.pointer_type(COUNT))


@triton.jit
def _next_count(counts, segment, COUNT: tl.constexpr):
    """Which step of its tensor this is, from 1 on; 1 where steps are not counted."""
    if counts is None:
        step = _float64(1.0)
    else:
        step = tl.load(_count_pointer(counts, segment, COUNT)).to(tl.float64) + 1
    return step


# rows          int32 (tensors of this combination,): their rows in ``segments``
# counts, found_inf, watched, COUNT   as above; the counts are written
# and what ``merge_chunks`` takes, with ``parameters`` those that the sums were gathered with
@triton.jit(do_not_specialize=["watched"])
def finish_tensors(
    rows,
    counts,
    found_inf,
    watched,
    segments,
    parameters,
    parameter_stride,
    sums,
    all_chunks,
    statistics,
    values,
    maxima,
    neutral: tl.constexpr,
    convert: tl.constexpr,
    finalize: tl.constexpr,
    EXTREMES: tl.constexpr,
    STATISTICS: tl.constexpr,
    SUMS: tl.constexpr,
    COUNT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    if not _is_skipped(found_inf):
        segment = tl.load(rows + tl.program_id(0)).to(tl.int64)
        if counts is not None:
            step = _next_count(counts, segment, COUNT)
            tl.store(_count_pointer(counts, segment, COUNT), step.to(COUNT))
        if SUMS > 0:
            if segment < watched:
                merge_chunks(
                    rows,
                    segments,
                    parameters,
                    parameter_stride,
                    sums,
                    all_chunks,
                    statistics,
                    values,
                    None,
                    maxima,
                    neutral,
                    convert,
                    finalize,
                    EXTREMES,
                    STATISTICS,
                    SUMS,
                    ACCUMULATOR,
                    CHUNK,
                    LANES,
                )
