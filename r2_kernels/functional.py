"""The penalties as functions: a list of weights in, one value per weight out, differentiable.

Source of the formulas: Kundu, Yoo, Mishra, Cho and Adya, "R²: Range Regularization for Model Compression and
Quantization", arXiv 2303.08253; closed forms of the gradients in ``docs/derivation.md``.

All three take a sequence of N tensors of any shapes on one device, of dtype float32, bfloat16, float16 or float64,
mixed allowed; dense layouts (transposed, channels-last) are read in place, others are copied. They return shape (N,),
float32, or float64 where a weight is float64, whatever is summed being accumulated in float32 or wider. A NaN in one
weight makes that weight's value NaN and leaves the others as they are. Gradients are first-order only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from r2_kernels import ops
from r2_kernels.validation import check_parameter, check_weights


def linf(weights: Sequence[Tensor]) -> Tensor:
    """``max|w|`` of each weight. Entries that tie for the maximum share the gradient evenly, as in ``torch.amax``.

    Args:
        weights: N tensors, as the module's text says.

    Returns:
        The N values, shape (N,).

    Raises:
        TypeError: ``weights`` is no sequence of dense floating-point tensors.
        ValueError: no weights, one without elements, or weights on several devices.
    """
    check_weights(weights)
    return ops.PenaltyFunction.apply("linf", None, *weights)


def margin(weights: Sequence[Tensor], margin: Tensor) -> Tensor:
    """``|M| + sum(max(|w| - |M|, 0))`` of each weight: what lies outside a margin M that shrinks on its own.

    Args:
        weights: N tensors, as the module's text says.
        margin: M of each weight, shape (N,), floating-point, in units of the weights; differentiable, with gradient
            ``sign(M)·(1 - how many |w| exceed |M|)``.

    Returns:
        The N values, shape (N,).

    Raises:
        TypeError: ``weights`` or ``margin`` is no floating-point tensor where one is expected.
        ValueError: no weights, one without elements, another shape than (N,), or several devices.
    """
    check_weights(weights)
    check_parameter(margin, "margin", weights)
    return ops.PenaltyFunction.apply("margin", margin, *weights)


def soft_min_max(weights: Sequence[Tensor], temperature: Tensor) -> Tensor:
    """``s_max - s_min + exp(-a)`` of each weight: a smooth range, max w - min w as the temperature a grows.

    ``s_max`` is the mean of w under softmax(a·w), ``s_min`` that under softmax(-a·w); exp(-a) drives a learnable
    temperature up. At a = 0 the value is 1 and w has no gradient.

    Args:
        weights: N tensors, as the module's text says.
        temperature: a of each weight, shape (N,), floating-point, in units of one over the weights'; differentiable,
            with gradient ``Var_p(w) + Var_q(w) - exp(-a)``. Negative ones are allowed.

    Returns:
        The N values, shape (N,).

    Raises:
        TypeError: ``weights`` or ``temperature`` is no floating-point tensor where one is expected.
        ValueError: no weights, one without elements, another shape than (N,), or several devices.
    """
    check_weights(weights)
    check_parameter(temperature, "temperature", weights)
    return ops.PenaltyFunction.apply("soft_min_max", temperature, *weights)
