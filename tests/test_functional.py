"""The functions under autograd: finite differences, what needs a gradient and what not, graphs, in-place changes."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import require
from oracle import PARAMETERS, PENALTIES, call, default_parameter, expected
from tensors import leaves, randn
from tolerances import assert_gradient, assert_parameter_gradient, assert_values
from torch import Tensor

from r2_kernels import RangeRegularizer, backends, linf, reference, use_backend

each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
each_parametric_penalty = pytest.mark.parametrize("penalty", [name for name in PENALTIES if PARAMETERS[name]])


@pytest.fixture
def weights(device: torch.device) -> list[Tensor]:
    return leaves(randn(*shape, device=device) for shape in [(3, 4), (50,), (2, 3, 4), (7,)])


def parameter_for(penalty: str, weights: list[Tensor]) -> Tensor | None:
    parameter = default_parameter(penalty, weights)
    return None if parameter is None else parameter.requires_grad_()


@each_penalty
@pytest.mark.parametrize("temperature", [0.7, -0.4, 0.0, 1e-5, 40.0])
def test_gradcheck(backend: str, device: torch.device, penalty: str, temperature: float) -> None:
    if penalty != "soft_min_max" and temperature != 0.7:
        pytest.skip("no temperature")
    weights = leaves(randn(*shape, dtype=torch.float64, device=device) for shape in [(1,), (2, 3), (9,)])
    if PARAMETERS[penalty] is None:
        assert torch.autograd.gradcheck(lambda *ws: call(penalty, ws), weights)
        return
    start = [temperature] * 3 if penalty == "soft_min_max" else [0.5, -0.6, 0.7]
    parameter = torch.tensor(start, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, *ws: call(penalty, ws, p), (parameter, *weights))


@each_penalty
def test_the_result(backend: str, weights: list[Tensor], penalty: str) -> None:
    values = call(penalty, weights, parameter_for(penalty, weights))
    assert values.shape == (4,)
    assert values.dtype is torch.float32
    assert values.device == weights[0].device
    assert values.requires_grad


@each_penalty
@pytest.mark.parametrize("sequence", [list, tuple])
def test_any_sequence(backend: str, weights: list[Tensor], penalty: str, sequence: type) -> None:
    parameter = parameter_for(penalty, weights)
    assert torch.equal(call(penalty, sequence(weights), parameter), call(penalty, weights, parameter))


@each_penalty
def test_a_parameter_list(backend: str, weights: list[Tensor], penalty: str) -> None:
    parameters = [torch.nn.Parameter(weight.detach()) for weight in weights]
    call(penalty, parameters, default_parameter(penalty, weights)).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)


@each_penalty
@pytest.mark.parametrize("frozen", [[0], [3], [1, 2], [0, 3], [0, 1, 2], [0, 1, 2, 3]], ids=str)
def test_frozen_weights(backend: str, device: torch.device, penalty: str, frozen: list[int]) -> None:
    """They have values as the others, and no gradients; the others' are right, in lists of several chunks too."""
    sizes = [40_000 if penalty == "linf" else 33, 500, 20_000, 7]
    weights = [randn(size, device=device).requires_grad_(index not in frozen) for index, size in enumerate(sizes)]
    parameter = parameter_for(penalty, weights)
    coefficients = torch.tensor([0.5, 1.5, -1.0, 2.0], device=device)
    values = call(penalty, weights, parameter)
    wanted = expected(penalty, weights, parameter, coefficients)
    assert_values(values.detach(), wanted.values, weights)
    if len(frozen) == 4 and parameter is None:
        assert not values.requires_grad
        return
    values.backward(coefficients)
    for index, weight in enumerate(weights):
        if index in frozen:
            assert weight.grad is None
        else:
            assert_gradient(weight.grad, wanted.gradients[index], index=index, coefficient=2.0)
    if parameter is not None:
        assert_parameter_gradient(parameter.grad, wanted.parameter_gradient, wanted.parameter_scales)


