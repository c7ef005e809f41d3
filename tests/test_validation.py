"""What bad input gets: which argument, which tensor by index or name, what was expected, and nothing touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import PARAMETERS, PENALTIES
from tensors import leaves, randn
from torch import Tensor, nn

import r2_kernels
from r2_kernels import RangeRegularizer, reference

each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
each_parametric_penalty = pytest.mark.parametrize("penalty", [name for name in PENALTIES if PARAMETERS[name]])
each_implementation = pytest.mark.parametrize("module", [r2_kernels, reference], ids=["r2_kernels", "reference"])


def call(module: Any, penalty: str, weights: Any, parameter: Any = None) -> Tensor:
    function = getattr(module, penalty)
    if PARAMETERS[penalty] is None:
        return function(weights)
    if parameter is None:
        count = len(weights) if hasattr(weights, "__len__") else 1
        parameter = torch.ones(count)
    return function(weights, parameter)


def good(count: int = 3) -> list[Tensor]:
    return leaves(randn(4, 5) for _ in range(count))


BAD_WEIGHTS: dict[str, tuple[Callable[[], Tensor | object], type[Exception], str]] = {
    "int64": (lambda: torch.ones(3, dtype=torch.int64), TypeError, r"weights\[1\].*float32.*got torch.int64"),
    "int8": (lambda: torch.ones(3, dtype=torch.int8), TypeError, r"weights\[1\].*float32.*got torch.int8"),
    "bool": (lambda: torch.ones(3, dtype=torch.bool), TypeError, r"weights\[1\].*float32.*got torch.bool"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), TypeError, r"weights\[1\].*float32.*got torch.complex64"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), TypeError, r"weights\[1\].*got torch.float8_e4m3fn"),
    "sparse COO": (lambda: torch.eye(3).to_sparse(), TypeError, r"weights\[1\].*dense.*got layout torch.sparse_coo"),
    "sparse CSR": (lambda: torch.eye(3).to_sparse_csr(), TypeError, r"weights\[1\].*dense.*torch.sparse_csr"),
    "empty": (lambda: torch.ones(0), ValueError, r"weights\[1\].*at least one element, got shape \(0,\)"),
    "empty matrix": (lambda: torch.ones(3, 0), ValueError, r"weights\[1\].*at least one element, got shape \(3, 0\)"),
    "other device": (lambda: torch.ones(3, device="meta"), ValueError, r"weights\[1\].*device cpu.*got meta"),
    "a number": (lambda: 1.0, TypeError, r"weights\[1\].*expected a tensor, got float"),
    "None": (lambda: None, TypeError, r"weights\[1\].*expected a tensor, got NoneType"),
    "a list": (lambda: [1.0], TypeError, r"weights\[1\].*expected a tensor, got list"),
}


@each_implementation
@each_penalty
@pytest.mark.parametrize("bad", BAD_WEIGHTS)
def test_a_bad_weight(module: Any, penalty: str, bad: str) -> None:
    make, error, message = BAD_WEIGHTS[bad]
    with pytest.raises(error, match=message):
        call(module, penalty, [torch.ones(2, 2), make(), torch.ones(3)])


@each_implementation
@each_penalty
@pytest.mark.parametrize("empty", [[], ()])
def test_no_weights(module: Any, penalty: str, empty: Any) -> None:
    with pytest.raises(ValueError, match="weights: expected at least one tensor, got an empty"):
        call(module, penalty, empty)


@each_implementation
@each_penalty
def test_what_is_no_sequence(module: Any, penalty: str) -> None:
    for wrong in (torch.ones(3, 2), 1.0, None, (weight for weight in good())):
        with pytest.raises(TypeError, match="weights: expected a list or tuple of tensors, got"):
            call(module, penalty, wrong, torch.ones(3))


@each_implementation
@each_parametric_penalty
@pytest.mark.parametrize(
    "shape", [(), (1,), (2,), (4,), (0,), (3, 1), (1, 3)], ids=lambda shape: "x".join(map(str, shape)) or "scalar"
)
def test_a_parameter_of_the_wrong_shape(module: Any, penalty: str, shape: tuple[int, ...]) -> None:
    message = rf"{PARAMETERS[penalty]}: expected shape \(3,\).*got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        call(module, penalty, good(), torch.ones(shape))


@each_implementation
@each_parametric_penalty
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.int32])
def test_a_parameter_of_the_wrong_dtype(module: Any, penalty: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"{PARAMETERS[penalty]}: expected .*floating-point.*got {dtype}"):
        call(module, penalty, good(), torch.ones(3, dtype=dtype))


@each_implementation
@each_parametric_penalty
def test_a_parameter_on_another_device(module: Any, penalty: str) -> None:
    with pytest.raises(ValueError, match=rf"{PARAMETERS[penalty]}: expected device cpu.*got meta"):
        call(module, penalty, good(), torch.ones(3, device="meta"))


@each_implementation
@each_parametric_penalty
def test_a_sparse_parameter(module: Any, penalty: str) -> None:
    with pytest.raises(TypeError, match=rf"{PARAMETERS[penalty]}: expected a dense"):
        call(module, penalty, good(), torch.ones(3).to_sparse())


@each_implementation
@each_parametric_penalty
@pytest.mark.parametrize("wrong", [0.5, [0.5, 0.5, 0.5], "0.5"], ids=["number", "list", "string"])
def test_a_parameter_that_is_no_tensor(module: Any, penalty: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"{PARAMETERS[penalty]}: expected a tensor of shape \(3,\), got"):
        call(module, penalty, good(), wrong)


@pytest.mark.parametrize("index", [0, 20_999])
def test_the_index_is_the_bad_one(index: int) -> None:
    weights = list(torch.ones(21_000).unbind())
    weights[index] = weights[index].long()
    with pytest.raises(TypeError, match=rf"weights\[{index}\]"):
        r2_kernels.linf(weights)


# RangeRegularizer


class Model(nn.Module):
    """Three weights, two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 7)
        self.third = nn.Embedding(8, 3)


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def gradients(*modules: nn.Module) -> list[Any]:
    """The values of all gradients there are, to compare."""
    found: list[Any] = []
    for module in modules:
        for parameter in module.parameters():
            gradient = parameter.grad
            if gradient is None or gradient.device.type == "meta":
                found.append(None)
            else:
                found.append((gradient.to_dense() if gradient.layout is not torch.strided else gradient).tolist())
    return found


