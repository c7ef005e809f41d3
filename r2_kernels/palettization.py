"""Palettes: a weight whose entries take few values, which are learned while a network is trained.

Source: Cho, Alizadeh-Vahid, Adya and Rastegari, "DKM: Differentiable K-Means Clustering Layer for Neural Network
Compression", arXiv 2108.12659, in the form of coremltools' ``DKMPalettizer`` (9.0) with its default options;
``docs/palettization.md`` derives the gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r2_kernels import dkm_ops
from r2_kernels.attention import MOST_CLUSTERS
from r2_kernels.validation import FLOATING_DTYPES, value_dtype

_EXPECTED_DTYPES = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)


def dkm(weight: Tensor, centroids: Tensor, temperature: float = 1e-4, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """The entries of a weight drawn to their centroids, and the centroids for the next step.

    In an iteration each entry w pays each of K centroids c an attention, ``softmax(-(w - c)² / temperature)`` over the
    centroids, but 1e-7 at least, and the centroids become the means of the entries under that attention. The
    outputs are the sums of the last centroids under the attention to those before. All iterations are differentiated
    through; the centroids given are constants. The matrix of attention, n x K, exists for a few entries at a
    time: beside the outputs and gradients of n entries, memory is a few numbers per centroid and 16,384 entries.

    As in coremltools' ``DKMPalettizer``, 1e-7 is taken off the squared distance to centroid 0; the iterations end
    early, after the second at the soonest, where the sum over the entries of the distance to the nearest centroid
    changes by at most 1e-4; and of centroids that are equal one is first moved halfway to the next larger
    one. Whatever the dtype, distances and attention are computed in float32, or in float64 where the weight is
    float64. A NaN in the weight, or an infinity, makes all outputs NaN. Gradients are first-order only.

    Args:
        weight: any shape, of dtype float32, bfloat16, float16 or float64. Where it is empty, centroids stay.
        centroids: (K,), 1 to 256 of them, floating-point, on the weight's device, in units of the weight: from
            k-means at first, then those that the last step returned.
        temperature: in units of the weight, squared; the attention of an entry is shared where the distances to two
            centroids differ by not much more.
        iterations: how many there are at most.

    Returns:
        The outputs, of the weight's shape and dtype, and the last centroids, (K,), float32, or float64 where the
        weight is float64, which have no gradient.

    Raises:
        TypeError: not a dense floating-point tensor, or not a number.
        ValueError: another shape or device, centroids that require a gradient, or a number out of range.
    """
    _check_weight(weight)
    _check_centroids(centroids, weight.device)
    _check_numbers(temperature, iterations)
    starts = _apart(centroids.to(value_dtype([weight])))
    outputs, last = dkm_ops.DkmFunction.apply(weight, starts, float(temperature), iterations)
    return outputs, last


def _apart(centroids: Tensor) -> Tensor:
    """The first of those that are equal in float32 moved halfway to the next larger one; the largest, to the least."""
    narrow = centroids.float()
    is_same = narrow[:, None] == narrow
    is_first_of_many = (is_same.sum(1) > 1) & ~is_same.tril(-1).any(1)
    is_larger = narrow > narrow[:, None]
    next_larger = torch.where(is_larger, narrow, torch.inf).amin(1)
    following = torch.where(is_larger.any(1), next_larger, narrow.amin())
    return torch.where(is_first_of_many, (0.5 * (narrow + following)).to(centroids.dtype), centroids)


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    if weight.layout is not torch.strided or weight.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"weight: expected a dense tensor of dtype {_EXPECTED_DTYPES}, got {weight.dtype}, {weight.layout}"
        )


def _check_centroids(centroids: Tensor, device: torch.device) -> None:
    if not isinstance(centroids, Tensor):
        raise TypeError(f"centroids: expected a tensor, got {type(centroids).__name__}")
    if centroids.layout is not torch.strided or centroids.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"centroids: expected a dense tensor of dtype {_EXPECTED_DTYPES}, got {centroids.dtype}, {centroids.layout}"
        )
    if centroids.dim() != 1 or not 1 <= len(centroids) <= MOST_CLUSTERS:
        raise ValueError(
            f"centroids: expected shape (K,) with K from 1 to {MOST_CLUSTERS}, got {tuple(centroids.shape)}"
        )
    if centroids.device != device:
        raise ValueError(f"centroids: expected device {device} of the weight, got {centroids.device}")
    if centroids.requires_grad:
        raise ValueError("centroids: expected no gradient, as they are constants; detach them")


def _check_numbers(temperature: float, iterations: int) -> None:
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        raise TypeError(f"temperature: expected a number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if not isinstance(iterations, int) or isinstance(iterations, bool):
        raise TypeError(f"iterations: expected an integer, got {type(iterations).__name__}")
    if iterations < 1:
        raise ValueError(f"iterations: expected 1 or more, got {iterations}")
