"""The operators: torch's own check of schema, fake kernels and registration, and what malformed calls get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import PARAMETERS, PENALTIES, default_parameter, expected
from tensors import randn
from tolerances import assert_gradient
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from r2_kernels import ops
from r2_kernels.penalties import CHUNK_SIZE, by_name

BACKEND = "cpu"

pytestmark = pytest.mark.usefixtures("cpu_backend")
each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
operators = torch.ops.r2_kernels

MUTATING = ("apply_", "reduce_apply_")


def lists() -> dict[str, list[Tensor]]:
    return {
        "one": [randn(5)],
        "several": [randn(3, 4), randn(CHUNK_SIZE + 1), randn(2, 3, 4)],
        "mixed": [randn(7, dtype=torch.bfloat16), randn(7, dtype=torch.float64), randn(7, dtype=torch.float16)],
        "layouts": [randn(4, 5).t(), randn(9)[::2], randn(2, 3, 2, 2).to(memory_format=torch.channels_last)],
        "empty": [randn(0), randn(4), randn(3, 0)],
    }


def arguments(operator: str, penalty: str, weights: list[Tensor]) -> dict[str, Any]:
    """Well-formed arguments of the operator, by name."""
    count = len(weights)
    parameter = None if PARAMETERS[penalty] is None else torch.linspace(0.3, 0.6, count)
    values, _, statistics, partials = operators.reduce(penalty, weights, parameter)
    coefficients = torch.linspace(0.5, 1.5, count)
    gradients = [torch.zeros_like(weight) for weight in weights]
    shared = {"penalty": penalty, "weights": weights, "parameter": parameter}
    return {
        "reduce": shared,
        "finalize": {"penalty": penalty, "statistics": statistics, "parameter": parameter, "dtype": values.dtype},
        "apply": shared | {"statistics": statistics, "partials": partials, "coefficients": coefficients},
        "apply_": shared
        | {"statistics": statistics, "partials": partials, "coefficients": coefficients, "gradients": gradients},
        "reduce_apply_": shared | {"coefficients": coefficients, "gradients": gradients},
    }[operator]


def invoke(operator: str, named: dict[str, Any]) -> Any:
    return getattr(operators, operator)(*named.values())


@each_penalty
@pytest.mark.parametrize("case", list(lists()))
@pytest.mark.parametrize("operator", list(ops.SCHEMAS))
def test_opcheck(operator: str, penalty: str, case: str) -> None:
    named = arguments(operator, penalty, lists()[case])
    torch.library.opcheck(getattr(operators, operator).default, tuple(named.values()))


@each_penalty
@pytest.mark.parametrize("case", list(lists()))
@pytest.mark.parametrize("operator", list(ops.SCHEMAS))
def test_fake_kernels_know_shapes_dtypes_and_strides(operator: str, penalty: str, case: str) -> None:
    named = arguments(operator, penalty, lists()[case])
    real = invoke(operator, named)

    def faked(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return mode.from_tensor(argument)
        return [mode.from_tensor(tensor) for tensor in argument] if isinstance(argument, list) else argument

    with FakeTensorMode() as mode:
        fake = invoke(operator, {name: faked(argument) for name, argument in named.items()})
    if operator == "apply_":
        assert real is None
        assert fake is None
        return
    assert len(fake) == len(real)
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        assert one.stride() == other.stride() or other.numel() == 0


@each_penalty
def test_results_do_not_alias(penalty: str) -> None:
    weights = [randn(50), randn(60)]
    parameter = default_parameter(penalty, weights)
    reduced = operators.reduce(penalty, weights, parameter)
    fresh = operators.apply(penalty, weights, parameter, *reduced[2:], torch.ones(2))
    tensors = [tensor for tensor in [*reduced, *fresh, *weights] if tensor.numel()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


@each_penalty
def test_arguments_are_not_changed(penalty: str) -> None:
    weights = [randn(50), randn(CHUNK_SIZE + 3)]
    for operator in ops.SCHEMAS:
        named = arguments(operator, penalty, weights)
        before = {
            name: value.clone() if isinstance(value, Tensor) else [tensor.clone() for tensor in value]
            for name, value in named.items()
            if isinstance(value, (Tensor, list)) and name != "gradients"
        }
        invoke(operator, named)
        for name, copy in before.items():
            torch.testing.assert_close(named[name], copy, rtol=0, atol=0)


def test_parameters_may_be_float64() -> None:
    weights = [randn(30), randn(40)]
    for penalty in ("margin", "soft_min_max"):
        parameter = default_parameter(penalty, weights)
        narrow = operators.reduce(penalty, weights, parameter)
        wide = operators.reduce(penalty, weights, parameter.double())
        for one, other in zip(narrow, wide, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# Malformed calls: an error, never a read or write out of bounds

BAD: dict[str, dict[str, Callable[[Any], Any]]] = {
    "weights": {
        "none": lambda weights: [],
        "integer": lambda weights: [weights[0], weights[1].long(), weights[2]],
        "complex": lambda weights: [weights[0], weights[1].to(torch.complex64), weights[2]],
        "bool": lambda weights: [weights[0], weights[1].bool(), weights[2]],
        "float8": lambda weights: [weights[0], weights[1].to(torch.float8_e4m3fn), weights[2]],
        "sparse": lambda weights: [weights[0], weights[1].to_sparse(), weights[2]],
    },
    "parameter": {
        "missing": lambda parameter: None,
        "too short": lambda parameter: parameter[:2],
        "too long": lambda parameter: torch.ones(4),
        "scalar": lambda parameter: torch.tensor(1.0),
        "matrix": lambda parameter: torch.ones(3, 1),
        "integer": lambda parameter: torch.ones(3, dtype=torch.int64),
        "half": lambda parameter: parameter.half(),
        "empty": lambda parameter: torch.ones(0),
    },
    "statistics": {
        "too few rows": lambda statistics: statistics[:2],
        "too many rows": lambda statistics: torch.cat([statistics, statistics]),
        "too few columns": lambda statistics: statistics[:, :1],
        "too many columns": lambda statistics: torch.cat([statistics, statistics], 1),
        "flat": lambda statistics: statistics.flatten(),
        "float32": lambda statistics: statistics.float(),
    },
    "partials": {
        "too short": lambda partials: partials[:-1],
        "too long": lambda partials: torch.cat([partials, partials]),
        "none": lambda partials: partials[:0],
        "float32": lambda partials: partials.float(),
    },
    "coefficients": {
        "too short": lambda coefficients: coefficients[:2],
        "too long": lambda coefficients: torch.ones(4),
        "scalar": lambda coefficients: torch.tensor(1.0),
        "matrix": lambda coefficients: torch.ones(3, 3),
        "integer": lambda coefficients: torch.ones(3, dtype=torch.int32),
        "half": lambda coefficients: coefficients.half(),
        "empty": lambda coefficients: torch.ones(0),
    },
    "gradients": {
        "too few": lambda gradients: gradients[:2],
        "too many": lambda gradients: [*gradients, torch.zeros(3)],
        "none": lambda gradients: [],
        "another shape": lambda gradients: [gradients[0], torch.zeros(5, 4), gradients[2]],
        "too small": lambda gradients: [gradients[0], torch.zeros(2), gradients[2]],
        "a view too small": lambda gradients: [gradients[0], torch.zeros(1, 1), gradients[2]],
        "another dtype": lambda gradients: [gradients[0].double(), gradients[1].double(), gradients[2].double()],
        "half for float32": lambda gradients: [gradients[0], gradients[1].half(), gradients[2]],
        "integer": lambda gradients: [gradients[0], gradients[1].long(), gradients[2]],
        "expanded": lambda gradients: [gradients[0], torch.zeros(1, 1).expand_as(gradients[1]), gradients[2]],
    },
}
WITH_ARGUMENT = {
    "weights": ("reduce", "apply", "apply_", "reduce_apply_"),
    "parameter": tuple(ops.SCHEMAS),
    "statistics": ("apply", "apply_"),
    "partials": ("apply", "apply_"),
    "coefficients": ("apply", "apply_", "reduce_apply_"),
    "gradients": MUTATING,
}
MALFORMED = [
    (operator, argument, bad)
    for argument, cases in BAD.items()
    for bad in cases
    for operator in WITH_ARGUMENT[argument]
]


@each_penalty
@pytest.mark.parametrize(("operator", "argument", "bad"), MALFORMED)
def test_malformed_calls_raise(penalty: str, operator: str, argument: str, bad: str) -> None:
    rule = by_name(penalty)
    if argument == "parameter" and rule.parameter is None:
        pytest.skip("no parameter")
    if argument == "partials" and not rule.is_sparse and bad in ("too short", "too long", "none"):
        pytest.skip("no partials")
    weights = [randn(300), randn(4, 5), randn(40_000)]
    named = arguments(operator, penalty, weights)
    named[argument] = BAD[argument][bad](named[argument])
    written = [gradient.clone() for gradient in named.get("gradients", [])]
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)) as error:
        invoke(operator, named)
    assert str(error.value)
    kept = [gradient for gradient in named.get("gradients", []) if gradient.device.type == "cpu"]
    assert all(torch.equal(before, after) for before, after in zip(written, kept, strict=True)), (
        "written before the error"
    )


@pytest.mark.parametrize("operator", list(ops.SCHEMAS))
@pytest.mark.parametrize("name", ["l2", "", "linf ", "soft_min_ma", "margin" * 100])
def test_unknown_penalties(operator: str, name: str) -> None:
    named = arguments(operator, "linf", [randn(5), randn(6)])
    named["penalty"] = name
    with pytest.raises((RuntimeError, ValueError), match="penalty"):
        invoke(operator, named)


@pytest.mark.parametrize("columns", [0, 1, 3, 9])
@each_penalty
def test_finalize_of_malformed_statistics(penalty: str, columns: int) -> None:
    parameter = None if PARAMETERS[penalty] is None else torch.ones(2)
    for statistics in (torch.ones(2, columns, dtype=torch.float64), torch.ones(columns, dtype=torch.float64)):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            operators.finalize(penalty, statistics, parameter, torch.float32)


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finalize_in_either_dtype(penalty: str, dtype: torch.dtype) -> None:
    weights = [randn(30), randn(40), randn(0)]
    parameter = None if PARAMETERS[penalty] is None else torch.tensor([0.3, 0.4, 0.5])
    _, _, statistics, _ = operators.reduce(penalty, weights, parameter)
    values, slopes = operators.finalize(penalty, statistics, parameter, dtype)
    assert (values.dtype, slopes.dtype) == (dtype, dtype)
    wanted = expected(penalty, weights[:2], None if parameter is None else parameter[:2])
    torch.testing.assert_close(values[:2].double(), wanted.values, rtol=1e-6, atol=0)


@each_penalty
def test_statistics_with_strides(penalty: str) -> None:
    """A caller that merged them may hold them transposed."""
    weights = [randn(30), randn(40)]
    parameter = default_parameter(penalty, weights)
    _, _, statistics, partials = operators.reduce(penalty, weights, parameter)
    transposed = statistics.t().contiguous().t()
    gradients = operators.apply(penalty, weights, parameter, transposed, partials, torch.ones(2))
    wanted = expected(penalty, weights, parameter)
    for index in range(2):
        assert_gradient(gradients[index], wanted.gradients[index], index=index)


@each_penalty
def test_partials_with_strides(penalty: str) -> None:
    weights = [randn(3 * CHUNK_SIZE), randn(40)]
    parameter = default_parameter(penalty, weights)
    _, _, statistics, partials = operators.reduce(penalty, weights, parameter)
    strided = torch.stack([partials, -partials], 1)[:, 0]
    gradients = operators.apply(penalty, weights, parameter, statistics, strided, torch.ones(2))
    wanted = expected(penalty, weights, parameter)
    for index in range(2):
        assert_gradient(gradients[index], wanted.gradients[index], index=index)


@each_penalty
def test_conjugate_and_negated_views_are_read_as_what_they_show(penalty: str) -> None:
    """The imaginary part of a conjugate is a float tensor with a lazy minus sign."""
    weight = torch.complex(randn(20), randn(20)).conj().imag
    assert weight.is_neg()
    parameter = default_parameter(penalty, [weight])
    values = operators.reduce(penalty, [weight], parameter)[0]
    wanted = expected(penalty, [weight.resolve_neg()], parameter)
    torch.testing.assert_close(values.double(), wanted.values, rtol=1e-6, atol=0)
    gradients = [torch.zeros(20)]
    operators.reduce_apply_(penalty, [weight], parameter, torch.ones(1), gradients)
    assert_gradient(gradients[0], wanted.gradients[0])


def test_gradients_that_overlap_their_weights() -> None:
    """Reading and writing the same memory has no meaning in a fused pass; it must at least not crash."""
    weight = randn(1000)
    before = weight.clone()
    try:
        operators.reduce_apply_("linf", [weight], None, torch.ones(1), [weight])
    except RuntimeError:
        assert torch.equal(weight, before)
