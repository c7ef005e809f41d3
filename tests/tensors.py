"""Weights to test with: every size, dtype, layout and value that has broken a multi-tensor kernel somewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from r2_kernels.penalties import CHUNK_SIZE

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Around the widths of vectors, blocks and chunks. The last, tested where nothing is interpreted, spans many chunks.
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 255, 257, 1023, 1025, 4095, 4097)
CHUNK_BORDERS = (
    CHUNK_SIZE - 1,
    CHUNK_SIZE,
    CHUNK_SIZE + 1,
    2 * CHUNK_SIZE - 1,
    2 * CHUNK_SIZE,
    2 * CHUNK_SIZE + 1,
    3 * CHUNK_SIZE + 7,
)


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Normal entries, drawn on the CPU so that every backend sees the same."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device)


def leaves(weights: Iterable[Tensor]) -> list[Tensor]:
    """The same tensors, in the same memory and layout, as leaves that require a gradient."""
    return [weight.detach().requires_grad_() for weight in weights]


def with_offset(weight: Tensor, offset: int) -> Tensor:
    """A contiguous copy that starts ``offset`` elements into its storage."""
    storage = torch.full((weight.numel() + offset,), 99.0, dtype=weight.dtype, device=weight.device)
    copy = storage[offset:].view(weight.shape)
    copy.copy_(weight)
    return copy


def _transposed(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(37, 53, dtype=dtype, device=device).t()


def _permuted(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(5, 6, 7, dtype=dtype, device=device).permute(2, 0, 1)


def _channels_last(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(8, 6, 3, 3, dtype=dtype, device=device).to(memory_format=torch.channels_last)


def _channels_last_chunks(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(64, 33, 3, 3, dtype=dtype, device=device).to(memory_format=torch.channels_last)


def _expanded(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(17, 1, dtype=dtype, device=device).expand(17, 23)


def _expanded_scalar(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(1, dtype=dtype, device=device).expand(100)


def _every_third(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(300, dtype=dtype, device=device)[1::3]


def _inner_columns(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(40, 50, dtype=dtype, device=device)[3:, 5:44]


def _strided_both_ways(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(40, 50, dtype=dtype, device=device)[::2, ::5].t()


def _diagonal(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(40, 40, dtype=dtype, device=device).diagonal()


def _unfolded(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(40, dtype=dtype, device=device).unfold(0, 8, 4)


def _with_offset(dtype: torch.dtype, device: torch.device) -> Tensor:
    return with_offset(randn(11, 13, dtype=dtype, device=device), 3)


def _zero_dimensional(dtype: torch.dtype, device: torch.device) -> Tensor:
    return randn(1, dtype=dtype, device=device).reshape(())


LAYOUTS: dict[str, Callable[[torch.dtype, torch.device], Tensor]] = {
    "transposed": _transposed,
    "permuted": _permuted,
    "channels_last": _channels_last,
    "channels_last_chunks": _channels_last_chunks,
    "expanded": _expanded,
    "expanded_scalar": _expanded_scalar,
    "every_third": _every_third,
    "inner_columns": _inner_columns,
    "strided_both_ways": _strided_both_ways,
    "diagonal": _diagonal,
    "overlapping_unfold": _unfolded,
    "with_offset": _with_offset,
    "zero_dimensional": _zero_dimensional,
}


def tied(dtype: torch.dtype, device: torch.device, size: int = 2 * CHUNK_SIZE + 100) -> Tensor:
    """Few distinct values, each many times and with either sign, in every chunk."""
    levels = torch.tensor([-2.0, -1.5, -0.25, 0.0, 0.25, 1.5, 2.0], dtype=torch.float64)
    return levels[torch.randint(0, 7, (size,))].to(dtype).to(device)