@pytest.mark.parametrize("penalty", ["l2", "", "Linf", None, 3])
def test_an_unknown_penalty(penalty: Any) -> None:
    with pytest.raises(
        (ValueError, TypeError), match=r"penalty: expected one of 'linf', 'margin', 'soft_min_max', 'kurtosis', got"
    ):
        RangeRegularizer(Model(), penalty)


@pytest.mark.parametrize("model", [3, None, torch.ones(3), 1.5])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a module or an iterable of \(name, parameter\), got"):
        RangeRegularizer(model)


@pytest.mark.parametrize("item", [torch.ones(2, 2), "ab", ("a",), (1, torch.ones(2, 2)), ("a", 1, 2)], ids=repr)
def test_what_is_no_named_parameter(item: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected \(name, parameter\) at position 1"):
        RangeRegularizer([("good", nn.Parameter(torch.ones(2, 2))), item])


def test_a_name_without_a_tensor() -> None:
    with pytest.raises(TypeError, match="model: expected a tensor for 'bad', got float"):
        RangeRegularizer([("good", nn.Parameter(torch.ones(2, 2))), ("bad", 1.0)])


def test_one_name_for_two_parameters() -> None:
    """Results by name would lose one of them."""
    with pytest.raises(ValueError, match=r"model: expected .*name.*'same'"):
        RangeRegularizer([("same", nn.Parameter(torch.ones(2, 2))), ("same", nn.Parameter(torch.ones(2, 2)))])


@pytest.mark.parametrize("model", [nn.ReLU(), nn.BatchNorm1d(3), [], nn.Linear(2, 2).requires_grad_(False)], ids=repr)
def test_nothing_to_regularize(model: Any) -> None:
    with pytest.raises(ValueError, match="model: expected at least one weight"):
        RangeRegularizer(model)


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"expected at least one weight|include"):
        RangeRegularizer(Model(), include="frist*")


