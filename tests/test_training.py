"""Trainings as people run them: interrupted, accumulated, checkpointed, in forks and in threads."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import r2_kernels
from r2_kernels import RangeRegularizer, optim
from r2_kernels.penalties import PENALTIES

BACKEND = "cpu"

pytestmark = pytest.mark.usefixtures("cpu_backend")
each_penalty = pytest.mark.parametrize("penalty", list(PENALTIES))


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(40, 33), nn.Tanh(), nn.Linear(33, 5))


def regularizer(model: nn.Module, penalty: str, **settings: Any) -> RangeRegularizer:
    start = {"soft_min_max": {"temperature": 3.0}, "margin": {"margin": 1.0}}.get(penalty, {})
    return RangeRegularizer(model, penalty, **({"strength": 0.05} | start | settings))


def batch(number: int) -> Tensor:
    return torch.randn(12, 40, generator=torch.Generator().manual_seed(number))


def task_loss(model: nn.Module, number: int) -> Tensor:
    return model(batch(number)).square().mean()


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


def warm_up(step: int) -> float:
    return 0.02 * min(step, 3)


# Interruption


class Training:
    """A model, its regularizer, an optimizer and a learning rate schedule: all that a checkpoint holds."""

    def __init__(self, penalty: str, kind: str, is_fused: bool) -> None:
        self.model = network()
        self.reg = regularizer(self.model, penalty, strength=warm_up)
        groups = [{"params": list(self.model.parameters())}]
        if list(self.reg.parameters()):
            groups.append({"params": list(self.reg.parameters()), "lr": 0.2, "weight_decay": 0.0})
        settings = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.01}}[kind]
        if is_fused:
            self.optimizer = getattr(optim, kind)(groups, regularizer=self.reg, **settings)
        else:
            self.optimizer = getattr(torch.optim, kind)(groups, **settings)
        self.is_fused = is_fused
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        task_loss(self.model, number).backward()
        if not self.is_fused:
            self.reg.add_gradients_()
        self.optimizer.step()
        self.schedule.step()

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "reg": self.reg, "optimizer": self.optimizer, "schedule": self.schedule}

    def save(self) -> bytes:
        buffer = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(states[name])

    def tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.reg.parameters()]


@each_penalty
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("is_fused", [False, True], ids=["add_gradients_", "inside"])
def test_interrupted_at_any_step_it_goes_on_bitwise_the_same(penalty: str, kind: str, is_fused: bool) -> None:
    whole = Training(penalty, kind, is_fused)
    checkpoints = []
    for number in range(6):
        checkpoints.append(whole.save())
        whole.step(number)
    for start, saved in enumerate(checkpoints):
        resumed = Training(penalty, kind, is_fused)
        resumed.load(saved)
        for number in range(start, 6):
            resumed.step(number)
        assert all(map(torch.equal, whole.tensors(), resumed.tensors())), f"interrupted before step {start}"


# Accumulation, activation checkpointing, functional calls


@each_penalty
@pytest.mark.parametrize("penalize", ["loss", "in place"])
def test_accumulated_gradients(penalty: str, penalize: str) -> None:
    whole, parts = network(), network()
    whole_reg, parts_reg = regularizer(whole, penalty), regularizer(parts, penalty)
    (whole(torch.cat([batch(0), batch(1)])).square().mean() + whole_reg()).backward()
    (task_loss(parts, 0) / 2).backward()
    (task_loss(parts, 1) / 2 + (parts_reg() if penalize == "loss" else 0)).backward()
    if penalize == "in place":
        parts_reg.add_gradients_()
    torch.testing.assert_close(gradients(parts, parts_reg), gradients(whole, whole_reg))


@each_penalty
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(penalty: str, use_reentrant: bool) -> None:
    """The penalty may stand inside a checkpointed function, too: it is then computed once more in backward."""

    def run(checkpointed: bool, is_inside: bool) -> list[Tensor]:
        model = network()
        reg = regularizer(model, penalty)

        def forward(inputs: Tensor) -> Tensor:
            return model(inputs).square().mean() + (reg() if is_inside else 0)

        inputs = batch(0).requires_grad_()
        loss = checkpoint(forward, inputs, use_reentrant=use_reentrant) if checkpointed else forward(inputs)
        (loss if is_inside else loss + reg()).backward()
        return gradients(model, reg)

    expected = run(False, False)
    for is_inside in (False, True):
        assert all(map(torch.equal, run(True, is_inside), expected))


class WithPenalty(nn.Module):
    """A model whose output is its loss, the penalty included."""

    def __init__(self, penalty: str) -> None:
        super().__init__()
        self.model = network()
        self.reg = regularizer(self.model, penalty)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).square().mean() + self.reg()


@each_penalty
def test_functional_call_regularizes_the_weights_it_is_given(penalty: str) -> None:
    module = WithPenalty(penalty)
    given = {name: (0.5 * value).detach().requires_grad_() for name, value in module.named_parameters()}
    loss = functional_call(module, given, (batch(0),))
    found = torch.autograd.grad(loss, list(given.values()))
    other = WithPenalty(penalty)
    other.load_state_dict(other.state_dict() | {name: value.detach() for name, value in given.items()})
    expected = other(batch(0))
    expected.backward()
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, found, gradients(other)))
    assert all(value.grad is None for value in module.parameters())


def test_transforms_of_functions_say_that_they_are_not_supported() -> None:
    weight = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda w: r2_kernels.linf([w]).sum())(weight)


# Processes and threads


class Penalties(Dataset):  # type: ignore[type-arg]
    """Each item is a penalty that a worker computes."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        weight = torch.randn(200_000, generator=torch.Generator().manual_seed(index))
        return r2_kernels.soft_min_max([weight, weight[:7]], torch.tensor([2.0, 3.0]))


