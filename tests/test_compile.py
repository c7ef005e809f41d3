"""Training steps under torch.compile: one graph, the eager result, and no compilation after the first step's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import require
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from r2_kernels import RangeRegularizer, optim, use_backend
from r2_kernels.penalties import PENALTIES

each_penalty = pytest.mark.parametrize("penalty", list(PENALTIES))
Step = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    require("cpu")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def warm_up(step: int) -> float:
    """A schedule that cannot be traced without a guard on its branch."""
    return 0.05 * (step + 1) / 3 if step < 3 else 0.05


STRENGTHS: dict[str, Any] = {
    "number": 0.05,
    "per_layer": [0.05, 0.1],
    "tensor": torch.tensor(0.05),
    "function": warm_up,
}
each_strength = pytest.mark.parametrize("kind", list(STRENGTHS))


class Training:
    """A small model, its regularizer, and an optimizer over both; the same each time."""

    def __init__(self, penalty: str = "soft_min_max", strength: Any = 0.05) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.reg = RangeRegularizer(self.model, penalty, strength=copy.deepcopy(strength))
        self.parameters = [*self.model.parameters(), *self.reg.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9)

    def task_loss(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).square().mean()

    def loss_with_penalty(self, inputs: Tensor) -> Tensor:
        return self.task_loss(inputs) + self.reg()

    def add_gradients(self, inputs: Tensor) -> Tensor:
        return self.reg.add_gradients_()

    def whole_step_but_the_update(self, inputs: Tensor) -> Tensor:
        loss = self.task_loss(inputs)
        loss.backward()
        return loss.detach() + self.reg.add_gradients_()

    def loss_and_backward(self, inputs: Tensor) -> Tensor:
        loss = self.loss_with_penalty(inputs)
        loss.backward()
        return loss.detach()


def inputs() -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(4, 6, generator=generator) for _ in range(6)]


def train(training: Training, way: str, compiler: Callable[[Step], Step] = lambda step: step) -> list[Tensor]:
    """What a training of that way computes: every step's losses, and at last every parameter."""
    step = compiler(getattr(training, way))
    results = []
    for index, batch in enumerate(inputs()):
        training.optimizer.zero_grad()
        if way == "add_gradients":
            training.task_loss(batch).backward()
        # The first step compiles; a later one must not.
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            loss = step(batch)
        if way == "loss_with_penalty":
            loss.backward()
        training.optimizer.step()
        results.append(loss.detach().clone())
    return results + [parameter.detach().clone() for parameter in training.parameters]


def in_one_graph(backend: str = "aot_eager") -> Callable[[Step], Step]:
    return lambda step: torch.compile(step, backend=backend, fullgraph=True)


def assert_the_same(results: list[Tensor], expected: list[Tensor], *, bitwise: bool = True) -> None:
    for result, wanted in zip(results, expected, strict=True):
        if bitwise:
            assert torch.equal(result, wanted)
        else:
            torch.testing.assert_close(result, wanted)


@each_penalty
@each_strength
@pytest.mark.parametrize("way", ["loss_with_penalty", "add_gradients"])
def test_a_step_is_one_graph_for_all_steps(penalty: str, kind: str, way: str) -> None:
    compiled, eager = (Training(penalty, STRENGTHS[kind]) for _ in range(2))
    assert_the_same(train(compiled, way, in_one_graph()), train(eager, way))
    assert compiled.reg.step == eager.reg.step == (6 if kind == "function" else 0)


@each_penalty
@pytest.mark.parametrize("way", ["whole_step_but_the_update", "loss_and_backward"])
def test_backward_in_the_graph(penalty: str, way: str) -> None:
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this version of torch.compile traces no backward()")
    expected = train(Training(penalty, warm_up), way)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert_the_same(train(Training(penalty, warm_up), way, in_one_graph()), expected)


def test_with_inductor() -> None:
    expected = train(Training("soft_min_max", warm_up), "loss_with_penalty")
    results = train(Training("soft_min_max", warm_up), "loss_with_penalty", in_one_graph("inductor"))
    assert_the_same(results, expected, bitwise=False)


@pytest.mark.parametrize("fills", [False, True], ids=["set", "filled"])
def test_a_strength_that_the_loop_changes(fills: bool) -> None:
    """A number that is set anew, or a tensor that is filled, before each step."""
    training = Training("linf", torch.tensor(0.0) if fills else 0.0)
    step = torch.compile(training.reg.add_gradients_, backend="aot_eager", fullgraph=True)
    for index in range(4):
        training.optimizer.zero_grad()
        training.task_loss(inputs()[index]).backward()
        if fills:
            assert isinstance(training.reg.strength, Tensor)
            training.reg.strength.fill_(0.1 * index)
        else:
            training.reg.strength = 0.1 * index
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            loss = step()
        assert loss.item() == pytest.approx(0.1 * index * sum(training.reg.losses().values()).item(), rel=1e-6)


