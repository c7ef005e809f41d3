"""What ``test_distributed.py`` checks of the fused optimizers on all ranks: sharded weights against the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from r2_kernels import RangeRegularizer
from r2_kernels.distributed import local, whole
from r2_kernels.optim import SGD, AdamW

STARTS: dict[str, dict[str, Any]] = {
    "linf": {},
    "margin": {"margin": 1.0},
    "soft_min_max": {"temperature": 3.0},
    "kurtosis": {},
}
RULES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (AdamW, {"weight_decay": 0.1, "amsgrad": True, "state_dtype": torch.float32}),
    (AdamW, {"decoupled": True}),
    (SGD, {"momentum": 0.9, "state_dtype": torch.float32}),
]


class Training:
    """Weights whose gradients depend on the step alone, with an optimizer that has them in two groups, backwards."""

    def __init__(self, weights: list[Tensor], penalty: str, rule: Any, settings: dict[str, Any]) -> None:
        self.weights = [nn.Parameter(weight) for weight in weights]
        named = [(f"layer{index}", weight) for index, weight in enumerate(self.weights)]
        self.reg = RangeRegularizer(named[:-1], penalty, strength=0.05, include="*", **STARTS[penalty])
        groups = [{"params": self.weights[3:][::-1]}, {"params": self.weights[:3][::-1], "lr": 0.02}]
        self.optimizer = rule(groups, lr=0.01, regularizer=self.reg, **settings)
        self.steps = 0

    def step(self, **settings: Any) -> None:
        self.take_gradients()
        self.optimizer.step(**settings)

    def take_gradients(self) -> None:
        generator = torch.Generator().manual_seed(self.steps)
        for index, weight in enumerate(self.weights):
            gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
            if isinstance(weight, DTensor):
                gradient = distribute_tensor(gradient, weight.device_mesh, weight.placements)
            weight.grad = None if index == 2 else gradient
        self.steps += 1

    def assert_as(self, expected: Training) -> None:
        # Ends and counts are exact however the ranks are merged, and the steps are then those of the same numbers.
        is_exact = self.reg.penalty in ("linf", "margin")
        tolerance = {"rtol": 0.0, "atol": 0.0} if is_exact else {"rtol": 1e-4, "atol": 1e-6}
        for weight, same in zip(self.weights, expected.weights, strict=True):
            if weight.dtype is torch.bfloat16 and not is_exact:
                tolerance["rtol"] = 2**-7
            torch.testing.assert_close(whole(weight), same.detach(), **tolerance)
        for own, same in zip(self.reg.parameters(), expected.reg.parameters(), strict=True):
            torch.testing.assert_close(own, same, **tolerance)
        values, same_values = (list(training.reg.losses().values()) for training in (self, expected))
        torch.testing.assert_close(values, same_values, rtol=1e-5, atol=0.0)


def pair(
    weights: list[Tensor], mesh: Any, placements: list[Any], penalty: str, rule: Any, settings: dict[str, Any]
) -> tuple[Training, Training]:
    """The same training of weights in one piece and sharded, with one that is a plain tensor among them."""
    sharded = [
        weight.clone() if index == 4 else distribute_tensor(weight, mesh, placements[index % len(placements)])
        for index, weight in enumerate(weights)
    ]
    return Training(sharded, penalty, rule, settings), Training([w.clone() for w in weights], penalty, rule, settings)


def steps_are_as_in_one_piece(weights: list[Tensor], mesh: Any, placements: list[Any]) -> None:
    for penalty in STARTS:
        for rule, settings in RULES:
            training, expected = pair(weights, mesh, placements, penalty, rule, settings)
            for _ in range(2):
                for either in (training, expected):
                    either.step(clip_coefficient=0.5)
            training.assert_as(expected)
            if "state_dtype" in settings:
                states = [state for states in training.optimizer.state.values() for state in states.values()]
                assert {state.dtype for state in states} == {torch.float32}


def skipped_steps_leave_the_statistics(weights: list[Tensor], mesh: Any) -> None:
    for penalty in STARTS:
        training, expected = pair(weights, mesh, [[Shard(0)]], penalty, AdamW, {})
        training.step()
        expected.step()
        training.optimizer.found_inf = torch.ones(())
        for _ in range(2):
            training.step()
            training.steps -= 1
        training.assert_as(expected)
        training.optimizer.found_inf = torch.zeros(())
        training.step()
        expected.step()
        training.assert_as(expected)


def a_change_on_one_rank_is_everybodys(weights: list[Tensor], mesh: Any) -> None:
    """Its statistics are gathered anew there alone, and no rank waits for the others."""
    for penalty in STARTS:
        training, expected = pair(weights, mesh, [[Shard(0)]], penalty, AdamW, {})
        training.step()
        expected.step()
        with torch.no_grad():
            if dist.get_rank() == dist.get_world_size() - 1:
                training.weights[3].to_local()[-1] = 7.0
            expected.weights[3][-1] = 7.0
        torch.testing.assert_close(training.reg.losses()["layer3"], expected.reg.losses()["layer3"])
        training.step()
        expected.step()
        training.assert_as(expected)


def few_collectives(weights: list[Tensor], mesh: Any) -> None:
    for penalty, most in (("linf", 2), ("margin", 1), ("soft_min_max", 2), ("kurtosis", 2)):
        training, _ = pair(weights * 5, mesh, [[Shard(0)], [Shard(1)], [Replicate()]], penalty, SGD, {})
        for _ in range(2):
            training.take_gradients()
            with CommDebugMode() as collectives:
                training.optimizer.step()
            assert collectives.get_total_counts() == most
        assert "range_statistics" not in training.optimizer.state_dict()


def gradients_that_lie_otherwise(mesh: Any) -> None:
    """Brought to where their weights lie, as by ``torch.optim``, or refused before anything has changed."""
    weight = nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))
    weight.grad = DTensor.from_local(torch.ones(5, 3), mesh, [Partial()])
    SGD([weight], lr=0.5 / dist.get_world_size()).step()
    assert torch.equal(whole(weight), torch.full((5, 3), 0.5))

    first = nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))
    second = nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))
    copied = nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Replicate()]))
    unsummed = nn.Parameter(DTensor.from_local(torch.ones(5, 3), mesh, [Partial()]))
    elsewhere = dist.init_device_mesh("cpu", (dist.get_world_size(), 1))
    first.grad = torch.ones_like(first)
    reg = RangeRegularizer([("first", first)], "margin", margin=0.5)
    for rule in (SGD, AdamW):
        with pytest.raises(ValueError, match=r"parameter 0 \('copied'\) .*: expected no copies on other ranks"):
            rule([("copied", copied)], lr=0.1, stochastic_rounding=True)
        with pytest.raises(ValueError, match=r"parameter 0 \('unsummed'\) .*: expected placements Shard or Replicate"):
            rule([("unsummed", unsummed)], lr=0.1)
        optimizer = rule([("first", first), ("second", second)], lr=0.1, regularizer=reg)
        second.grad = distribute_tensor(torch.ones(5, 3), elsewhere, [Shard(0), Replicate()])
        with pytest.raises(ValueError, match=r"group 0, parameter 1 \('second'\) .*: expected the device mesh of its"):
            optimizer.step()
        second.grad = None
        optimizer.add_param_group({"params": [("unsummed", unsummed)]})
        with pytest.raises(ValueError, match=r"parameter 0 \('unsummed'\) .*: expected placements Shard or Replicate"):
            optimizer.step()
        assert not optimizer.state
    assert torch.equal(whole(first), torch.ones(5, 3))


def with_a_scaler(model: nn.Module, expected_model: nn.Module, share: slice) -> None:
    """GradScaler with one step skipped, and clipping by the norm of the sharded gradients, against the whole model."""
    ends = []
    for network, rows in ((model, share), (expected_model, slice(None))):
        reg = RangeRegularizer(network, "soft_min_max", strength=0.05, temperature=3.0)
        optimizer = AdamW(network.parameters(), lr=0.01, regularizer=reg)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        torch.manual_seed(5)
        for step in range(4):
            inputs = torch.randn(8, 6)
            if step == 2:
                inputs[-1, 0] = torch.inf  # of the last rank alone
            optimizer.zero_grad()
            scaler.scale(network(inputs[rows]).square().mean()).backward()
            norm = nn.utils.get_total_norm([p.grad for p in network.parameters()]) / scaler.get_scale()
            scaler.step(optimizer, clip_coefficient=(0.1 / (norm + 1e-6)).clamp(max=1.0))
            scaler.update()
        assert scaler.get_scale() == 512.0
        assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
        ends.append([whole(weight) for weight in (*network.parameters(), *reg.parameters())])
    for weight, same in zip(*ends, strict=True):
        torch.testing.assert_close(weight, same, rtol=1e-3, atol=1e-5)


def continued(
    model: nn.Module, penalty: str, source: Path | None, target: Path | None, steps: int = 2
) -> RangeRegularizer:
    """Steps of the fused AdamW from a checkpoint of all of its state, or from the start."""
    start = {name: 1.5 * number for name, number in STARTS[penalty].items()} if source else STARTS[penalty]
    reg = RangeRegularizer(model, penalty, strength=lambda step: 0.05 * (step + 1), **start)
    everything = nn.ModuleDict({"model": model, "regularizer": reg})
    optimizer = AdamW(everything.parameters(), lr=0.05, regularizer=reg)
    if source:
        state = {
            "model": get_model_state_dict(everything),
            "optimizer": get_optimizer_state_dict(everything, optimizer),
        }
        checkpoint.load(state, checkpoint_id=source)
        set_model_state_dict(everything, state["model"])
        set_optimizer_state_dict(everything, optimizer, state["optimizer"])
    for _ in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(reg.step)
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    if target:
        state = {
            "model": get_model_state_dict(everything),
            "optimizer": get_optimizer_state_dict(everything, optimizer),
        }
        checkpoint.save(state, checkpoint_id=target)
    return reg


def copies_are_the_same(mesh: Any) -> None:
    """A step leaves the same bits in all copies of a weight, whose statistics are merged with those of sharded ones."""
    weights = [torch.linspace(-1, 1, 12).view(4, 3) * (index + 1) for index in range(6)]
    training, _ = pair(weights, mesh, [[Replicate()] * mesh.ndim, [Shard(0)] * mesh.ndim], "soft_min_max", AdamW, {})
    for _ in range(2):
        training.step()
    for weight in (*training.weights, *training.reg.parameters()):
        if not isinstance(weight, DTensor) or weight.placements[0].is_replicate():
            copies = [torch.empty_like(local(weight).detach()) for _ in range(dist.get_world_size())]
            dist.all_gather(copies, local(weight).detach())
            assert all(torch.equal(copy, copies[0]) for copy in copies)