@pytest.mark.usefixtures("restored_threads")
def test_forked_workers_after_use() -> None:
    torch.set_num_threads(2)
    dataset = Penalties()
    expected = [dataset[index] for index in range(len(dataset))]
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(map(torch.equal, loader, expected))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("is_fused", [False, True], ids=["add_gradients_", "inside"])
def test_two_trainings_at_once(is_fused: bool) -> None:
    torch.set_num_threads(
        1
    )  # What torch computes besides depends on their number, which new threads have their own of.

    def trainings() -> list[Training]:
        return [Training(penalty, "AdamW", is_fused) for penalty in (*PENALTIES, "soft_min_max")]

    def run(training: Training) -> list[Tensor]:
        for number in range(20):
            training.step(number)
        return training.tensors()

    alone = [run(training) for training in trainings()]
    with ThreadPoolExecutor(2) as pool:
        for before, after in zip(alone, pool.map(run, trainings()), strict=True):
            assert all(map(torch.equal, before, after))


def test_two_regularizers_of_one_model() -> None:
    """Each owns its M or temperature; their gradients add up."""
    model = network()
    regs = [regularizer(model, "soft_min_max"), regularizer(model, "margin"), regularizer(model, "linf")]
    task_loss(model, 0).backward()
    for reg in regs:
        reg.add_gradients_()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twins = [regularizer(twin, reg.penalty) for reg in regs]
    (task_loss(twin, 0) + sum(reg() for reg in twins)).backward()
    torch.testing.assert_close(gradients(model, *regs), gradients(twin, *twins))


# Size


@pytest.mark.slow
@each_penalty
def test_more_entries_than_32_bits_count(penalty: str) -> None:
    """4 GiB of weights, and as much of gradients where the penalty has some."""
    count = 2**31 + 5
    weight = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    values = {-1: 3.0, -3: -2.0, 5: 1.5}
    with torch.no_grad():
        for place, value in values.items():
            weight[place] = value
    weight.grad = torch.zeros_like(weight)
    start = {"margin": 1.0, "temperature": 100.0}
    name = PENALTIES[penalty].parameter
    reg = RangeRegularizer([("weight", weight)], penalty, strength=1.0, include="*")
    if name is not None:
        with torch.no_grad():
            reg.get_parameter(name).fill_(start[name])
    value = reg.add_gradients_()
    expected: dict[str, Callable[[], tuple[float, dict[int, float]]]] = {
        "linf": lambda: (3.0, {-1: 1.0}),
        "margin": lambda: (1.0 + 2.0 + 1.0 + 0.5, {-1: 1.0, -3: -1.0, 5: 1.0}),
        "soft_min_max": lambda: (5.0, {-1: 1.0, -3: -1.0}),
    }
    total, slopes = expected[penalty]()
    assert value.item() == pytest.approx(total, rel=1e-6)
    for place, slope in slopes.items():
        assert weight.grad[place].item() == slope
    assert torch.count_nonzero(weight.grad).item() == len(slopes)
