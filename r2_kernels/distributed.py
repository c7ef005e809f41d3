"""Merging statistics across ranks: weights that are ``DTensor``s, of which each rank holds a shard.

Each rank reduces its shard; the rows of all layers of a device mesh then travel in at most two ``all_reduce`` over the
mesh dimensions that any of them is sharded along: the maximum of the ends (``Penalty.maxima`` and ``minima``), to which
every rank rescales its row by the penalty's own ``merge``, and the sum of the rest. A rank that holds a copy of
another's shard adds nothing. ``_StridedShard`` is a shard like any other: no statistic depends on the entries' order.
``docs/distributed.md`` has recipes, and what this costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch import distributed as dist

from r2_kernels.granularity import PER_TENSOR
from r2_kernels.penalties import Penalty

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# By the group of all ranks: those of one that is gone are gone with it.
_groups: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def is_distributed(weight: Tensor) -> TypeGuard[DTensor]:
    """Whether the weight is a ``DTensor``."""
    # Imported where there may be one: it takes half a second, which most programs have no use for.
    if type(weight) in (Tensor, nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def local(weight: Tensor) -> Tensor:
    """This rank's shard, in the same memory, or the weight itself where it is no ``DTensor``."""
    return weight.to_local() if is_distributed(weight) else weight


def whole(weight: Tensor) -> Tensor:
    """The detached weight with the entries of all ranks: a collective, for what is computed once or seldom."""
    return (weight.full_tensor() if is_distributed(weight) else weight).detach()


def like(shard: Tensor, weight: Tensor) -> Tensor:
    """The shard as a tensor of the weight's kind: a ``DTensor`` of the same mesh and placements where that is one."""
    if not is_distributed(weight):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())


def check_shards(weights: Sequence[Tensor], group_size: int, names: Sequence[str] | None = None) -> None:
    """Raise unless the statistics of all weights can be merged.

    Raises:
        ValueError: a weight with a ``Partial`` placement, whose entries are not known before they are summed, one whose
            mesh this rank is not in, or a sharded one with other segments than the whole tensor.
    """
    for index, weight in enumerate(weights):
        if not is_distributed(weight):
            continue
        called = f"weights[{index}]" if names is None else f"weights[{index}] ({names[index]!r})"
        check_shard(weight, called)
        if group_size != PER_TENSOR and _sharded_dimensions(weight):
            raise ValueError(f"{called}: expected granularity 'tensor' for a sharded weight, got another")


def check_shard(weight: DTensor, called: str) -> None:
    """Raise unless this rank holds entries of the weight, and these are known."""
    if any(placement.is_partial() for placement in weight.placements):
        raise ValueError(f"{called}: expected placements Shard or Replicate, got {weight.placements}")
    if weight.device_mesh.get_coordinate() is None:
        raise ValueError(f"{called}: expected a device mesh with this rank in it, got {weight.device_mesh}")


def has_copies(weight: DTensor) -> bool:
    """Whether other ranks hold the entries of this rank's shard as well."""
    sizes = zip(weight.placements, weight.device_mesh.shape, strict=True)
    return any(placement.is_replicate() and size > 1 for placement, size in sizes)


def check_gradient(gradient: Tensor, weight: Tensor, called: str) -> None:
    """Raise unless the gradient lies on the ranks as its weight does: what is added to a shard must be of that shard.

    Raises:
        ValueError: one of both is no ``DTensor``, or another mesh or other placements, such as ``Partial``.
    """
    if _layout(gradient) != _layout(weight):
        raise ValueError(
            f"gradient of {called}: expected the layout of its weight, {_layout(weight) or 'a plain tensor'}, "
            f"got {_layout(gradient) or 'a plain tensor'}"
        )


def check_mesh(gradient: Tensor, weight: Tensor, called: str) -> None:
    """Raise unless the gradient can be brought to where its weight lies.

    Raises:
        ValueError: one of both is no ``DTensor``, or another mesh.
    """
    meshes = [tensor.device_mesh if is_distributed(tensor) else None for tensor in (gradient, weight)]
    if meshes[0] != meshes[1]:
        expected, got = meshes[1] or "a plain tensor", meshes[0] or "a plain tensor"
        raise ValueError(f"gradient of {called}: expected the device mesh of its weight, {expected}, got {got}")


def local_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of this rank's shard: a collective where it lies on the ranks in another way than its weight."""
    if is_distributed(gradient) and is_distributed(weight) and gradient.placements != weight.placements:
        gradient = gradient.redistribute(placements=weight.placements)
    return local(gradient)


