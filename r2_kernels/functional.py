"""The penalties as functions: a list of weights in, one value per segment out, differentiable.

Source of the formulas: Kundu, Yoo, Mishra, Cho and Adya, "R²: Range Regularization for Model Compression and
Quantization", arXiv 2303.08253; closed forms of the gradients in ``docs/derivation.md``.

All take a sequence of N tensors of any shapes on one device, of dtype float32, bfloat16, float16 or float64,
mixed allowed; dense layouts (transposed, channels-last) are read in place, others are copied. They return a value per
segment, float32, or float64 where a weight is float64, whatever is summed being accumulated in float32 or wider. A NaN
makes its segment's value NaN and leaves the others as they are. Gradients are first-order only.

A segment is what ``granularity`` says: ``"tensor"``, a weight; ``"channel"``, an output channel, an index of dimension
0; an integer n, n consecutive entries of a channel, each weight being seen as (channels, inputs · kernel), the last
group of a channel shorter where n does not divide. A weight of fewer than two dimensions is one channel. The values of
all segments are one tensor of shape (segments,), weight by weight and channel by channel;
``values.split(segment_counts(weights, granularity))`` are each weight's. Weights that are transposed
are copied for channels and groups, channels-last ones for groups.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from r2_kernels import ops
from r2_kernels.distributed import check_shards
from r2_kernels.granularity import Granularity, group_size_of
from r2_kernels.penalties import by_name
from r2_kernels.validation import check_parameter, check_weights


def linf(weights: Sequence[Tensor], *, granularity: Granularity = "tensor") -> Tensor:
    """``max|w|`` of each segment. Entries that tie for the maximum share the gradient evenly, as in ``torch.amax``.

    Args:
        weights: N tensors, as the module's text says.
        granularity: what a segment is: ``"tensor"``, ``"channel"`` or the size of a group.

    Returns:
        The values, shape (segments,).

    Raises:
        TypeError: ``weights`` is no sequence of dense floating-point tensors.
        ValueError: no weights, one without elements, weights on several devices, or no granularity.
    """
    return _values("linf", weights, None, granularity)


def margin(weights: Sequence[Tensor], margin: Tensor, *, granularity: Granularity = "tensor") -> Tensor:
    """``|M| + sum(max(|w| - |M|, 0))`` of each segment: what lies outside a margin M that shrinks on its own.

    Args:
        weights: N tensors, as the module's text says.
        margin: M of each segment, shape (segments,), or of each weight, shape (N,), which all its segments share;
            floating-point, in units of the weights; differentiable, with gradient
            ``sign(M)·(1 - how many |w| exceed |M|)``.
        granularity: what a segment is: ``"tensor"``, ``"channel"`` or the size of a group.

    Returns:
        The values, shape (segments,).

    Raises:
        TypeError: ``weights`` or ``margin`` is no floating-point tensor where one is expected.
        ValueError: no weights, one without elements, another shape, several devices, or no granularity.
    """
    return _values("margin", weights, margin, granularity)


def kurtosis(weights: Sequence[Tensor], *, granularity: Granularity = "tensor") -> Tensor:
    """``(K - 1.8)^2`` of each segment, K its kurtosis: KURE, which pulls weights towards a uniform distribution.

    Source: Shkolnik et al., "Robust Quantization: One Model to Rule Them All", arXiv 2002.07686. ``K`` is
    ``mean(((w - mean(w)) / std(w))^4)``, 1.8 for uniform weights and 3 for normal ones; a segment whose entries are all
    equal has the value 0 and no gradient. Computed in float64 whatever the weights' dtype.

    Args:
        weights: N tensors, as the module's text says.
        granularity: what a segment is: ``"tensor"``, ``"channel"`` or the size of a group.

    Returns:
        The values, shape (segments,).

    Raises:
        TypeError: ``weights`` is no sequence of dense floating-point tensors.
        ValueError: no weights, one without elements, weights on several devices, or no granularity.
    """
    return _values("kurtosis", weights, None, granularity)


def soft_min_max(weights: Sequence[Tensor], temperature: Tensor, *, granularity: Granularity = "tensor") -> Tensor:
    """``s_max - s_min + exp(-a)`` of each segment: a smooth range, max w - min w as the temperature a grows.

    ``s_max`` is the mean of w under softmax(a·w), ``s_min`` that under softmax(-a·w); exp(-a) drives a learnable
    temperature up. At a = 0 the value is 1 and w has no gradient.

    Args:
        weights: N tensors, as the module's text says.
        temperature: a of each segment, shape (segments,), or of each weight, shape (N,), which all its segments share;
            floating-point, in units of one over the weights'; differentiable, with gradient
            ``Var_p(w) + Var_q(w) - exp(-a)``. Negative ones are allowed.
        granularity: what a segment is: ``"tensor"``, ``"channel"`` or the size of a group.

    Returns:
        The values, shape (segments,).

    Raises:
        TypeError: ``weights`` or ``temperature`` is no floating-point tensor where one is expected.
        ValueError: no weights, one without elements, another shape, several devices, or no granularity.
    """
    return _values("soft_min_max", weights, temperature, granularity)


def _values(penalty: str, weights: Sequence[Tensor], parameter: Tensor | None, granularity: Granularity) -> Tensor:
    check_weights(weights)
    group_size = group_size_of(granularity)
    check_shards(weights, group_size)
    name = by_name(penalty).parameter
    if name is not None:
        check_parameter(parameter, name, weights, granularity)
    return ops.PenaltyFunction.apply(penalty, group_size, parameter, *weights)
