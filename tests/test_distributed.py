"""Sharded weights on two and four processes against the same weights in one piece."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import sharded_optimizers
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from r2_kernels import RangeRegularizer, kurtosis, linf, margin, soft_min_max
from r2_kernels.distributed import whole
from r2_kernels.optim import AdamW

pytest.importorskip("torch.distributed.tensor")
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

PENALTIES: dict[str, Callable[..., Tensor]] = {
    "linf": linf,
    "margin": margin,
    "soft_min_max": soft_min_max,
    "kurtosis": kurtosis,
}
STARTS: dict[str, dict[str, Any]] = {"margin": {"margin": 1.0}, "soft_min_max": {"temperature": 3.0}}


def _started(rank: int, size: int, folder: str, checks: Callable[[Path], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    try:
        checks(Path(folder))
    except Exception as error:
        raise AssertionError(traceback.format_exc()) from error
    dist.destroy_process_group()


def _run(size: int, folder: Path, checks: Callable[[Path], None]) -> None:
    # Forked off one server, so that torch is imported once, not once a process.
    get_context("forkserver").set_forkserver_preload(["torch.distributed.fsdp", __name__])
    arguments = (size, str(folder), checks)
    multiprocessing.start_processes(_started, arguments, nprocs=size, start_method="forkserver")


def _weights(dtype: torch.dtype) -> list[Tensor]:
    """The same on every rank: uneven shards, empty ones, ties for the maximum, more than a chunk."""
    torch.manual_seed(1)
    tied = torch.randint(-2, 3, (10, 6)).double()
    shapes = [(7, 5), (1, 9), (3, 3, 3), (200, 301), (8, 8)]
    return [weight.to(dtype) for weight in [*(torch.randn(*shape).double() for shape in shapes), tied]]


def _compare(penalty: str, weights: list[Tensor], sharded: list[Tensor]) -> None:
    parameter = None if penalty in ("linf", "kurtosis") else torch.linspace(0.3, 2.0, len(weights))
    results = []
    for given in (weights, sharded):
        leaves = [weight.detach().clone().requires_grad_() for weight in given]
        own = None if parameter is None else parameter.clone().requires_grad_()
        values = PENALTIES[penalty](leaves, *([] if own is None else [own]))
        (values * torch.arange(1.0, len(values) + 1)).sum().backward()
        results.append((values.detach(), leaves, own))
    (expected, wholes, expected_own), (values, shards, own) = results
    # Maxima and counts are exact in whatever order the ranks are merged, sums are not.
    exact = {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(
        values, expected, equal_nan=True, **(exact if penalty == "linf" else {"rtol": 2e-6, "atol": 0.0})
    )
    for weight, shard in zip(wholes, shards, strict=True):
        assert shard.grad.placements == shard.placements
        tolerance = {"rtol": 1e-5, "atol": 1e-5 * float(weight.grad.abs().nan_to_num().max())}
        if weight.dtype is torch.bfloat16:
            tolerance["rtol"] = 2**-7
        if penalty in ("linf", "margin"):
            tolerance = exact
        torch.testing.assert_close(shard.grad.full_tensor(), weight.grad, equal_nan=True, **tolerance)
    if own is not None:
        tolerance = exact if penalty == "margin" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(own.grad, expected_own.grad, equal_nan=True, **tolerance)


def _functions_on(mesh: Any, placements: list[list[Any]]) -> None:
    for penalty in PENALTIES:
        for dtype in (torch.float32, torch.bfloat16):
            weights = _weights(dtype)
            sharded = [
                distribute_tensor(weight, mesh, placements[index % len(placements)])
                for index, weight in enumerate(weights)
            ]
            _compare(penalty, weights, sharded)
        for position in ((0, 0), (-1, -1)):  # In a sharded weight, on the first rank and then on the last.
            weights = _weights(torch.float32)
            weights[3][position] = torch.nan
            sharded = [
                distribute_tensor(weight, mesh, placements[index % len(placements)])
                for index, weight in enumerate(weights)
            ]
            _compare(penalty, weights, sharded)


def _model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def _train(model: nn.Module, penalty: str, way: str, share: slice) -> tuple[RangeRegularizer, list[Tensor]]:
    reg = RangeRegularizer(model, penalty, strength=0.05, **STARTS.get(penalty, {}))
    groups = [{"params": model.parameters()}, {"params": reg.parameters(), "weight_decay": 0.0}]
    if way == "step":
        optimizer = AdamW(groups, lr=0.01, regularizer=reg)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=True)
    torch.manual_seed(3)
    losses = []
    for _ in range(4):
        inputs = torch.randn(8, 6)[share]
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        if way == "step":
            loss.backward()
            losses.append(0.05 * torch.stack(list(reg.losses().values())).sum())
        elif way == "gradients":
            loss.backward()
            losses.append(reg.add_gradients_())
        else:
            losses.append(reg().detach())
            (loss + reg()).backward()
        optimizer.step()
    return reg, losses


def _training(distribute: Callable[[nn.Module], nn.Module], share: slice) -> None:
    for penalty in PENALTIES:
        for way in ("loss", "gradients", "step"):
            single, expected = _train(_model(), penalty, way, slice(None))
            reg, losses = _train(distribute(_model()), penalty, way, share)
            torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-4, atol=1e-6)
            for weight, same in zip(reg.weights(), single.weights(), strict=True):
                torch.testing.assert_close(whole(weight), same.detach(), rtol=1e-3, atol=2e-5)
            own = reg.own_parameter()
            if own is not None:
                everywhere = [torch.empty_like(own) for _ in range(dist.get_world_size())]
                dist.all_gather(everywhere, own.detach())
                assert all(torch.equal(other, own) for other in everywhere)
            assert str(reg.report()) is not None


def _fully_sharded(model: nn.Module) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def _continued(
    model: nn.Module, penalty: str, source: Path | None, target: Path | None, steps: int = 2
) -> RangeRegularizer:
    """Steps from the checkpoint, or from the start, each of which depends on the count of those before."""
    start = STARTS.get(penalty, {})
    if source:
        start = {name: 1.5 * number for name, number in start.items()}
    reg = RangeRegularizer(model, penalty, strength=lambda step: 0.05 * (step + 1), **start)
    if source:
        state = {"model": model.state_dict(), "reg": reg.state_dict()}
        checkpoint.load(state, checkpoint_id=source)
        model.load_state_dict(state["model"])
        reg.load_state_dict(state["reg"])
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": reg.parameters()}], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(reg.step)
        model(torch.randn(8, 6)).square().mean().backward()
        reg.add_gradients_()
        optimizer.step()
    if target:
        checkpoint.save({"model": model.state_dict(), "reg": reg.state_dict()}, checkpoint_id=target)
    return reg


def _optimizers_on(mesh: Any, placements: list[list[Any]]) -> None:
    sharded_optimizers.steps_are_as_in_one_piece(_weights(torch.float32), mesh, placements)
    if mesh.ndim == 1:
        sharded_optimizers.steps_are_as_in_one_piece(_weights(torch.bfloat16), mesh, placements)
        sharded_optimizers.skipped_steps_leave_the_statistics(_weights(torch.float32), mesh)
        sharded_optimizers.a_change_on_one_rank_is_everybodys(_weights(torch.float32), mesh)
        sharded_optimizers.few_collectives(_weights(torch.float32), mesh)


def _share() -> slice:
    size = 8 // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def _layers(shapes: list[tuple[int, int]], mesh: Any, placement: Any) -> list[tuple[str, nn.Parameter]]:
    """The same weights on every rank, with gradients of one."""
    torch.manual_seed(4)
    weights = [nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [placement])) for shape in shapes]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return [(f"layer{index}", weight) for index, weight in enumerate(weights)]


def _nan_of_the_last_rank_is_everybodys(mesh: Any) -> None:
    for penalty in PENALTIES:
        layers = _layers([(4, 3), (6, 2)], mesh, Shard(0))
        reg = RangeRegularizer(layers, penalty, **STARTS.get(penalty, {}))
        if dist.get_rank() == dist.get_world_size() - 1:
            layers[1][1].detach().to_local()[-1, -1] = torch.nan
        with pytest.raises(FloatingPointError, match=r"not finite for 'layer1'$"):
            reg.add_gradients_(check_finite=True)
        assert all(bool((weight.grad.to_local() == 1).all()) for _, weight in layers)
        assert reg.add_gradients_().isnan()
        assert [bool(value.isnan()) for value in reg.losses().values()] == [False, True]
        assert not layers[0][1].grad.full_tensor().isnan().any()


def _few_collectives(mesh: Any) -> None:
    for penalty, most in (("linf", 2), ("margin", 1), ("soft_min_max", 2), ("kurtosis", 2)):
        for count in (1, 50):
            layers = _layers([(5, 4)] * count, mesh, Shard(0))
            reg = RangeRegularizer(layers, penalty, **STARTS.get(penalty, {}))
            weights, own = reg.weights(), reg.own_parameter()
            with CommDebugMode() as collectives:
                PENALTIES[penalty](weights, *([] if own is None else [own])).sum().backward()
            assert collectives.get_total_counts() == most
            with CommDebugMode() as collectives:
                reg.add_gradients_()
            assert collectives.get_total_counts() == most


def _on_two(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    _functions_on(mesh, [[Shard(0)], [Shard(1)], [Replicate()]])
    _training(_fully_sharded, _share())
    _nan_of_the_last_rank_is_everybodys(mesh)
    _few_collectives(mesh)
    _optimizers_on(mesh, [[Shard(0)], [Shard(1)], [Replicate()]])
    sharded_optimizers.gradients_that_lie_otherwise(mesh)
    sharded_optimizers.with_a_scaler(_fully_sharded(_model()), _model(), _share())
    _training(DistributedDataParallel, _share())
    for penalty in ("margin", "soft_min_max"):
        _continued(_fully_sharded(_model()), penalty, None, folder / f"{penalty}2")
        sharded_optimizers.continued(_fully_sharded(_model()), penalty, None, folder / f"fused_{penalty}2")
    sharded = distribute_tensor(torch.randn(5, 4), mesh, [Shard(0)])
    unsummed = sharded.from_local(torch.ones(2, 2), mesh, [Partial()])
    model = _model().bfloat16()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    RangeRegularizer(model, "linf").add_gradients_()
    with pytest.raises(ValueError, match=r"weights\[1\]: expected placements Shard or Replicate"):
        linf([sharded, unsummed])
    with pytest.raises(ValueError, match="expected granularity 'tensor'"):
        linf([sharded], granularity="channel")
    copied = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Replicate()]))
    copied.grad = unsummed
    with pytest.raises(ValueError, match=r"gradient of weights\[0\] \('copied'\): expected the layout of its weight"):
        RangeRegularizer([("copied", copied)], "linf").add_gradients_()
    assert torch.equal(unsummed.to_local(), torch.ones(2, 2))


def _on_four(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    mixed = [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()], [Shard(0), Shard(0)]]
    _functions_on(mesh, mixed)
    _functions_on(mesh["model"], [[Shard(0)]])
    _optimizers_on(mesh, mixed)
    sharded_optimizers.copies_are_the_same(mesh)

    def both(model: nn.Module) -> nn.Module:
        parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        parallelize_module(model, mesh["model"], {"4": RowwiseParallel(input_layouts=Replicate())})
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])

    half = dist.get_rank() // 2
    _training(both, slice(half * 4, half * 4 + 4))
    _training(_fully_sharded, _share())
    for penalty in ("margin", "soft_min_max"):
        _continued(_fully_sharded(_model()), penalty, folder / f"{penalty}2", folder / f"{penalty}4")
        source, target = folder / f"fused_{penalty}2", folder / f"fused_{penalty}4"
        sharded_optimizers.continued(_fully_sharded(_model()), penalty, source, target)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_sharded_weights_are_as_in_one_piece(tmp_path: Path) -> None:
    _run(2, tmp_path, _on_two)
    _run(4, tmp_path, _on_four)
    for penalty in ("margin", "soft_min_max"):
        checkpointed = _continued(_model(), penalty, tmp_path / f"{penalty}4", None)
        straight = _continued(_model(), penalty, None, None, steps=6)
        for resumed, same in zip(checkpointed.weights(), straight.weights(), strict=True):
            torch.testing.assert_close(resumed, same, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(checkpointed.own_parameter(), straight.own_parameter(), rtol=1e-5, atol=0)
        checkpointed = sharded_optimizers.continued(_model(), penalty, tmp_path / f"fused_{penalty}4", None)
        straight = sharded_optimizers.continued(_model(), penalty, None, None, steps=6)
        for resumed, same in zip(checkpointed.weights(), straight.weights(), strict=True):
            torch.testing.assert_close(resumed, same, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(checkpointed.own_parameter(), straight.own_parameter(), rtol=1e-5, atol=0)