def merge_(penalty: Penalty, weights: Sequence[Tensor], parameter: Tensor | None, statistics: Tensor) -> bool:
    """Replace the rows of sharded weights, of this rank's shards, by those of the whole weights.

    Args:
        weights: N tensors, the ``DTensor``s among them in the same order on all ranks of their mesh.
        parameter: M or the temperature, (N,), the same on all ranks, or None.
        statistics: (N, S) float64, on the shards' device.

    Returns:
        Whether any row was replaced.
    """
    dimensions_of_layers: dict[Any, dict[int, list[int]]] = {}
    for index, weight in enumerate(weights):
        if is_distributed(weight) and (sharded := _sharded_dimensions(weight)):
            dimensions_of_layers.setdefault(weight.device_mesh, {})[index] = sharded
    for mesh, layers in dimensions_of_layers.items():
        dimensions = sorted(set().union(*layers.values()))
        # Where a weight has copies along one of these dimensions, the first one counts.
        coordinate = mesh.get_coordinate()
        away = {dimension for dimension in dimensions if coordinate[dimension] != 0}
        is_owner = [away.issubset(sharded) for sharded in layers.values()]
        # Usually no tensor is made of host lists here, nor columns below indexed by them: a copy waits for the device.
        owners = all(is_owner) or torch.tensor(is_owner, device=statistics.device)[:, None]
        rows = slice(None) if len(layers) == len(weights) else torch.tensor([*layers], device=statistics.device)
        scalars = statistics.new_zeros(len(layers)) if parameter is None else parameter[rows].double()
        statistics[rows] = _merged(penalty, statistics[rows], scalars, owners, _group(mesh, dimensions))
    return bool(dimensions_of_layers)


def _layout(tensor: Tensor) -> tuple[Any, Any] | None:
    return (tensor.device_mesh, tensor.placements) if is_distributed(tensor) else None


def _merged(penalty: Penalty, rows: Tensor, parameter: Tensor, owners: Tensor | bool, group: Any) -> Tensor:
    common = _common_ends(penalty, rows, group)
    aligned = penalty.merge(torch.stack([rows, common]), parameter)
    ends = [*penalty.maxima, *penalty.minima]
    others = [column for column in range(rows.shape[1]) if column not in ends]
    sums = torch.stack([aligned[:, column] for column in others], 1)
    if isinstance(owners, Tensor):
        sums = torch.where(owners, sums, 0.0)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    for column, total in zip(others, sums.unbind(1), strict=True):
        common[:, column] = total
    return common


def _common_ends(penalty: Penalty, rows: Tensor, group: Any) -> Tensor:
    """Rows of the whole weights' ends, all else zero: what a merge with rescales a row without adding to it."""
    common = torch.zeros_like(rows)
    if not (penalty.maxima or penalty.minima):
        return common
    signs = dict.fromkeys(penalty.maxima, 1) | dict.fromkeys(penalty.minima, -1)
    ends = torch.stack([sign * rows[:, column] for column, sign in signs.items()], 1)
    # What the maximum makes of a NaN is the collective's own affair, so it travels as a number beside the ends.
    is_nan = ends.isnan().any(1, keepdim=True)
    sent = torch.cat([torch.where(is_nan, -torch.inf, ends), is_nan.to(ends.dtype)], 1)
    dist.all_reduce(sent, dist.ReduceOp.MAX, group)
    ends = torch.where(sent[:, -1:] > 0, torch.nan, sent[:, :-1])
    for (column, sign), end in zip(signs.items(), ends.unbind(1), strict=True):
        common[:, column] = sign * end
    return common


def _sharded_dimensions(weight: Any) -> list[int]:
    """The mesh dimensions along which the ranks hold different entries."""
    return [dimension for dimension, placement in enumerate(weight.placements) if not placement.is_replicate()]


def _group(mesh: Any, dimensions: Sequence[int]) -> Any:
    """The process group of the ranks that differ from this one in these mesh dimensions alone."""
    if len(dimensions) == 1:
        return mesh.get_group(dimensions[0])
    place: list[Any] = list(mesh.get_coordinate())
    for dimension in dimensions:
        place[dimension] = slice(None)
    ranks = tuple(sorted(mesh.mesh[tuple(place)].flatten().tolist()))
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    groups = _groups.setdefault(dist.group.WORLD, {})
    if ranks not in groups:
        groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return groups[ranks]
