"""The tables on the device that tell a launch where its tensors are: built once per list of tensors, never stale.

A table is found again by the addresses of its tensors, and used only if every tensor also has the dtype, device,
shape and strides of when it was built: the allocator may give an address to another tensor, ``.data`` may be
reassigned, storage may be freed and come back. Both checks run in C for a whole list, some 40 ns a tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from r2_kernels.backends.triton.checks import check_gradients, check_weights
from r2_kernels.layout import is_dense

# Lists of tensors that are remembered: a training loop has one or two, an autograd step with fresh gradients more.
CACHED_LISTS = 32

Entry = TypeVar("Entry")
Kind = TypeVar("Kind")


class Group(NamedTuple):
    """The tensors of one dtype: what one launch works on.

    ``chunks`` is int32 (chunks, 2), a row per chunk: its tensor's index in the list, and its number within the tensor.
    ``rows`` is int32 (tensors,): the tensors' indices.
    """

    dtype: torch.dtype
    chunks: Tensor
    rows: Tensor


class WeightTable:
    """Where the weights of a list are, in chunks.

    ``segments`` is int64 (N, 3), a row per tensor: address, elements, and how many chunks the tensors before it have.
    ``copied`` are the indices of the weights that are not dense: a table is made of contiguous copies of these.
    """

    def __init__(self, weights: Sequence[Tensor], chunk_size: int) -> None:
        check_weights(weights)
        self.copied = [index for index, weight in enumerate(weights) if not is_dense(weight)]
        self.strides = [strides_of(weight) for weight in weights]
        if self.copied:
            return
        segments, groups, self.chunks = plan(
            [weight.data_ptr() for weight in weights],
            [weight.numel() for weight in weights],
            [weight.dtype for weight in weights],
            chunk_size,
        )
        device = weights[0].device
        self.segments = upload(segments, device)
        self.groups = [Group(dtype, upload(chunks, device), upload(rows, device)) for dtype, chunks, rows in groups]
        self.is_float64 = any(group.dtype is torch.float64 for group in self.groups)

    def tensors(self) -> list[Tensor]:
        """What the table keeps on the device."""
        return [self.segments, *(part for group in self.groups for part in (group.chunks, group.rows))]


class DestinationTable:
    """Where the gradients of a list of weights are: ``addresses``, int64 (N,).

    ``copied`` are the indices of the gradients that are not laid out as their weights: a table is made of copies.
    """

    def __init__(
        self,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        strides: Sequence[tuple[tuple[int, int], ...]],
    ) -> None:
        check_gradients(gradients, weights)
        self.copied = [
            index
            for index, (gradient, like) in enumerate(zip(gradients, strides, strict=True))
            if strides_of(gradient) != like
        ]
        if not self.copied:
            addresses = torch.tensor([gradient.data_ptr() for gradient in gradients], dtype=torch.int64)
            self.addresses = upload(addresses, gradients[0].device)

    def tensors(self) -> list[Tensor]:
        """What the table keeps on the device."""
        return [self.addresses]


def plan(
    addresses: Sequence[int], sizes: Sequence[int], kinds: Sequence[Kind], chunk_size: int
) -> tuple[Tensor, list[tuple[Kind, Tensor, Tensor]], int]:
    """``segments``, (kind, ``chunks``, ``rows``) of each kind, all on the CPU, and the number of chunks in all.

    A kind is what one launch can work on: a dtype, or a combination of several. The sizes may be anything up to
    2^63 - 1: all arithmetic on them is of 64 bits.
    """
    numel = torch.tensor(sizes, dtype=torch.int64)
    counts = (numel + (chunk_size - 1)).div(chunk_size, rounding_mode="floor")
    first = counts.cumsum(0) - counts
    segments = torch.stack([torch.tensor(addresses, dtype=torch.int64), numel, first], 1)
    groups = []
    for kind in dict.fromkeys(kinds):
        rows = torch.tensor([index for index, other in enumerate(kinds) if other == kind])
        chunk_counts = counts[rows]
        owner = torch.repeat_interleave(rows, chunk_counts)
        starts = torch.repeat_interleave(chunk_counts.cumsum(0) - chunk_counts, chunk_counts)
        chunks = torch.stack([owner, torch.arange(len(owner)) - starts], 1)
        groups.append((kind, chunks.to(torch.int32), rows.to(torch.int32)))
    return segments, groups, int(counts.sum())


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, by the current stream, without waiting for it."""
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


class TableCache(Generic[Entry]):
    """The tables of the last ``CACHED_LISTS`` lists of tensors."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[object, ...], _Remembered[Entry]] = OrderedDict()
        self._latest: _Remembered[Entry] | None = None
        self._captured: list[_Remembered[Entry]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tensors: Sequence[Tensor], owner: object, build: Callable[[], Entry]) -> Entry:
        """The table of these tensors, for the object ``owner``: as it was built, or built now.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the table would have to be built.
        """
        addresses = list(map(Tensor.data_ptr, tensors))
        # Most steps are the one before again, and to compare addresses is faster than to hash them.
        remembered = self._latest
        if remembered is None or remembered.owner is not owner or remembered.addresses != addresses:
            remembered = self._entries.get((owner, *addresses))
        if remembered is None or not remembered.guards.check(*tensors):
            remembered = self._remember(tensors, owner, addresses, build)
        if remembered is not self._latest:
            self._latest = remembered
            self._entries.move_to_end((owner, *addresses))
        if remembered.stream is not None:
            self._join_stream(remembered)
        return remembered.entry

    def clear(self) -> None:
        """Forget all tables but those that CUDA graphs use."""
        self._entries.clear()
        self._latest = None

    def _remember(
        self, tensors: Sequence[Tensor], owner: object, addresses: list[int], build: Callable[[], Entry]
    ) -> _Remembered[Entry]:
        is_cuda = tensors[0].is_cuda
        if is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured with weights or gradients at addresses that no step has used before: "
                "run one step with the same tensors first, and keep the gradients (`zero_grad(set_to_none=False)`)"
            )
        entry = build()
        stream = torch.cuda.current_stream(tensors[0].device) if is_cuda else None
        guards = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        )
        event = None if stream is None else stream.record_event()
        remembered = _Remembered(entry, owner, addresses, guards, stream, event)
        self._entries[(owner, *addresses)] = remembered
        if len(self._entries) > CACHED_LISTS:
            self._entries.popitem(last=False)
        return remembered

    def _join_stream(self, remembered: _Remembered[Entry]) -> None:
        """Order the current stream after the upload, and the table's memory after the current stream."""
        current = torch.cuda.current_stream(remembered.stream.device)
        if torch.cuda.is_current_stream_capturing():
            # Capture begins with a synchronization, and each replay reads the table: it has to outlive the cache.
            if not any(kept is remembered for kept in self._captured):
                self._captured.append(remembered)
        elif current != remembered.stream:
            current.wait_event(remembered.event)
            for table in () if getattr(remembered.entry, "copied", ()) else remembered.entry.tensors():
                table.record_stream(current)


class _Remembered(NamedTuple, Generic[Entry]):
    entry: Entry
    owner: object
    addresses: list[int]
    guards: TensorGuards
    stream: torch.cuda.Stream | None
    event: torch.cuda.Event | None


def strides_of(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Sizes and strides, of dimensions that have more than one entry; the same for all empty tensors."""
    if tensor.numel() == 0:
        return ()
    return tuple((size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
