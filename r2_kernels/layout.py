"""How a tensor's entries lie in memory, by its sizes and strides alone."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill one block of memory, each place once, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    reach = 1
    for stride, size in _dimensions(tensor):
        if stride != reach:
            return False
        reach *= size
    return True


def empty_dense_like(tensor: Tensor) -> Tensor:
    """Uninitialized, of the same shape and dtype, and laid out as the tensor where that is dense."""
    return torch.empty_like(tensor) if is_dense(tensor) else tensor.new_empty(tensor.shape)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether some entries share memory; where it says no, none do."""
    reach = 1
    for stride, size in _dimensions(tensor):
        if stride < reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """Stride and size of those with more than one entry, the shortest stride first."""
    return sorted(pair for pair in zip(tensor.stride(), tensor.shape, strict=True) if pair[1] != 1)