def test_an_empty_weight_is_named() -> None:
    model = Model()
    model.second = nn.Linear(0, 7)
    with pytest.raises(ValueError, match=r"'second.weight'.*at least one element"):
        RangeRegularizer(model)


def test_a_complex_weight_is_named() -> None:
    model = Model()
    model.second = nn.Linear(3, 7, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"'second.weight'.*got torch.complex64"):
        RangeRegularizer(model)


def test_weights_on_two_devices_are_named() -> None:
    model = Model()
    model.second = nn.Linear(3, 7, device="meta")
    with pytest.raises(ValueError, match=r"'second.weight'.*device cpu.*got meta"):
        RangeRegularizer(model)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("argument", ["temperature", "margin"])
def test_a_start_for_what_the_penalty_lacks(penalty: str, argument: str) -> None:
    if PARAMETERS[penalty] == argument:
        pytest.skip("it has that one")
    with pytest.raises(ValueError, match=rf"{argument}: .*{penalty!r} has no {argument}"):
        RangeRegularizer(Model(), penalty, **{argument: 1.0})


@each_parametric_penalty
@pytest.mark.parametrize("start", [[1.0], [1.0, 2.0], torch.ones(4), torch.ones(3, 1)], ids=repr)
def test_a_start_of_the_wrong_length(penalty: str, start: Any) -> None:
    argument = str(PARAMETERS[penalty])
    with pytest.raises(ValueError, match=rf"{argument}: expected .*\(3,\), got"):
        RangeRegularizer(Model(), penalty, **{argument: start})


@each_parametric_penalty
@pytest.mark.parametrize("start", ["high", [1.0, "b", 2.0], object()], ids=["string", "list", "object"])
def test_a_start_of_the_wrong_type(penalty: str, start: Any) -> None:
    argument = str(PARAMETERS[penalty])
    with pytest.raises(TypeError, match=rf"{argument}: expected"):
        RangeRegularizer(Model(), penalty, **{argument: start})


@pytest.mark.parametrize("strength", [[0.1], [0.1, 0.2], torch.ones(4), torch.ones(3, 3)], ids=repr)
def test_a_strength_of_the_wrong_length(strength: Any) -> None:
    with pytest.raises(ValueError, match=r"strength: expected one number per layer, shape \(3,\), got"):
        RangeRegularizer(Model(), strength=strength)


@pytest.mark.parametrize("strength", ["0.1", None, True, [0.1, "x", 0.2], 1j], ids=repr)
def test_a_strength_of_the_wrong_type(strength: Any) -> None:
    with pytest.raises(TypeError, match="strength: expected"):
        RangeRegularizer(Model(), strength=strength)


@pytest.mark.parametrize("returned", ["0.1", None, [0.1]], ids=repr)
def test_a_schedule_that_returns_no_number(returned: Any) -> None:
    model = with_gradients(Model())
    reg = RangeRegularizer(model, strength=lambda step: returned)
    before = gradients(model, reg)
    with pytest.raises(TypeError, match="strength"):
        reg.add_gradients_()
    assert gradients(model, reg) == before


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("selection", [3, [1, 2], [None]], ids=repr)
def test_a_selection_of_the_wrong_type(argument: str, selection: Any) -> None:
    with pytest.raises(TypeError, match=rf"{argument}: expected a predicate of \(name, parameter\) or name patterns"):
        RangeRegularizer(Model(), **{argument: selection})


def _freeze(model: Model) -> None:
    model.second.weight.requires_grad_(False)


def _sparse_gradient(model: Model) -> None:
    model.third.sparse = True
    model.third.weight.grad = None
    model.third(torch.tensor([1, 2])).sum().backward()


def _other_dtype(model: Model) -> None:
    model.second.weight.data = model.second.weight.data.double()


def _other_shape(model: Model) -> None:
    model.second.weight.data = torch.randn(9, 2)


def _other_layout(model: Model) -> None:
    model.second.weight = nn.Parameter(torch.randn(7, 6).to_sparse())