def test_a_scale_as_a_tensor() -> None:
    """As ``GradScaler`` has it: another number at each step."""
    training = Training("linf")
    step = torch.compile(lambda scale: training.reg.add_gradients_(scale=scale), backend="aot_eager", fullgraph=True)
    for index in range(4):
        training.optimizer.zero_grad()
        training.task_loss(inputs()[0]).backward()
        before = [parameter.grad.clone() for parameter in training.reg.weights()]
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            step(torch.tensor(2.0**index))
        for weight, gradient in zip(training.reg.weights(), before, strict=True):
            added = (weight.grad - gradient).abs().max().item()
            assert added == pytest.approx(0.05 * 2**index, rel=1e-5)


def test_two_regularizers_with_a_schedule_each() -> None:
    training = Training("linf", lambda step: 1.0 + step)
    other = RangeRegularizer(training.model, "linf", strength=lambda step: 100.0 * step)
    twin = copy.deepcopy(other)
    twin.step = 7
    twin_value = sum(twin.losses().values()).item()
    total = sum(training.reg.losses().values()).item()
    step = torch.compile(lambda: (training.reg(), other(), twin()), backend="aot_eager", fullgraph=True)
    for index in range(3):
        values = [value.item() for value in step()]
        expected = [(1.0 + index) * total, 100.0 * index * total, 100.0 * (7 + index) * twin_value]
        assert values == pytest.approx(expected, rel=1e-6)


def test_a_schedule_that_raises() -> None:
    training = Training("linf", lambda step: "strong")
    step = torch.compile(training.reg.add_gradients_, backend="aot_eager", fullgraph=True)
    with pytest.raises(TypeError, match="strength: expected a function that returns a number, got 'strong'"):
        step()


@each_penalty
@pytest.mark.parametrize("way", ["loss_with_penalty", "add_gradients"])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_backend_that_was_asked_for(penalty: str, way: str, name: str) -> None:
    with use_backend(name):
        assert_the_same(train(Training(penalty), way, in_one_graph()), train(Training(penalty), way))


def test_another_backend_is_another_graph() -> None:
    training = Training("soft_min_max")
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(training.reg, backend=counter, fullgraph=True)
    with use_backend("cpu"):
        operators = {node.target for node in _graph_of(step, counter).nodes if node.op == "call_function"}
    assert any("r2_kernels" in str(operator) for operator in operators)
    with use_backend("reference"):
        operators = {node.target for node in _graph_of(step, counter).nodes if node.op == "call_function"}
    assert not any("r2_kernels" in str(operator) for operator in operators)


def _graph_of(step: Callable[[], Tensor], counter: CompileCounterWithBackend) -> Any:
    step()
    inner = [module.graph for module in counter.graphs[-1].modules() if isinstance(module, torch.fx.GraphModule)]
    graph = torch.fx.Graph()
    for part in inner:
        graph.graph_copy(part, {})
    return graph


def test_a_replaced_parameter_is_followed() -> None:
    training = Training("linf", 1.0)
    step = torch.compile(training.reg, backend="aot_eager", fullgraph=True)
    step()
    training.model[0].weight = nn.Parameter(torch.full((4, 5), 100.0))
    assert step().item() == pytest.approx(100.0 + training.model[2].weight.abs().max().item())


def test_a_graph_that_saved_a_gradient_notices_the_change() -> None:
    training = Training("linf")
    training.task_loss(inputs()[0]).backward()
    weight = training.model[0].weight
    before = weight.grad._version
    torch.compile(training.reg.add_gradients_, backend="aot_eager", fullgraph=True)()
    assert weight.grad._version > before


@pytest.mark.parametrize("rule", [optim.AdamW, optim.SGD])
def test_the_optimizers_step_in_a_compiled_function(rule: Any) -> None:
    """It breaks the graph, since a fused step has nothing to gain from one, and computes as in eager mode."""

    def results(compiler: Callable[[Step], Step]) -> list[Tensor]:
        training = Training("soft_min_max", warm_up)
        optimizer = rule(training.model.parameters(), lr=0.01, regularizer=training.reg)

        def step(batch: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = training.task_loss(batch)
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = compiler(step)
        losses = [step(batch) for batch in inputs()]
        return losses + [parameter.detach() for parameter in training.parameters]

    compiled = results(lambda step: torch.compile(step, backend="aot_eager"))
    assert_the_same(compiled, results(lambda step: step))
