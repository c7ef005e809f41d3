"""What is asked of the arguments, said before anything is touched: which argument, which tensor, what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r2_kernels.granularity import Granularity, segment_counts

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_weights(weights: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
    """Raise unless ``weights`` is a non-empty sequence of dense floating-point tensors on one device.

    ``names`` are what the errors call the tensors; without them they are called by index.

    Raises:
        TypeError: not a sequence, not tensors, or a dtype or layout that has no range to regularize.
        ValueError: an empty sequence, a tensor without elements, or tensors on several devices.
    """
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"weights: expected a list or tuple of tensors, got {type(weights).__name__}")
    if not weights:
        raise ValueError("weights: expected at least one tensor, got an empty list")
    device = None
    for index, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{_called(index, names)}: expected a tensor, got {type(weight).__name__}")
        if weight.layout is not torch.strided:
            raise TypeError(f"{_called(index, names)}: expected a dense (strided) tensor, got layout {weight.layout}")
        if weight.dtype not in FLOATING_DTYPES:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)
            raise TypeError(f"{_called(index, names)}: expected dtype {expected}, got {weight.dtype}")
        if weight.numel() == 0:
            raise ValueError(f"{_called(index, names)}: expected at least one element, got shape {tuple(weight.shape)}")
        if device is None:
            device = weight.device
        elif weight.device != device:
            raise ValueError(
                f"{_called(index, names)}: expected device {device} of {_called(0, names)}, got {weight.device}"
            )


def check_parameter(
    parameter: object, name: str, weights: Sequence[Tensor], granularity: Granularity = "tensor"
) -> None:
    """Raise unless ``parameter`` (called ``name``) is a floating-point tensor on the weights' device, of shape (N,).

    Or where the granularity makes M segments of the N weights, of shape (M,).

    Raises:
        TypeError: not a tensor, or not of a floating-point dtype.
        ValueError: another shape, or another device than the weights'.
    """
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape ({len(weights)},), got {type(parameter).__name__}")
    if parameter.layout is not torch.strided or parameter.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name}: expected a dense floating-point tensor, got {parameter.dtype}, {parameter.layout}")
    if tuple(parameter.shape) != (len(weights),):
        count = sum(segment_counts(weights, granularity))
        if tuple(parameter.shape) != (count,):
            per_segment = "" if granularity == "tensor" else f", or ({count},), one per segment"
            raise ValueError(
                f"{name}: expected shape ({len(weights)},), one entry per weight{per_segment}, "
                f"got {tuple(parameter.shape)}"
            )
    if parameter.device != weights[0].device:
        raise ValueError(f"{name}: expected device {weights[0].device} of the weights, got {parameter.device}")


def value_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the penalties' values: float32, or float64 where a weight is float64."""
    return torch.float64 if any(weight.dtype is torch.float64 for weight in weights) else torch.float32


def _called(index: int, names: Sequence[str] | None) -> str:
    return f"weights[{index}]" if names is None else f"weights[{index}] ({names[index]!r})"
