"""The table on the device that tells a launch where the channels or groups of a list of weights are, in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from r2_kernels.backends.triton.checks import check_weights
from r2_kernels.backends.triton.chunk_table import strides_of, upload
from r2_kernels.granularity import PER_CHANNEL, are_consecutive, channel_count, counts_of

# Entries that a program looks at at a time, of one long segment or of several.
TILE = 1024
SHORTEST_BLOCK = 16
# Segments that a program computes what is needed once for each of, a lane for each.
LANES = 128


class TileGroup(NamedTuple):
    """The weights of one dtype whose segments a program looks at ``block`` entries at a time: what one launch works on.

    ``tiles`` is int32 (tiles, 2), a row per tile of TILE / block segments: its weight's index in the list, and its
    number within the weight. ``lanes`` is the same for tiles of LANES segments.
    """

    dtype: torch.dtype
    block: int
    tiles: Tensor
    lanes: Tensor


class SegmentTable:
    """Where the segments of a list of weights are, as ``segment_kernels.py`` has it.

    ``copied`` are the indices of the weights whose segments do not follow one another in memory: a table is made of
    contiguous copies of these.
    """

    def __init__(self, weights: Sequence[Tensor], group_size: int) -> None:
        check_weights(weights)
        self.copied = [index for index, weight in enumerate(weights) if not are_consecutive(weight, group_size)]
        self.strides = [strides_of(weight) for weight in weights]
        if self.copied:
            return
        counts = counts_of(weights, group_size)
        self.count = sum(counts)
        rows: list[tuple[int, ...]] = []
        owners: dict[tuple[torch.dtype, int], list[tuple[Tensor, Tensor]]] = {}
        first = 0
        for index, (weight, count) in enumerate(zip(weights, counts, strict=True)):
            channel_size = weight.numel() // channel_count(weight) if weight.numel() else 0
            size = channel_size if group_size == PER_CHANNEL else min(group_size, channel_size)
            per_channel = count // channel_count(weight) if weight.numel() else 1
            rows.append((weight.data_ptr(), channel_size, size, per_channel, count, first))
            block = min(max(SHORTEST_BLOCK, 1 << (size - 1).bit_length() if size else 1), TILE)
            owners.setdefault((weight.dtype, block), []).append(
                (_numbered(index, count, TILE // block), _numbered(index, count, LANES))
            )
            first += count
        device = weights[0].device
        self.weights = upload(torch.tensor(rows, dtype=torch.int64), device)
        self.groups = [
            TileGroup(*key, *(upload(torch.cat(parts), device) for parts in zip(*of_weights, strict=True)))
            for key, of_weights in owners.items()
        ]
        self.is_float64 = any(group.dtype is torch.float64 for group in self.groups)

    def tensors(self) -> list[Tensor]:
        """What the table keeps on the device."""
        return [self.weights, *(part for group in self.groups for part in (group.tiles, group.lanes))]


def _numbered(weight: int, count: int, rows: int) -> Tensor:
    """(weight, number) of the tiles of so many rows that ``count`` segments make."""
    numbers = torch.arange((count + rows - 1) // rows, dtype=torch.int32)
    return torch.stack([torch.full_like(numbers, weight), numbers], 1)
