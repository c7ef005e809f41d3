"""The kernel that applies: the gradients of all chunks, written, or added to the gradients that are there."""

from __future__ import annotations

import triton
import triton.language as tl

from r2_kernels.backends.triton.reduce_kernels import load_scalar
from r2_kernels.backends.triton.storage import narrowed, widened


# chunks, segments, parameters   as in ``reduce_kernels.py``
# destinations   int64 (N,): the address of each segment's gradient, of dtype DTYPE, laid out as its weight
# coefficients   float32 or float64, stride ``coefficient_stride``, (N,): what the gradients are multiplied with
# statistics     float64 (N, STATISTICS)
# maxima         float64 (all_chunks,), or None: chunks whose own is below their segment's have no gradient
# ADD            whether to add to the gradients that are there, or to write all of them
@triton.jit
def apply_chunks(
    chunks,
    segments,
    destinations,
    parameters,
    parameter_stride,
    coefficients,
    coefficient_stride,
    statistics,
    maxima,
    prepare: tl.constexpr,
    slope_regime: tl.constexpr,
    gradient: tl.constexpr,
    SLOPE_REGIMES: tl.constexpr,
    STATISTICS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    segment = tl.load(chunks + 2 * pid).to(tl.int64)
    number = tl.load(chunks + 2 * pid + 1).to(tl.int64)
    address = tl.load(segments + 3 * segment)
    numel = tl.load(segments + 3 * segment + 1)
    destination = tl.load(destinations + segment)
    row = ()
    for field in tl.static_range(STATISTICS):
        row = row + (tl.load(statistics + segment * STATISTICS + field),)
    has_gradient = True
    if maxima is not None:
        first = tl.load(segments + 3 * segment + 2)
        has_gradient = not (tl.load(maxima + first + number) < row[0])
    if has_gradient or not ADD:
        parameter = load_scalar(parameters, segment, parameter_stride)
        coefficient = load_scalar(coefficients, segment, coefficient_stride)
        constants = prepare(row, parameter, coefficient, ACCUMULATOR)
        length = tl.minimum(numel - number * CHUNK, CHUNK).to(tl.int32)
        weights = address.to(tl.pointer_type(DTYPE)) + number * CHUNK
        gradients = destination.to(tl.pointer_type(DTYPE)) + number * CHUNK
        chosen = slope_regime(constants)
        for REGIME in tl.static_range(SLOPE_REGIMES):
            if chosen == REGIME:
                if (length == CHUNK) & ((address | destination) % 16 == 0):
                    w, g = tl.multiple_of(weights, 16), tl.multiple_of(gradients, 16)
                    _apply(w, g, CHUNK, True, gradient, constants, REGIME, ACCUMULATOR, BLOCK, ADD)
                else:
                    _apply(weights, gradients, length, False, gradient, constants, REGIME, ACCUMULATOR, BLOCK, ADD)


@triton.jit
def _apply(
    weights,
    gradients,
    length,
    IS_FULL: tl.constexpr,
    gradient: tl.constexpr,
    constants,
    REGIME: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """The gradients of a chunk, block by block."""
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = None if IS_FULL else offsets < length
        result = gradient(widened(tl.load(weights + offsets, mask=mask), ACCUMULATOR), constants, REGIME)
        if ADD:
            result += widened(tl.load(gradients + offsets, mask=mask), ACCUMULATOR)
        tl.store(gradients + offsets, narrowed(result, gradients.dtype.element_ty), mask=mask)
