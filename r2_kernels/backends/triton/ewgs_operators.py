"""The operators of ``ewgs_ops.py`` on a GPU: one launch each, and backward a sum over the blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from r2_kernels.backends.triton import operators
from r2_kernels.backends.triton.checks import check_scalars, check_stored
from r2_kernels.backends.triton.ewgs_kernels import ewgs_backward_kernel, ewgs_forward_kernel
from r2_kernels.backends.triton.penalty_functions import accumulator
from r2_kernels.layout import is_dense

BLOCK = 1024


def ewgs_forward(values: Tensor, ends: Tensor, levels: int) -> Tensor:
    _check(values, ends, levels)
    values, ends = _dense(values), ends.contiguous()
    outputs = torch.empty_like(values)
    count = values.numel()
    if count:
        constants = _constants(values, levels)
        arguments = (values, ends, outputs, count)
        with operators.on_device(values.device):
            operators.launch(ewgs_forward_kernel, triton.cdiv(count, BLOCK), arguments, constants)
    return outputs


def ewgs_backward(values: Tensor, ends: Tensor, gradient: Tensor, levels: int, delta: float) -> tuple[Tensor, Tensor]:
    _check(values, ends, levels)
    check_stored(gradient, "gradient", values.device, (values.dtype,))
    if gradient.shape != values.shape:
        raise RuntimeError(f"gradient: expected the shape of the values, {tuple(values.shape)}")
    values, ends = _dense(values), ends.contiguous()
    gradient = torch.empty_like(values).copy_(gradient) if gradient.stride() != values.stride() else gradient
    result, count = torch.empty_like(values), values.numel()
    sums = ends.new_empty((triton.cdiv(count, BLOCK), 4), dtype=torch.float64)
    if count:
        constants = _constants(values, levels) | {"DELTA": delta}
        arguments = (values, ends, gradient, result, sums, count)
        with operators.on_device(values.device):
            operators.launch(ewgs_backward_kernel, len(sums), arguments, constants)
    return result, sums.sum(0)


def _constants(values: Tensor, levels: int) -> dict[str, Any]:
    return {"STEPS": float(levels - 1), "DTYPE": accumulator(values.dtype), "BLOCK": BLOCK}


def _check(values: Tensor, ends: Tensor, levels: int) -> None:
    check_stored(values, "values[0]", values.device)
    check_scalars(ends, "ends", 4, values.device)
    if not 2 <= levels <= 65536:
        raise RuntimeError(f"levels: expected 2 to 65536, got {levels}")


def _dense(values: Tensor) -> Tensor:
    return values if is_dense(values) else values.contiguous()
