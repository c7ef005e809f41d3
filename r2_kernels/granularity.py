"""What a segment of a weight is: the whole tensor, an output channel, or a group of weights along the input dimension.

The operators know three forms, by an integer ``group_size``: 0 (``PER_TENSOR``), -1 (``PER_CHANNEL``) and the size of a
group. A weight is seen as a matrix (output channels, inputs · kernel), dimension 0 being the channels, its entries in
the order of its indices, whatever its layout in memory. A tensor of fewer than two dimensions is one channel. A group
is ``group_size`` consecutive entries of one channel, the last of a channel being shorter where the size does not
divide. An empty weight is one empty segment. Segments are numbered weight by weight, channel by channel, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from r2_kernels.layout import is_dense

PER_TENSOR = 0
PER_CHANNEL = -1

Granularity = str | int


def group_size_of(granularity: Granularity) -> int:
    """The operators' ``group_size`` of what a user gives.

    Raises:
        TypeError: neither a string nor an integer.
        ValueError: another string than ``"tensor"`` and ``"channel"``, or an integer below 1.
    """
    expected = "granularity: expected 'tensor', 'channel' or the size of a group"
    if isinstance(granularity, bool) or not isinstance(granularity, (str, int)):
        raise TypeError(f"{expected}, got {granularity!r}")
    if isinstance(granularity, int):
        if granularity < 1:
            raise ValueError(f"{expected}, at least 1, got {granularity}")
        return granularity
    try:
        return {"tensor": PER_TENSOR, "channel": PER_CHANNEL}[granularity]
    except KeyError:
        raise ValueError(f"{expected}, got {granularity!r}") from None


def segment_counts(weights: Sequence[Tensor], granularity: Granularity) -> list[int]:
    """How many segments each weight has: ``values.split(segment_counts(weights, granularity))`` are each weight's.

    Raises:
        TypeError, ValueError: a ``granularity`` that is none of ``"tensor"``, ``"channel"`` and a positive integer.
    """
    return counts_of(weights, group_size_of(granularity))


def counts_of(weights: Sequence[Tensor], group_size: int) -> list[int]:
    """How many segments each weight has, by the operators' ``group_size``."""
    if group_size == PER_TENSOR:
        return [1] * len(weights)
    return [_count(weight, group_size) for weight in weights]


def _count(weight: Tensor, group_size: int) -> int:
    if weight.numel() == 0:
        return 1
    channels = channel_count(weight)
    if group_size == PER_CHANNEL:
        return channels
    return channels * ((weight.numel() // channels + group_size - 1) // group_size)


def channel_count(weight: Tensor) -> int:
    """How many channels a weight has that is not empty."""
    return weight.shape[0] if weight.ndim >= 2 else 1


def are_consecutive(weight: Tensor, group_size: int) -> bool:
    """Whether the weight fills one block of memory, in which its segments follow one another."""
    if weight.is_contiguous():
        return True
    if not is_dense(weight):
        return False
    is_channelwise = group_size == PER_CHANNEL and weight.ndim >= 2
    return group_size == PER_TENSOR or (
        is_channelwise and (weight.shape[0] == 1 or weight.stride(0) == weight.numel() // weight.shape[0])
    )


def segments(weight: Tensor, group_size: int) -> list[Tensor]:
    """The segments one by one, each a tensor of one dimension."""
    if group_size == PER_TENSOR or weight.numel() == 0:
        return [weight.reshape(-1)]
    channels = weight.reshape(channel_count(weight), -1)
    size = channels.shape[1] if group_size == PER_CHANNEL else group_size
    return [segment for channel in channels for segment in channel.split(size)]


def blocks(weight: Tensor, group_size: int) -> list[Tensor]:
    """The segments as few tensors: (channels, segments of a channel, size), and one more for shorter last groups.

    Views of the weight where its strides allow it.
    """
    if group_size == PER_TENSOR or weight.numel() == 0:
        return [weight.reshape(1, 1, -1)]
    channels = weight.reshape(channel_count(weight), -1)
    if group_size == PER_CHANNEL:
        return [channels[:, None]]
    whole = channels.shape[1] // group_size * group_size
    parts = [channels[:, :whole].unflatten(1, (-1, group_size))] if whole else []
    return parts + ([channels[:, None, whole:]] if whole < channels.shape[1] else [])


def over_segments(weight: Tensor, group_size: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``function`` makes of tensors whose last dimension is a segment, in the order of the segments.

    ``function`` takes (channels, segments, size) to (channels, segments, ...); the result has shape (segments, ...).
    """
    return torch.cat([function(block) for block in blocks(weight, group_size)], 1).flatten(0, 1)


def in_segments(per_weight: Tensor, counts: Tensor, total: int) -> Tensor:
    """A tensor with one entry per weight, spread to one per segment; ``counts`` int64, of the segments of each."""
    return per_weight.repeat_interleave(counts, output_size=total)


def summed_by_weight(per_segment: Tensor, counts: Tensor) -> Tensor:
    """The sums of each weight's segments, accumulated in float64, in an order that never changes."""
    sums = torch.segment_reduce(per_segment.double(), "sum", lengths=counts)
    return sums.to(per_segment.dtype)
