"""The tables of an optimizer's step: where weights, gradients and states are, in chunks; checked as they are built."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from r2_kernels.backends.triton.checks import check_stored
from r2_kernels.backends.triton.chunk_table import CACHED_LISTS, TableCache, plan, upload
from r2_kernels.layout import is_dense

COUNT_DTYPES = (torch.float32, torch.float64)


class StepTensors(NamedTuple):
    """The lists that an operator is given; ``states`` by their names, in the order of the rule."""

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    states: dict[str, Sequence[Tensor]]
    steps: Sequence[Tensor]
    started: Sequence[int]


class Dtypes(NamedTuple):
    """Of what one launch steps. Where there are no states or counts, any."""

    weight: torch.dtype
    gradient: torch.dtype
    state: torch.dtype
    count: torch.dtype


class StepGroup(NamedTuple):
    """The tensors of one combination of dtypes; ``chunks`` and ``rows`` are as in ``chunk_table.Group``."""

    dtypes: Dtypes
    chunks: Tensor
    rows: Tensor


class StepTable:
    """Where the weights of a list are, in chunks, and the states and counts of each.

    ``segments`` is as in ``WeightTable``, and so are ``groups``, one for each combination of dtypes. ``states`` is
    int64 (N, kinds), the addresses of the states; ``counts`` int64 (N,), those of the counts of steps, or None;
    ``started`` int8 (N,), or None where all states have. ``first_chunks``, N + 1 numbers, says how many chunks the
    tensors before each have.
    """

    def __init__(self, given: StepTensors, chunk_size: int) -> None:
        _check(given)
        weights, states = given.weights, list(given.states.values())
        device = weights[0].device
        kinds = [
            Dtypes(
                weight.dtype,
                gradient.dtype,
                states[0][index].dtype if states else weight.dtype,
                given.steps[index].dtype if given.steps else torch.float32,
            )
            for index, (weight, gradient) in enumerate(zip(weights, given.gradients, strict=True))
        ]
        sizes = [weight.numel() for weight in weights]
        segments, groups, chunk_count = plan([weight.data_ptr() for weight in weights], sizes, kinds, chunk_size)
        self.first_chunks = [*segments[:, 2].tolist(), chunk_count]
        self.segments = upload(segments, device)
        self.groups = [StepGroup(kind, upload(chunks, device), upload(rows, device)) for kind, chunks, rows in groups]
        self.is_float64 = any(weight.dtype is torch.float64 for weight in weights)
        self.states = upload(_addresses(*states).t().contiguous(), device)
        self.counts = upload(_addresses(given.steps)[0], device) if given.steps else None
        self.started = None if all(given.started) else upload(torch.tensor(given.started, dtype=torch.int8), device)

    def tensors(self) -> list[Tensor]:
        """What the table keeps on the device."""
        kept = [self.segments, self.states, self.counts, self.started]
        kept += [part for group in self.groups for part in (group.chunks, group.rows)]
        return [tensor for tensor in kept if tensor is not None]


class GradientTable:
    """Where the gradients of a list of weights are: ``addresses``, int64 (N,)."""

    def __init__(self, given: StepTensors) -> None:
        _check_list("gradients", given.gradients, given.weights)
        self.addresses = upload(_addresses(given.gradients)[0], given.weights[0].device)

    def tensors(self) -> list[Tensor]:
        """What the table keeps on the device."""
        return [self.addresses]


_step_tables: TableCache[StepTable] = TableCache()
_gradient_tables: TableCache[GradientTable] = TableCache()


def find_tables(given: StepTensors, chunk_size: int) -> tuple[StepTable, GradientTable]:
    """The tables of these lists, as they were built or built now: gradients alone may move from step to step.

    Raises:
        RuntimeError: lists of different lengths, a dtype that no kernel reads, or a tensor of another device, shape or
            layout than its weight's.
    """
    lists = [given.weights, *given.states.values(), given.steps]
    owner = _same(
        chunk_size,
        tuple(map(len, lists)),
        tuple(given.started),
        tuple(gradient.dtype for gradient in given.gradients),
    )
    tensors = [tensor for tensors in lists for tensor in tensors]
    table = _step_tables.find(tensors, owner, lambda: StepTable(given, chunk_size))
    return table, _gradient_tables.find(given.gradients, table, lambda: GradientTable(given))


@lru_cache(maxsize=CACHED_LISTS)
def _same(*key: object) -> object:
    """One object for all equal keys: the cache of tables compares owners by identity first."""
    return key


def _addresses(*lists: Sequence[Tensor]) -> Tensor:
    return torch.tensor([[tensor.data_ptr() for tensor in tensors] for tensors in lists], dtype=torch.int64)


def _check(given: StepTensors) -> None:
    device = given.weights[0].device
    for index, weight in enumerate(given.weights):
        check_stored(weight, f"weights[{index}]", device)
        if not is_dense(weight):
            raise RuntimeError(f"weights[{index}]: expected a dense layout, got strides {weight.stride()}")
    _check_list("gradients", given.gradients, given.weights)
    for name, tensors in given.states.items():
        _check_list(name, tensors, given.weights)
    first_name, *others = given.states or [""]
    for name in others:
        for index, (first, tensor) in enumerate(zip(given.states[first_name], given.states[name], strict=True)):
            if tensor.dtype is not first.dtype:
                raise RuntimeError(f"{name}[{index}]: expected {first.dtype} of {first_name}, got {tensor.dtype}")
    for index, step in enumerate(given.steps):
        check_stored(step, f"steps[{index}]", device, COUNT_DTYPES)
        if step.numel() != 1:
            raise RuntimeError(f"steps[{index}]: expected one number, got shape {tuple(step.shape)}")


def _check_list(name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    if len(tensors) != len(weights):
        raise RuntimeError(f"{name}: expected {len(weights)} tensors, one per weight, got {len(tensors)}")
    for index, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        check_stored(tensor, f"{name}[{index}]", weight.device)
        if not _is_laid_out_as(tensor, weight):
            raise RuntimeError(
                f"{name}[{index}]: expected shape {tuple(weight.shape)} and strides {weight.stride()} of its weight, "
                f"got {tuple(tensor.shape)} and {tensor.stride()}"
            )


def _is_laid_out_as(tensor: Tensor, weight: Tensor) -> bool:
    if tensor.shape != weight.shape:
        return False
    sizes = zip(weight.shape, tensor.stride(), weight.stride(), strict=True)
    return weight.numel() == 0 or all(size == 1 or stride == expected for size, stride, expected in sizes)
