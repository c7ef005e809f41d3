"""Statistics that one optimizer step leaves for the next, and whether they still are those of the weights.

Of a sharded weight a step leaves those of this rank's shard. ``merge`` makes those of the whole weight of them where
they are used: always, and for all layers at once, so that all ranks call the same collectives, also where one alone has
found that its shard has changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r2_kernels import ops
from r2_kernels.distributed import is_distributed, local, merge_
from r2_kernels.penalties import by_name
from r2_kernels.validation import value_dtype


class CarriedStatistics:
    """The statistics of some layers, in the form of the operators, with what tells whether a weight has changed.

    A change is seen by the tensor's identity, its version counter and its address: an in-place operation counts the
    version up, ``load_state_dict`` copies in place, and ``weight.data = other`` changes the address. A write through
    ``weight.data``, which has a version of its own, is not seen. A ``DTensor`` and its shard each have a counter.

    Attributes:
        layers: which of the regularizer's layers these are.
        statistics: (W, S) float64, a row per layer, as ``ops.reduce`` gives it, of this rank's shards.
        merged: the same of the whole weights, after ``merge``; where none is sharded, the same tensor.
        partials: what ``ops.reduce`` leaves for ``apply`` of the same backend.
        parameter: M or the temperature that they were gathered with, (W,), or None.
    """

    def __init__(self, penalty: str, layers: Sequence[int], layer_count: int, device: torch.device) -> None:
        self.penalty = penalty
        self.layers = list(layers)
        is_whole = self.layers == list(range(layer_count))
        self._index = None if is_whole else torch.tensor(self.layers, device=device)
        self.statistics: Tensor | None = None
        self.merged: Tensor | None = None
        self.partials: Tensor | None = None
        self.parameter: Tensor | None = None
        self._tensors: list[Tensor] = []
        self._state: list[tuple[int, ...]] = []

    def hold_for(self, weights: Sequence[Tensor], own: Tensor | None) -> bool:
        """Whether these are the statistics of the weights, ``own`` being the regularizer's M or temperature."""
        return self.statistics is not None and self._state == _state_of(_with_own(weights, own))

    def gather(self, weights: Sequence[Tensor], own: Tensor | None) -> None:
        """Compute them: one pass over the weights."""
        self.parameter = self.of_layers(own)
        _, _, self.statistics, self.partials = ops.kernel("reduce", weights[0].device)(
            self.penalty, [local(weight) for weight in weights], self.parameter
        )
        self.remember(weights, own)

    def take_step(
        self, weights: Sequence[Tensor], own: Tensor | None, parameter: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Take what a step has made of ``merged``: the rows of the new weights, or, as it was skipped, nothing new.

        Args:
            parameter: what the step has gathered them with.
            found_inf: the step's.
        """
        if self.merged is not self.statistics:
            stepped, before = self.merged, self.statistics
            assert stepped is not None
            assert before is not None
            self.statistics = stepped if found_inf is None else torch.where(found_inf != 0, before, stepped)
        self.parameter = parameter
        self.remember(weights, own)

    def remember(self, weights: Sequence[Tensor], own: Tensor | None) -> None:
        """Take the tensors as they are now for those that the statistics belong to."""
        self._tensors = _with_own(weights, own)  # Kept, so that no other tensor gets the same identity.
        self._state = _state_of(self._tensors)

    @property
    def weights(self) -> list[Tensor]:
        """The tensors that the statistics belong to."""
        return self._tensors[: len(self.layers)]

    def finalize(self) -> tuple[Tensor, Tensor]:
        """The penalties' values, (W,), and their gradients with respect to M or the temperature, (W,) or (0,).

        Of what ``merge`` has merged.
        """
        weights = self.weights
        return ops.kernel("finalize", weights[0].device)(
            self.penalty, self.merged, self.parameter, value_dtype(weights)
        )

    def of_layers(self, own: Tensor | None) -> Tensor | None:
        """A copy of these layers' entries of M or the temperature, as the operators take it."""
        return None if own is None else self.select(ops.widened(own)).clone()

    def select(self, per_layer: Tensor) -> Tensor:
        """These layers' entries of a tensor with one for each layer of the regularizer."""
        return per_layer if self._index is None else per_layer[self._index]

    def add_to(self, per_layer: Tensor, values: Tensor) -> None:
        """Add these layers' values to their entries of a tensor with one for each layer of the regularizer."""
        if self._index is None:
            per_layer += values
        else:
            per_layer.index_add_(0, self._index, values)


def merge(parts: Sequence[CarriedStatistics]) -> None:
    """Set ``merged`` of parts that are all layers together: at most two collectives where weights are sharded.

    ``docs/distributed.md`` says what travels.
    """
    for part in parts:
        part.merged = part.statistics
    layers = {layer: weight for part in parts for layer, weight in zip(part.layers, part.weights, strict=True)}
    if not any(is_distributed(weight) for weight in layers.values()):
        return
    rows = _in_layers(parts, [part.statistics for part in parts])
    parameter = None if parts[0].parameter is None else _in_layers(parts, [part.parameter for part in parts])
    merge_(by_name(parts[0].penalty), [layers[layer] for layer in sorted(layers)], parameter, rows)
    for part in parts:
        part.merged = part.select(rows)


def _in_layers(parts: Sequence[CarriedStatistics], of_parts: Sequence[Tensor | None]) -> Tensor:
    """A new tensor with an entry for each layer, from those with one for each layer of a part."""
    tensors = [tensor for tensor in of_parts if tensor is not None]
    of_layers = tensors[0].new_empty(sum(map(len, tensors)), *tensors[0].shape[1:])
    for part, tensor in zip(parts, tensors, strict=True):
        of_layers[slice(None) if part._index is None else part._index] = tensor
    return of_layers


def _with_own(weights: Sequence[Tensor], own: Tensor | None) -> list[Tensor]:
    return [*weights] if own is None else [*weights, own]


def _state_of(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [
        _state_of_shard(tensor) if is_distributed(tensor) else (id(tensor), tensor._version, tensor.data_ptr())
        for tensor in tensors
    ]


def _state_of_shard(tensor: Tensor) -> tuple[int, ...]:
    shard = local(tensor)
    return id(tensor), tensor._version, shard._version, shard.data_ptr()
