"""What the operators ask of their arguments, said before a kernel is launched, as the C++ operators say it.

What is asked of lists of tensors is asked when a table is built, so that a step with known tensors pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r2_kernels.layout import overlaps_itself
from r2_kernels.penalties import Penalty
from r2_kernels.validation import FLOATING_DTYPES


def check_weights(weights: Sequence[Tensor]) -> None:
    device = weights[0].device
    for index, weight in enumerate(weights):
        check_stored(weight, f"weights[{index}]", device)


def check_gradients(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for index, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        name = f"gradients[{index}]"
        check_stored(gradient, name, weights[0].device)
        if gradient.dtype != weight.dtype:
            raise RuntimeError(f"{name}: expected the dtype of its weight, {weight.dtype}, got {gradient.dtype}")
        if gradient.shape != weight.shape:
            expected, got = tuple(weight.shape), tuple(gradient.shape)
            raise RuntimeError(f"{name}: expected the shape of its weight, {expected}, got {got}")
        if overlaps_itself(gradient):
            raise RuntimeError(f"{name}: expected one memory location per entry, got strides {gradient.stride()}")


def check_parameter(
    parameter: Tensor | None, penalty: Penalty, count: int, device: torch.device, name: str = "parameter"
) -> None:
    if (parameter is None) != (penalty.parameter is None):
        expected = "None" if penalty.parameter is None else "a tensor"
        raise RuntimeError(f"{name}: expected {expected} for penalty {penalty.name!r}")
    if parameter is not None:
        check_scalars(parameter, name, count, device)


def check_scalars(scalars: Tensor, name: str, count: int, device: torch.device) -> None:
    if scalars.shape != (count,) or scalars.device != device:
        got = f"shape {tuple(scalars.shape)} on {scalars.device}"
        raise RuntimeError(f"{name}: expected a tensor of shape ({count},) on {device}, got {got}")
    if scalars.dtype is not torch.float32 and scalars.dtype is not torch.float64:
        raise RuntimeError(f"{name}: expected dtype float32 or float64, got {scalars.dtype}")


def check_float64(tensor: Tensor, name: str, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape:
        raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype is not torch.float64 or tensor.device != device:
        raise RuntimeError(f"{name}: expected a float64 tensor on {device}, got {tensor.dtype} on {tensor.device}")


def check_stored(
    tensor: Tensor, name: str, device: torch.device, dtypes: Sequence[torch.dtype] = FLOATING_DTYPES
) -> None:
    if tensor.device != device:
        raise RuntimeError(f"{name}: expected a tensor on {device}, got {tensor.device}")
    if tensor.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise RuntimeError(f"{name}: expected dtype {', '.join(others)} or {last}, got {tensor.dtype}")