def _empty(model: Model) -> None:
    model.second.weight = nn.Parameter(torch.empty(0, 6))


def _integers(model: Model) -> None:
    model.second.weight = nn.Parameter(torch.ones(7, 6, dtype=torch.int64), requires_grad=False)


def _other_device(model: Model) -> None:
    model.second.weight = nn.Parameter(torch.ones(7, 6, device="meta"))


def _removed(model: Model) -> None:
    del model.second.weight


def _overlapping_gradient(model: Model) -> None:
    """One number in memory for all entries: an addition in place would add up in it."""
    model.second.weight.grad = torch.zeros(1, 1).expand(7, 6)


CHANGES: dict[str, tuple[Callable[[Model], None], tuple[type[Exception], ...], str]] = {
    "frozen": (_freeze, (ValueError,), r"'second.weight'.*requires a gradient"),
    "sparse gradient": (_sparse_gradient, (TypeError,), r"'third.weight'.*dense"),
    "gradient of another dtype": (_other_dtype, (TypeError,), r"'second.weight'.*torch.float64"),
    "gradient of another shape": (_other_shape, (ValueError,), r"'second.weight'.*\(9, 2\).*\(7, 6\)"),
    "sparse weight": (_other_layout, (TypeError,), r"'second.weight'.*dense"),
    "empty weight": (_empty, (ValueError,), r"'second.weight'.*at least one element"),
    "integer weight": (_integers, (TypeError,), r"'second.weight'.*torch.int64"),
    "weight on another device": (_other_device, (ValueError,), r"'second.weight'.*meta"),
    "removed weight": (_removed, (AttributeError, ValueError), "weight"),
    "overlapping gradient": (_overlapping_gradient, (ValueError,), r"'second.weight'.*overlap"),
}


@each_penalty
@pytest.mark.parametrize("change", CHANGES)
def test_errors_come_before_any_gradient_changes(backend: str, penalty: str, change: str) -> None:
    model = Model()
    reg = RangeRegularizer(model, penalty)
    with_gradients(model)
    if PARAMETERS[penalty] is not None:
        next(reg.parameters()).grad = torch.randn(3)
    make, errors, message = CHANGES[change]
    make(model)
    before = gradients(model, reg)
    with pytest.raises(errors, match=message):
        reg.add_gradients_()
    assert gradients(model, reg) == before


@each_parametric_penalty
@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(3, 1), torch.ones(4)], ids=lambda t: str(tuple(t.shape)))
def test_a_parameter_replaced_by_one_of_the_wrong_shape(penalty: str, wrong: Tensor) -> None:
    model = with_gradients(Model())
    reg = RangeRegularizer(model, penalty)
    setattr(reg, str(PARAMETERS[penalty]), nn.Parameter(wrong))
    before = gradients(model, reg)
    for use in (reg, reg.add_gradients_, reg.losses):
        with pytest.raises(ValueError, match=rf"{PARAMETERS[penalty]}: expected shape \(3,\)"):
            use()
    assert gradients(model, reg) == before


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(4), "2", torch.ones(3, 3)], ids=repr)
def test_a_scale_that_is_no_number(scale: Any) -> None:
    model = with_gradients(Model())
    reg = RangeRegularizer(model)
    before = gradients(model, reg)
    with pytest.raises((TypeError, ValueError), match="scale"):
        reg.add_gradients_(scale=scale)
    assert gradients(model, reg) == before


def test_a_weight_that_is_computed_cannot_take_a_gradient_in_place() -> None:
    """Its .grad is not what the optimizer sees."""
    computed = nn.Parameter(torch.randn(3, 3)) * 2
    reg = RangeRegularizer([("computed", computed)])
    with pytest.raises(ValueError, match=r"'computed'.*leaf"):
        reg.add_gradients_()


def test_the_good_model_is_good() -> None:
    """So that the tests above fail for their reasons alone."""
    model = with_gradients(Model())
    reg = RangeRegularizer(model)
    before = gradients(model)
    reg.add_gradients_()
    after = gradients(model)
    assert [one != other for one, other in zip(before, after, strict=True)] == [True, False, True, False, True]