@each_parametric_penalty
def test_a_frozen_parameter(backend: str, weights: list[Tensor], penalty: str) -> None:
    parameter = default_parameter(penalty, weights)
    call(penalty, weights, parameter).sum().backward()
    wanted = expected(penalty, weights, parameter)
    assert parameter.grad is None
    for index, weight in enumerate(weights):
        assert_gradient(weight.grad, wanted.gradients[index], index=index)


@each_penalty
def test_no_graph_without_gradients(backend: str, weights: list[Tensor], penalty: str) -> None:
    with torch.no_grad():
        assert not call(penalty, weights, parameter_for(penalty, weights)).requires_grad
    with torch.inference_mode():
        assert not call(penalty, weights, parameter_for(penalty, weights)).requires_grad
    detached = [weight.detach() for weight in weights]
    assert not call(penalty, detached, default_parameter(penalty, weights)).requires_grad


@each_penalty
def test_upstream_gradients(backend: str, weights: list[Tensor], penalty: str) -> None:
    """Backward of any function of the values: here one that gives each its own, a zero and a negative one included."""
    parameter = parameter_for(penalty, weights)
    coefficients = torch.tensor([2.0, 0.0, -3.0, 0.125], device=weights[0].device)
    (call(penalty, weights, parameter) * coefficients).sum().backward()
    wanted = expected(penalty, weights, parameter, coefficients)
    for index, weight in enumerate(weights):
        assert_gradient(weight.grad, wanted.gradients[index], index=index, coefficient=3.0)
    assert not weights[1].grad.any()
    if parameter is not None:
        assert_parameter_gradient(parameter.grad, wanted.parameter_gradient, wanted.parameter_scales)


@each_penalty
def test_only_some_values_are_used(backend: str, weights: list[Tensor], penalty: str) -> None:
    parameter = parameter_for(penalty, weights)
    call(penalty, weights, parameter)[2].backward()
    used = torch.tensor([0.0, 0.0, 1.0, 0.0])
    wanted = expected(penalty, weights, parameter, used)
    for index, weight in enumerate(weights):
        assert_gradient(weight.grad, wanted.gradients[index], index=index)


@each_penalty
def test_two_graphs_add_up(backend: str, weights: list[Tensor], penalty: str) -> None:
    parameter = parameter_for(penalty, weights)
    first = call(penalty, weights, parameter)
    second = call(penalty, weights, parameter)
    first.sum().backward()
    once = [weight.grad.clone() for weight in weights]
    second.sum().backward()
    for weight, gradient in zip(weights, once, strict=True):
        assert torch.equal(weight.grad, 2 * gradient)


@each_penalty
def test_one_weight_twice_in_the_list(backend: str, weights: list[Tensor], penalty: str) -> None:
    parameter = default_parameter(penalty, weights[:1])
    twice = None if parameter is None else parameter.expand(2)
    values = call(penalty, [weights[0], weights[0]], twice)
    values.sum().backward()
    assert values[0] == values[1]
    wanted = expected(penalty, weights[:1], parameter)
    assert_gradient(weights[0].grad, 2 * wanted.gradients[0])


@each_penalty
def test_retained_graphs(backend: str, weights: list[Tensor], penalty: str) -> None:
    values = call(penalty, weights, parameter_for(penalty, weights))
    values.sum().backward(retain_graph=True)
    once = [weight.grad.clone() for weight in weights]
    values.sum().backward()
    for weight, gradient in zip(weights, once, strict=True):
        assert torch.equal(weight.grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="second time"):
        values.sum().backward()


@each_penalty
@pytest.mark.parametrize("what", ["weight", "parameter"])
def test_changes_between_forward_and_backward_raise(
    backend: str, weights: list[Tensor], penalty: str, what: str
) -> None:
    parameter = parameter_for(penalty, weights)
    changed = weights[2] if what == "weight" else parameter
    if changed is None:
        pytest.skip("no parameter")
    values = call(penalty, weights, parameter)
    with torch.no_grad():
        changed.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


@each_penalty
def test_second_derivatives_raise(backend: str, weights: list[Tensor], penalty: str) -> None:
    """The functions are differentiable once."""
    value = call(penalty, weights, parameter_for(penalty, weights)).square().sum()
    (gradient,) = torch.autograd.grad(value, weights[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@each_penalty
def test_inputs_are_not_changed(backend: str, weights: list[Tensor], penalty: str) -> None:
    parameter = parameter_for(penalty, weights)
    before = [weight.detach().clone() for weight in weights]
    kept = None if parameter is None else parameter.detach().clone()
    call(penalty, weights, parameter).sum().backward()
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, before, strict=True))
    assert parameter is None or torch.equal(parameter, kept)


@each_penalty
def test_gradients_are_fresh_memory(backend: str, weights: list[Tensor], penalty: str) -> None:
    """No gradient shares memory with another, or with a weight: an optimizer will write to both."""
    call(penalty, weights, parameter_for(penalty, weights)).sum().backward()
    tensors = [*weights, *(weight.grad for weight in weights)]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@each_penalty
def test_weights_may_be_freed_before_backward(backend: str, device: torch.device, penalty: str) -> None:
    """The graph keeps what it needs."""
    base = randn(1000, device=device).requires_grad_()
    parameter = default_parameter(penalty, [base])
    values = call(penalty, [base * 1.0], parameter)
    junk = [randn(1000, device=device) for _ in range(10)]
    values.sum().backward()
    assert_gradient(base.grad, expected(penalty, [base], parameter).gradients[0])
    assert len(junk) == 10


@each_penalty
def test_under_autocast(backend: str, weights: list[Tensor], penalty: str) -> None:
    """Autocast narrows matrix products, not the penalties."""
    parameter = parameter_for(penalty, weights)
    plain = call(penalty, weights, parameter)
    with torch.autocast(weights[0].device.type, dtype=torch.bfloat16):
        assert torch.equal(call(penalty, weights, parameter), plain)


@each_penalty
@pytest.mark.parametrize("other", ["reference", "cpu"])
def test_backward_computes_with_the_backend_of_forward(
    backend: str, device: torch.device, penalty: str, other: str
) -> None:
    """What reduce keeps for apply is one backend's own, so the choice at the time of backward must not matter."""
    if backends.by_name(other).why_unavailable() is not None or device.type != "cpu":
        pytest.skip(f"{other} is not available here")
    weights = leaves(randn(size, device=device) for size in (100, 40_000))
    parameter = default_parameter(penalty, weights)
    call(penalty, weights, parameter).sum().backward()
    inside = [weight.grad.clone() for weight in weights]
    weights = leaves(weights)
    values = call(penalty, weights, parameter)
    with use_backend(other):
        values.sum().backward()
    assert all(torch.equal(weight.grad, gradient) for weight, gradient in zip(weights, inside, strict=True))


def test_public_functions_are_those_of_the_reference() -> None:
    for name in PENALTIES:
        assert callable(getattr(reference, name))


def test_linf_of_fake_tensors(backend: str) -> None:
    """Shapes can be worked out without data, as a compiler does."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if backend != "cpu":
        pytest.skip("the other backends are no operators of their own")
    with FakeTensorMode() as mode:
        weights = [mode.from_tensor(torch.ones(3, 4)), mode.from_tensor(torch.ones(2, dtype=torch.float64))]
        values = linf(weights)
    assert values.shape == (2,)
    assert values.dtype is torch.float64


@each_penalty
@pytest.mark.parametrize("mode", ["functional", "regularizer"])
def test_under_torch_compile(penalty: str, mode: str) -> None:
    """Traced into one graph, no break, with the eager result, where no backend is asked for."""
    require("cpu")
    weights = leaves(randn(*shape) for shape in [(3, 4), (50, 1), (40_000, 1)])
    parameter = parameter_for(penalty, weights)
    reg = RangeRegularizer([(str(index), weight) for index, weight in enumerate(weights)], penalty)

    def loss(parameter: Tensor | None, *weights: Tensor) -> Tensor:
        return reg() if mode == "regularizer" else call(penalty, list(weights), parameter).sum()

    loss(parameter, *weights).backward()
    eager = [weight.grad.clone() for weight in weights]
    for weight in weights:
        weight.grad = None
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    compiled(parameter, *weights).backward()
    for weight, gradient in zip(weights, eager, strict=True):
        assert torch.equal(weight.grad, gradient)
