"""What every backend has to get right, against float64 autograd of the specification."""

from __future__ import annotations

import pytest
import torch
from conftest import IS_INTERPRETED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import PARAMETERS, PENALTIES, call, default_parameter, expected
from tensors import CHUNK_BORDERS, DTYPES, LAYOUTS, SIZES, leaves, randn, tied, with_offset
from tolerances import (
    TOLERANCES,
    assert_all,
    assert_gradient,
    assert_parameter_gradient,
    assert_values,
)
from torch import Tensor

from r2_kernels import ops
from r2_kernels.penalties import CHUNK_SIZE, by_name

each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def check(penalty: str, weights: list[Tensor], parameter: Tensor | None = None) -> None:
    """Values and all gradients of ``penalty``, every weight with an upstream gradient of its own."""
    if parameter is None:
        parameter = default_parameter(penalty, weights)
    if parameter is not None:
        parameter = parameter.to(weights[0].device).requires_grad_()
    weights = leaves(weights)
    coefficients = torch.rand(len(weights)).to(weights[0].device) + 0.5
    values = call(penalty, weights, parameter)
    values.backward(coefficients.to(values.dtype))
    assert_all(values, weights, parameter, expected(penalty, weights, parameter, coefficients), coefficients)


# Sizes and dtypes


@each_penalty
@each_dtype
def test_sizes(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    check(penalty, [randn(size, dtype=dtype, device=device) for size in SIZES])


@each_penalty
@each_dtype
def test_sizes_around_the_chunk(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    check(penalty, [randn(size, dtype=dtype, device=device) for size in CHUNK_BORDERS])


@each_penalty
@pytest.mark.parametrize("size", [1, 5, CHUNK_SIZE, CHUNK_SIZE + 1])
def test_a_single_weight(backend: str, device: torch.device, penalty: str, size: int) -> None:
    check(penalty, [randn(size, device=device)])


@pytest.mark.large
@each_penalty
@each_dtype
def test_a_large_weight(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    check(penalty, [randn(1_700_003, dtype=dtype, device=device), randn(11, dtype=dtype, device=device)])


@each_penalty
def test_mixed_dtypes(backend: str, device: torch.device, penalty: str) -> None:
    weights = [randn(100 + 31 * i, 3, dtype=DTYPES[i % 4], device=device) for i in range(9)]
    check(penalty, weights)
    check(penalty, [weight for weight in weights if weight.dtype is not torch.float64])


@each_penalty
def test_values_are_float64_only_where_a_weight_is(backend: str, device: torch.device, penalty: str) -> None:
    narrow = [randn(5, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    wide = [*narrow, randn(5, dtype=torch.float64, device=device)]
    assert call(penalty, narrow, default_parameter(penalty, narrow)).dtype is torch.float32
    assert call(penalty, wide, default_parameter(penalty, wide)).dtype is torch.float64


@each_penalty
def test_hundreds_of_weights(backend: str, device: torch.device, penalty: str) -> None:
    """More weights than a launch's table holds, of very different sizes."""
    count = 60 if IS_INTERPRETED else 450  # An interpreted kernel takes milliseconds a program.
    check(penalty, [randn(1 + (i * i * 37) % 701, device=device) for i in range(count)])


@pytest.mark.large
@each_penalty
def test_more_chunks_than_any_launch_holds(backend: str, device: torch.device, penalty: str) -> None:
    sizes = [3 * CHUNK_SIZE + 1, 7, CHUNK_SIZE] * 120
    check(penalty, [randn(size, dtype=torch.bfloat16, device=device) for size in sizes])


@pytest.mark.large
@each_penalty
def test_21000_scalars(backend: str, device: torch.device, penalty: str) -> None:
    """A model of scalars: every chunk is one element. One element has a closed form that needs no loop."""
    flat = randn(21_000, device=device)
    weights = leaves(flat.clone().unbind())
    parameter = None
    if PARAMETERS[penalty] is not None:
        parameter = randn(21_000, device=device).requires_grad_()
    values = call(penalty, weights, parameter)
    values.sum().backward()
    w = flat.cpu().double().requires_grad_()
    p = None if parameter is None else parameter.detach().cpu().double().requires_grad_()
    if penalty == "linf":
        formula = w.abs()
    elif penalty == "kurtosis":
        formula = 0 * w
    elif penalty == "margin":
        formula = p.abs() + torch.relu(w.abs() - p.abs())
    else:
        formula = torch.exp(-p) + 0 * w
    formula.sum().backward()
    assert_values(values.detach(), formula.detach(), weights)
    assert_gradient(torch.stack([weight.grad for weight in weights]), w.grad)
    if parameter is not None:
        assert_parameter_gradient(parameter.grad, p.grad)


# Layouts


@each_penalty
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, device: torch.device, penalty: str, dtype: torch.dtype, layout: str) -> None:
    weight = LAYOUTS[layout](dtype, device)
    check(penalty, [randn(10, dtype=dtype, device=device), weight, randn(20, dtype=dtype, device=device)])


@each_penalty
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_flow_through_views(backend: str, device: torch.device, penalty: str, layout: str) -> None:
    """A weight that is computed, here a view of a parameter, passes its gradient on to what it came from."""
    weight = LAYOUTS[layout](torch.float32, device)
    base = weight.detach().clone().requires_grad_()
    parameter = default_parameter(penalty, [weight])
    call(penalty, [base * 2.0], parameter).sum().backward()
    wanted = expected(penalty, [weight * 2.0], parameter).gradients[0]
    assert_gradient(base.grad, 2.0 * wanted, coefficient=2.0)


@each_penalty
@each_dtype
def test_misaligned_storage(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    sizes = [1, 7, 64, 129, 1000, 1021, CHUNK_SIZE + 1] + 9 * [300]
    weights = [
        with_offset(randn(size, dtype=dtype, device=device), offset) for offset, size in enumerate(sizes, start=1)
    ]
    check(penalty, weights)


def neighbours(size: int, offset: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tensor of ``size`` elements and the storage around it, which nobody may read into a result or write."""
    storage = torch.full((offset + size + 64,), 1000.0, dtype=dtype, device=device)
    return storage, storage[offset : offset + size]


@each_penalty
@each_dtype
def test_nothing_outside_a_tensor_is_read_or_written(
    backend: str, device: torch.device, penalty: str, dtype: torch.dtype
) -> None:
    weights, gradients, storages = [], [], []
    for offset, size in [(0, 1), (1, 5), (2, 16), (3, 31), (5, 257), (7, 1021), (0, CHUNK_SIZE + 3)]:
        storage, weight = neighbours(size, offset, dtype, device)
        weight.copy_(randn(size, dtype=dtype, device=device))
        weights.append(weight)
        storage, gradient = neighbours(size, offset + 2, dtype, device)
        gradient.zero_()
        gradients.append(gradient)
        storages.append((storage, offset + 2, size))
    parameter = default_parameter(penalty, weights)
    ones = torch.ones(len(weights), device=device)
    values, _ = ops.kernel("reduce_apply_", device)(penalty, weights, parameter, ones, gradients)
    wanted = expected(penalty, weights, parameter)
    assert_values(values, wanted.values, weights)
    for index, gradient in enumerate(gradients):
        assert_gradient(gradient, wanted.gradients[index], index=index)
    for storage, start, size in storages:
        assert bool((storage[:start] == 1000).all())
        assert bool((storage[start + size :] == 1000).all())


@each_penalty
@each_dtype
@pytest.mark.parametrize("operator", ["apply_", "reduce_apply_"])
def test_gradients_in_other_layouts_than_their_weights(
    backend: str, device: torch.device, penalty: str, dtype: torch.dtype, operator: str
) -> None:
    def filled(*shape: int) -> Tensor:
        return 0.1 * randn(*shape, dtype=dtype, device=device)

    channels_last = torch.channels_last
    pairs = [
        (randn(30, 40, dtype=dtype, device=device), filled(40, 30).t()),
        (randn(30, 40, dtype=dtype, device=device).t(), filled(40, 30)),
        (randn(6, 5, 3, 3, dtype=dtype, device=device), filled(6, 5, 3, 3).to(memory_format=channels_last)),
        (randn(6, 5, 3, 3, dtype=dtype, device=device).to(memory_format=channels_last), filled(6, 5, 3, 3)),
        (randn(30, 40, dtype=dtype, device=device), filled(30, 80)[:, ::2]),
        (randn(30, 80, dtype=dtype, device=device)[:, 1::2], filled(30, 40)),
        (randn(30, 80, dtype=dtype, device=device)[:, 1::2], filled(30, 80)[:, ::2]),
        (randn(5, dtype=dtype, device=device).expand(7, 5), filled(7, 5)),
        (randn(1, 9, dtype=dtype, device=device), filled(9, 1).t()),
        (randn(9, dtype=dtype, device=device), with_offset(filled(9), 1)),
        (randn(150, 130, dtype=dtype, device=device), filled(130, 150).t()),
    ]
    weights, gradients = map(list, zip(*pairs, strict=True))
    before = [gradient.clone() for gradient in gradients]
    strides = [gradient.stride() for gradient in gradients]
    parameter = default_parameter(penalty, weights)
    coefficients = torch.linspace(0.5, 1.5, len(weights), device=device)
    if operator == "apply_":
        _, _, statistics, partials = ops.kernel("reduce", device)(penalty, weights, parameter)
        ops.kernel("apply_", device)(penalty, weights, parameter, statistics, partials, coefficients, gradients)
    else:
        ops.kernel("reduce_apply_", device)(penalty, weights, parameter, coefficients, gradients)
    wanted = expected(penalty, weights, parameter, coefficients)
    for index, gradient in enumerate(gradients):
        assert gradient.stride() == strides[index]
        assert_gradient(gradient, wanted.gradients[index], before=before[index], index=index)


@each_penalty
def test_unequal_dense_strides_of_size_one_dimensions(backend: str, device: torch.device, penalty: str) -> None:
    weight = torch.as_strided(randn(12, device=device), (1, 12, 1), (77, 1, 5))
    check(penalty, [weight, weight.clone()])


# Values


@each_penalty
@each_dtype
def test_ties(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    weights = [tied(dtype, device, size) for size in (3, 50, CHUNK_SIZE, 2 * CHUNK_SIZE + 100)]
    check(penalty, weights)


@each_dtype
def test_margins_exactly_tied_with_weights(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """An entry that only reaches M does not exceed it: no excess, no gradient, not counted."""
    weights = [tied(dtype, device, size) for size in (30, 50, 60, CHUNK_SIZE + 30)]
    check("margin", weights, torch.tensor([1.5, -0.25, 2.0, -1.5]))


@each_penalty
@each_dtype
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -0.37])
def test_constant_weights(backend: str, device: torch.device, penalty: str, dtype: torch.dtype, value: float) -> None:
    weights = [torch.full((size,), value, dtype=dtype, device=device) for size in (1, 3, 100, CHUNK_SIZE + 1)]
    check(penalty, weights)


@each_dtype
def test_constant_weights_have_no_soft_range(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    weights = leaves(torch.full((size,), 0.3, dtype=dtype, device=device) for size in (1, 3, 100, CHUNK_SIZE + 1))
    temperature = torch.tensor([0.0, 3.0, -2.0, 1e4], device=device)
    values = call("soft_min_max", weights, temperature)
    values[:3].sum().backward()
    exact = torch.exp(-temperature.cpu().double())
    assert_values(values.detach(), exact, weights)
    for weight in weights:
        assert not weight.grad.any()


@each_penalty
def test_all_values_have_one_sign(backend: str, device: torch.device, penalty: str) -> None:
    check(penalty, [3 + randn(1000, device=device).abs(), -3 - randn(1000, device=device).abs()])


@each_penalty
def test_a_large_mean_does_not_cancel(backend: str, device: torch.device, penalty: str) -> None:
    """A narrow range far from zero: distances to the ends keep what moments about zero would lose."""
    check(penalty, [1000 + 0.01 * randn(3000, device=device), -1e6 + randn(CHUNK_SIZE + 5, device=device)])


@pytest.mark.parametrize("position", ["first", "middle", "last"])
@each_penalty
def test_one_outlier(backend: str, device: torch.device, penalty: str, position: str) -> None:
    weights = []
    for size in (5, 1000, CHUNK_SIZE + 17, 3 * CHUNK_SIZE):
        weight = 0.01 * randn(size, device=device)
        weight[{"first": 0, "middle": size // 2, "last": size - 1}[position]] = -7.25
        weights.append(weight)
    check(penalty, weights)


EXTREMES = {
    torch.float32: (1e38, 3e-39, 1e-44),
    torch.float64: (1e300, 1e-310, 5e-324),
    torch.bfloat16: (1e38, 3e-39, 1e-40),
    torch.float16: (3e4, 6e-6, 6e-8),
}


@each_penalty
@each_dtype
@pytest.mark.parametrize("which", [0, 1, 2], ids=["huge", "subnormal", "smallest"])
def test_extreme_magnitudes(backend: str, device: torch.device, penalty: str, dtype: torch.dtype, which: int) -> None:
    """Nothing overflows, and nothing is flushed to zero, on the way to a value that its dtype can hold."""
    if penalty == "soft_min_max" and dtype is torch.float64 and which == 0:
        pytest.skip("the square of a distance overflows float64, in the specification as anywhere")
    if penalty == "kurtosis" and dtype is torch.float64:
        pytest.skip("the square of a deviation over- or underflows float64 in the specification")
    scale = EXTREMES[dtype][which]
    weight = (scale * torch.linspace(-1, 1, 101, dtype=torch.float64)).to(dtype).to(device)
    weight = leaves([weight])[0]
    parameter = None
    if penalty == "margin":
        parameter = torch.tensor([0.75 * scale], device=device, dtype=torch.float64)
        parameter = parameter.to(torch.float64 if dtype is torch.float64 else torch.float32)
    elif penalty == "soft_min_max":
        parameter = torch.tensor([min(1 / scale, 1e30)], device=device, dtype=torch.float32)
        parameter.clamp_(min=1e-37)
    value = call(penalty, [weight], parameter)
    value.backward()
    wanted = expected(penalty, [weight], parameter)
    assert_values(value.detach(), wanted.values, [weight])
    assert_gradient(weight.grad, wanted.gradients[0], noise=wanted.noises[0])


def test_the_largest_finite_weights(backend: str, device: torch.device) -> None:
    """The range of one layer may exceed float32 while each end fits: the value is then infinite, never NaN."""
    largest = torch.finfo(torch.float32).max
    weight = leaves([torch.tensor([largest, -largest, 0.5 * largest, 0.0], device=device)])[0]
    value = call("soft_min_max", [weight, torch.ones(3, device=device)], torch.tensor([1.0, 1.0], device=device))
    assert value[0].item() == torch.inf
    assert value[1].item() == pytest.approx(torch.exp(torch.tensor(-1.0)).item())
    assert call("linf", [weight]).item() == largest
    assert call("margin", [weight], torch.tensor([largest], device=device)).item() == largest


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 0.5, 10.0])
@pytest.mark.parametrize("largest", [1e38, 6e37], ids=["range 2e38", "range 1.2e38"])
def test_squares_of_large_distances_do_not_make_nan(
    backend: str, device: torch.device, temperature: float, largest: float
) -> None:
    """exp(a·u) is 0 where u² overflows float32: their product is 0, not NaN."""
    weight = leaves([torch.tensor([largest, -largest, 1.0, 0.0, -3.0], device=device)])[0]
    parameter = torch.tensor([temperature], device=device, requires_grad=True)
    value = call("soft_min_max", [weight], parameter)
    value.backward()
    wanted = expected("soft_min_max", [weight], parameter)
    assert_values(value.detach(), wanted.values, [weight])
    assert_gradient(weight.grad, wanted.gradients[0])
    assert not parameter.grad.isnan().any()


@each_dtype
def test_float16_range_beyond_float16(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    weight = torch.tensor([60000.0, -60000.0, 1.0, 30000.0], dtype=dtype, device=device)
    check("soft_min_max", [weight], torch.tensor([0.001]))
    check("margin", [weight], torch.tensor([1.0]))


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e-6, 1e6, 1e15, 1e18, 1e20, 1e30, 1e36])
@pytest.mark.parametrize("span", [1e-6, 0.3, 3.0, 30.0, 300.0])
def test_soft_ranges_of_any_scale(backend: str, device: torch.device, scale: float, span: float) -> None:
    """The soft range scales with the weights where a·range stays; sums and squares of distances must not overflow."""
    levels = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    weight = (scale * (levels + 0.1 * levels**2)).float().to(device)
    temperature = torch.tensor([span / 2 / scale], dtype=torch.float64).float()
    if temperature < torch.finfo(torch.float32).tiny:
        pytest.skip("the temperature is no normal number")
    check("soft_min_max", [weight], temperature)


# NaN and infinity


@each_penalty
@each_dtype
def test_nan_in_every_position(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    """Every lane of a vector and every remainder: weight i has its NaN at position i, its neighbours none."""
    size = 67
    weights = []
    for position in range(size):
        weight = randn(size, dtype=dtype, device=device)
        weight[position] = torch.nan
        weights += [weight, randn(size, dtype=dtype, device=device)]
    parameter = default_parameter(penalty, weights)
    values = call(penalty, weights, parameter).cpu()
    assert values[0::2].isnan().all(), f"no NaN for a NaN at {(~values[0::2].isnan()).nonzero().flatten().tolist()}"
    clean = weights[1::2]
    clean_parameter = None if parameter is None else parameter[1::2]
    assert_values(values[1::2], expected(penalty, clean, clean_parameter).values, clean)


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nan_in_every_chunk(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    size = 3 * CHUNK_SIZE + 5
    positions = [0, 1, size - 1, size - 5, size - 6]
    positions += [border + shift for border in (CHUNK_SIZE, 2 * CHUNK_SIZE) for shift in (-1, 0, 1, 8, 100)]
    base = randn(size, dtype=dtype, device=device)
    weights = [base.clone() for _ in positions]
    for weight, position in zip(weights, positions, strict=True):
        weight[position] = torch.nan
    weights.append(base)
    parameter = default_parameter(penalty, [base])
    parameter = None if parameter is None else parameter.expand(len(weights)).clone()
    values = call(penalty, weights, parameter).cpu()
    assert values[:-1].isnan().all(), f"lost the NaN of {(~values[:-1].isnan()).nonzero().flatten().tolist()}"
    assert_values(values[-1:], expected(penalty, [base], None if parameter is None else parameter[:1]).values, [base])


@each_penalty
@each_dtype
def test_nan_leaves_the_other_gradients_right(
    backend: str, device: torch.device, penalty: str, dtype: torch.dtype
) -> None:
    weights = leaves(randn(size, dtype=dtype, device=device) for size in (33, 1000, 5, CHUNK_SIZE + 3, 100))
    with torch.no_grad():
        weights[1][-1] = torch.nan
        weights[3][CHUNK_SIZE + 1] = torch.nan
    right = [0, 2, 4]
    parameter = default_parameter(penalty, weights)
    values = call(penalty, weights, parameter)
    values.sum().backward()
    chosen = [weights[i] for i in right]
    wanted = expected(penalty, chosen, None if parameter is None else parameter[right])
    assert values.isnan().tolist() == [False, True, False, True, False]
    assert_values(values.detach()[right], wanted.values, chosen)
    for weight, gradient in zip(chosen, wanted.gradients, strict=True):
        assert_gradient(weight.grad, gradient)


@each_penalty
def test_only_nan(backend: str, device: torch.device, penalty: str) -> None:
    weights = [torch.full((size,), torch.nan, device=device) for size in (1, 8, 100)]
    assert call(penalty, weights, default_parameter(penalty, weights)).isnan().all()


@pytest.mark.parametrize("penalty", ["linf", "margin"])
@each_dtype
@pytest.mark.parametrize("infinities", [(torch.inf,), (-torch.inf,), (torch.inf, -torch.inf)], ids=str)
def test_infinite_weights(
    backend: str, device: torch.device, penalty: str, dtype: torch.dtype, infinities: tuple[float, ...]
) -> None:
    weights = [randn(size, dtype=dtype, device=device) for size in (3, 100, CHUNK_SIZE + 3)]
    for weight in weights[:2]:
        weight[-len(infinities) :] = torch.tensor(infinities, dtype=dtype)
    check(penalty, weights)


@pytest.mark.parametrize("temperature", [0.0, 1.0, -1.0])
@each_dtype
def test_infinite_weights_have_no_soft_range(
    backend: str, device: torch.device, temperature: float, dtype: torch.dtype
) -> None:
    """As in the specification: the softmax of an infinite entry is inf/inf."""
    weights = [randn(20, dtype=dtype, device=device) for _ in range(4)]
    weights[0][3] = torch.inf
    weights[1][19] = -torch.inf
    weights[2][0], weights[2][1] = torch.inf, -torch.inf
    values = call("soft_min_max", weights, torch.full((4,), temperature, device=device))
    assert values.isnan().tolist() == [True, True, True, False]


@each_penalty
def test_nan_parameters_stay_in_their_row(backend: str, device: torch.device, penalty: str) -> None:
    if PARAMETERS[penalty] is None:
        pytest.skip("no parameter")
    weights = [randn(100, device=device) for _ in range(3)]
    parameter = torch.tensor([0.5, torch.nan, 0.7], device=device)
    values = call(penalty, weights, parameter)
    assert values.isnan().tolist() == [False, True, False]


# Margins and temperatures


@each_dtype
def test_margins(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Zero, negative, tiny, larger than all weights."""
    margins = torch.tensor([0.0, -0.0, -0.5, 0.5, 1e-30, 100.0, -100.0, 1e-6])
    check("margin", [randn(500 + i, dtype=dtype, device=device) for i in range(len(margins))], margins)


def test_a_margin_of_zero_has_no_gradient_of_its_own(backend: str, device: torch.device) -> None:
    margin = torch.zeros(2, device=device, requires_grad=True)
    call("margin", [randn(10, device=device), randn(20, device=device)], margin).sum().backward()
    assert margin.grad.tolist() == [0.0, 0.0]


SPANS = (1e-6, 1e-4, 1e-2, 0.1, 0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0, 5.0, 20.0, 70.0, 79.0, 80.0, 81.0, 85.0, 90.0)
SPANS += (104.0, 160.0, 180.0, 500.0, 1e3, 1e4, 1e5, 1e6)


@each_dtype
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("scale", [1.0, 0.02, 300.0])
def test_temperatures_by_span(backend: str, device: torch.device, dtype: torch.dtype, sign: int, scale: float) -> None:
    """|a|·(max w - min w) from 1e-6 to 1e6: near zero, where exp(a·w) over- or underflows, and the borders between."""
    weights = [scale * randn(901, dtype=dtype, device=device) for _ in SPANS]
    extents = torch.stack([weight.cpu().double().max() - weight.cpu().double().min() for weight in weights])
    temperature = (sign * torch.tensor(SPANS, dtype=torch.float64) / extents).float()
    if sign < 0:  # exp(-a) stays finite
        temperature.clamp_(min=-80)
    check("soft_min_max", weights, temperature)


@each_dtype
@pytest.mark.parametrize("size", [2, 3, 100, CHUNK_SIZE + 100])
def test_temperatures_as_given(backend: str, device: torch.device, dtype: torch.dtype, size: int) -> None:
    temperature = torch.tensor([1e-4, 0.1, 1.0, -1e-4, -1.0, 10.0, 1e4, -20.0, 1e-12, -1e-12])
    check("soft_min_max", [randn(size, dtype=dtype, device=device) for _ in temperature], temperature)


@each_dtype
def test_a_temperature_of_zero(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """The value is 1 and no weight has a gradient; the temperature's own is twice the variance minus 1."""
    weights = leaves(randn(size, dtype=dtype, device=device) for size in (1, 2, 77, CHUNK_SIZE + 2))
    temperature = torch.zeros(4, device=device, requires_grad=True)
    values = call("soft_min_max", weights, temperature)
    values.sum().backward()
    assert values.tolist() == [1.0] * 4
    for weight in weights:
        assert not weight.grad.any()
    variances = torch.stack([weight.detach().cpu().double().var(correction=0) for weight in weights])
    assert_parameter_gradient(temperature.grad, 2 * variances - 1, 2 * variances + 1)


@pytest.mark.parametrize("temperature", [1e4, 1e8])
def test_a_high_temperature_gives_the_hard_range(backend: str, device: torch.device, temperature: float) -> None:
    weights = [torch.linspace(-1, 3, size, device=device)[torch.randperm(size)] for size in (2, 50, 1000)]
    values = call("soft_min_max", weights, torch.full((3,), temperature, device=device))
    torch.testing.assert_close(values.cpu(), torch.full((3,), 4.0), rtol=1e-6, atol=0)


def test_a_very_negative_temperature_overflows_to_infinity(backend: str, device: torch.device) -> None:
    weight, temperature = leaves([randn(100, device=device), torch.tensor([-1e4], device=device)])
    value = call("soft_min_max", [weight], temperature)
    value.backward()
    assert value.item() == torch.inf
    assert temperature.grad.item() == -torch.inf
    assert weight.grad.isfinite().all()


@each_penalty
@each_dtype
def test_parameters_of_every_dtype(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    """M and the temperature get their gradient in their own dtype."""
    if PARAMETERS[penalty] is None:
        pytest.skip("no parameter")
    weights = leaves([randn(50, device=device), randn(70, device=device)])
    parameter = torch.tensor([0.75, 1.25], dtype=dtype, device=device, requires_grad=True)
    values = call(penalty, weights, parameter)
    values.sum().backward()
    wanted = expected(penalty, weights, parameter)
    assert parameter.grad.dtype is dtype
    assert_values(values.detach(), wanted.values, weights)
    assert_gradient(weights[1].grad, wanted.gradients[1])
    tolerance = 1e-5 + TOLERANCES[dtype].storage
    torch.testing.assert_close(parameter.grad.cpu().double(), wanted.parameter_gradient, rtol=tolerance, atol=1e-5)


@each_penalty
def test_parameters_with_strides(backend: str, device: torch.device, penalty: str) -> None:
    if PARAMETERS[penalty] is None:
        pytest.skip("no parameter")
    weights = [randn(50, device=device), randn(70, device=device), randn(90, device=device)]
    check(penalty, weights, torch.tensor([0.5, 9.0, 0.75, 9.0, 1.0, 9.0])[::2])
    check(penalty, weights, torch.tensor([0.5]).expand(3))


# Shards: the statistics of parts merge into the whole's


def statistics_of_parts(penalty: str, parts: list[Tensor], parameter: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """A row per part, from one call, and each part's partials."""
    device = parts[0].device
    scalars = None if parameter is None else parameter.expand(len(parts)).contiguous()
    _, _, statistics, partials = ops.kernel("reduce", device)(penalty, parts, scalars)
    if not by_name(penalty).is_sparse:
        return statistics, [partials] * len(parts)
    return statistics, list(partials.split([(part.numel() + CHUNK_SIZE - 1) // CHUNK_SIZE for part in parts]))


SPLITS = {
    "first empty": (0, 1000),
    "middle empty": (300, 0, 700),
    "last empty": (1000, 0),
    "many empty": (0, 0, 1, 0, 0, 0, 998, 0, 1, 0),
    "one of many": (0,) * 40 + (1000,) + (0,) * 40,
    "none empty": (1, 2, 3, 994),
    "chunks": (0, CHUNK_SIZE, 0, 1, CHUNK_SIZE - 1, CHUNK_SIZE + 1, 0, 7),
}


@each_penalty
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
def test_shards(backend: str, device: torch.device, penalty: str, split: str, dtype: torch.dtype) -> None:
    """Shards, empty ones anywhere, give the whole's value, and with the merged statistics each its own gradient."""
    sizes = SPLITS[split]
    whole = randn(sum(sizes), dtype=dtype, device=device)
    parts = list(whole.split(sizes))
    parameter = default_parameter(penalty, [whole])
    statistics, partials = statistics_of_parts(penalty, parts, parameter)
    scalar = torch.zeros(1, dtype=torch.float64) if parameter is None else parameter.cpu().double()
    merged = by_name(penalty).merge(statistics.cpu()[:, None], scalar).to(device)
    values, slopes = ops.kernel("finalize", device)(penalty, merged, parameter, torch.float64)
    wanted = expected(penalty, [whole], parameter)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(values.cpu(), wanted.values, rtol=tolerance.value, atol=0)
    if parameter is not None:
        torch.testing.assert_close(slopes.cpu(), wanted.parameter_gradient, rtol=tolerance.gradient, atol=1e-9)
    coefficient = torch.ones(1, device=device)
    for part, part_partials, gradient in zip(parts, partials, wanted.gradients[0].split(sizes), strict=True):
        out = torch.zeros_like(part)
        arguments = (penalty, [part], parameter, merged, part_partials, coefficient)
        ops.kernel("apply_", device)(*arguments, [out])
        (fresh,) = ops.kernel("apply", device)(*arguments)
        torch.testing.assert_close(fresh, out, rtol=0, atol=0)
        largest = wanted.gradients[0].abs().max().item()
        allowed = tolerance.gradient * largest + tolerance.storage * gradient.abs() + tolerance.smallest + 1e-15
        assert bool(((out.cpu().double() - gradient).abs() <= allowed).all())


@each_penalty
@pytest.mark.parametrize("sizes", [(0,), (0, 0, 0), (0, 5), (5, 0), (3, 0, 4), (0, 0, 6, 0)], ids=str)
@pytest.mark.parametrize("operator", ["apply", "apply_", "reduce_apply_"])
def test_empty_weights_in_operators(
    backend: str, device: torch.device, penalty: str, sizes: tuple[int, ...], operator: str
) -> None:
    """An empty shard gets the statistics of nothing and an empty gradient, and its neighbours what is theirs."""
    weights = [randn(size, device=device) for size in sizes]
    parameter = None if PARAMETERS[penalty] is None else torch.full((len(sizes),), 0.4, device=device)
    values, slopes, statistics, partials = ops.kernel("reduce", device)(penalty, weights, parameter)
    ends = [-torch.inf, torch.inf]
    empty_row = {"soft_min_max": [*ends, *[0.0] * 6], "kurtosis": [*ends, *[0.0] * 5]}.get(penalty, [0.0, 0.0])
    empty_value = {"margin": 0.4, "soft_min_max": 0.6703200460356393}.get(penalty, 0.0)
    empty_slope = {"margin": 1.0, "soft_min_max": -0.6703200460356393}.get(penalty)
    coefficients = torch.ones(len(sizes), device=device)
    if operator == "apply":
        gradients = ops.kernel("apply", device)(penalty, weights, parameter, statistics, partials, coefficients)
    else:
        gradients = [torch.zeros_like(weight) for weight in weights]
        if operator == "apply_":
            ops.kernel("apply_", device)(penalty, weights, parameter, statistics, partials, coefficients, gradients)
        else:
            again = ops.kernel("reduce_apply_", device)(penalty, weights, parameter, coefficients, gradients)
            torch.testing.assert_close(again[0], values)
            torch.testing.assert_close(again[1], slopes)
    for index, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        assert gradients[index].shape == weight.shape
        if size == 0:
            assert statistics[index].tolist() == empty_row
            assert values[index].item() == pytest.approx(empty_value, rel=1e-6)
            if empty_slope is not None:
                assert slopes[index].item() == pytest.approx(empty_slope, rel=1e-6)
        else:
            one = expected(penalty, [weight], None if parameter is None else parameter[:1])
            assert_values(values[index : index + 1], one.values, [weight])
            assert_gradient(gradients[index], one.gradients[0])


@each_penalty
def test_multidimensional_empty_weights(backend: str, device: torch.device, penalty: str) -> None:
    weights = [torch.empty(0, 5, device=device), torch.empty(3, 0, 2, device=device), randn(2, 2, device=device)]
    parameter = None if PARAMETERS[penalty] is None else torch.ones(3, device=device)
    _, _, statistics, partials = ops.kernel("reduce", device)(penalty, weights, parameter)
    ones = torch.ones(3, device=device)
    gradients = ops.kernel("apply", device)(penalty, weights, parameter, statistics, partials, ones)
    assert [tuple(gradient.shape) for gradient in gradients] == [(0, 5), (3, 0, 2), (2, 2)]


# Operators: the statistics, in the order and units that all backends share


@each_penalty
@each_dtype
def test_statistics_are_those_of_the_reference(
    backend: str, device: torch.device, penalty: str, dtype: torch.dtype
) -> None:
    weights = [randn(size, dtype=dtype, device=device) for size in (1, 9, 1000, 2 * CHUNK_SIZE + 3)]
    parameter = default_parameter(penalty, weights)
    values, slopes, statistics, partials = ops.kernel("reduce", device)(penalty, weights, parameter)
    rule = by_name(penalty)
    scalars = torch.zeros(4, dtype=torch.float64) if parameter is None else parameter.cpu().double()
    rows = [rule.reduce(w.cpu().double(), scalar) for w, scalar in zip(weights, scalars, strict=True)]
    assert statistics.dtype is torch.float64
    assert statistics.shape == (4, len(rule.statistics))
    scale = torch.stack(rows).abs().clamp(min=1e-30)
    assert ((statistics.cpu() - torch.stack(rows)).abs() <= 1e-5 * scale + 1e-12).all()
    assert slopes.shape == ((0,) if rule.parameter is None else (4,))
    if rule.is_sparse:
        chunk_maxima = [chunk.abs().amax().double() for weight in weights for chunk in weight.cpu().split(CHUNK_SIZE)]
        assert partials.tolist() == torch.stack(chunk_maxima).tolist()
    again, slopes_again = ops.kernel("finalize", device)(penalty, statistics, parameter, values.dtype)
    torch.testing.assert_close(again, values, rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes_again, slopes, rtol=1e-5, atol=1e-6)


@each_penalty
@each_dtype
def test_adding_into_gradients(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    """``apply_`` and ``reduce_apply_`` add, with one rounding, coefficients of either sign and zero included."""
    weights = [randn(size, dtype=dtype, device=device) for size in (1, 33, 1000, CHUNK_SIZE + 9, 64)]
    before = [0.3 * randn(weight.numel(), dtype=dtype, device=device) for weight in weights]
    parameter = default_parameter(penalty, weights)
    coefficients = torch.tensor([0.5, -2.0, 1.0, 0.01, 0.0], device=device)
    wanted = expected(penalty, weights, parameter, coefficients)
    _, slopes, statistics, partials = ops.kernel("reduce", device)(penalty, weights, parameter)
    applied = [gradient.clone() for gradient in before]
    ops.kernel("apply_", device)(penalty, weights, parameter, statistics, partials, coefficients, applied)
    fused = [gradient.clone() for gradient in before]
    fused_values, fused_slopes = ops.kernel("reduce_apply_", device)(penalty, weights, parameter, coefficients, fused)
    assert_values(fused_values, wanted.values, weights)
    torch.testing.assert_close(fused_slopes, slopes, rtol=1e-6, atol=1e-7)
    for index in range(len(weights)):
        for gradients in (applied, fused):
            assert_gradient(gradients[index], wanted.gradients[index], before=before[index], index=index)
    assert torch.equal(applied[4], before[4])
    assert torch.equal(fused[4], before[4])


@each_penalty
def test_coefficients_may_be_expanded_or_float64(backend: str, device: torch.device, penalty: str) -> None:
    weights = [randn(20, device=device), randn(CHUNK_SIZE + 20, device=device)]
    parameter = default_parameter(penalty, weights)
    _, _, statistics, partials = ops.kernel("reduce", device)(penalty, weights, parameter)
    for coefficients in (
        torch.tensor(0.5, device=device).expand(2),
        torch.tensor([0.5, 9.0, 0.5], device=device)[::2],
        torch.tensor([0.5, 0.5], dtype=torch.float64, device=device),
    ):
        wanted = expected(penalty, weights, parameter, coefficients)
        fresh = ops.kernel("apply", device)(penalty, weights, parameter, statistics, partials, coefficients)
        added = [torch.zeros_like(weight) for weight in weights]
        ops.kernel("reduce_apply_", device)(penalty, weights, parameter, coefficients, added)
        for index in range(2):
            assert_gradient(fresh[index], wanted.gradients[index], index=index)
            assert_gradient(added[index], wanted.gradients[index], index=index)


# Reproducibility


def bits(tensor: Tensor) -> Tensor:
    """To compare bit by bit, NaN included."""
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(widths[tensor.element_size()])


@each_penalty
@each_dtype
def test_runs_are_bitwise_equal(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    weights = [randn(size, dtype=dtype, device=device) for size in (7, 3000, 2 * CHUNK_SIZE + 1)]
    parameter = default_parameter(penalty, weights)
    runs = []
    for _ in range(3):
        copies = leaves(weights)
        values = call(penalty, copies, parameter)
        values.sum().backward()
        runs.append([values, *(copy.grad for copy in copies)])
    for run in runs[1:]:
        assert all(torch.equal(bits(first), bits(other)) for first, other in zip(runs[0], run, strict=True))


@each_penalty
@each_dtype
def test_a_weight_does_not_depend_on_its_neighbours(
    backend: str, device: torch.device, penalty: str, dtype: torch.dtype
) -> None:
    """Values and gradients are bit by bit those of a call with this weight alone, wherever in the list it is."""
    weights = [randn(size, dtype=dtype, device=device) for size in (5, 1000, CHUNK_SIZE + 77, 3, 500)]
    parameter = default_parameter(penalty, weights)
    together = leaves(weights)
    values = call(penalty, together, parameter)
    values.sum().backward()
    for index, weight in enumerate(weights):
        (alone,) = leaves([weight])
        value = call(penalty, [alone], None if parameter is None else parameter[index : index + 1])
        value.backward()
        assert torch.equal(bits(value[0]), bits(values[index]))
        assert torch.equal(bits(alone.grad), bits(together[index].grad))


# Arbitrary lists


@st.composite
def lists_of_weights(draw: st.DrawFn) -> list[Tensor]:
    """Lists of weights of any dtypes and sizes, from arbitrary finite values, with many ties."""
    weights = []
    for _ in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from(DTYPES))
        element = st.one_of(st.integers(-3, 3).map(float), st.floats(-100, 100, width=16))
        values = draw(st.lists(element, min_size=1, max_size=40))
        repeats = draw(st.sampled_from([1, 1, 2, 17]))
        weights.append(torch.tensor(values * repeats, dtype=torch.float64).to(dtype))
    return weights


@each_penalty
@settings(
    max_examples=15 if IS_INTERPRETED else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_arbitrary_lists(backend: str, device: torch.device, penalty: str, data: st.DataObject) -> None:
    weights = [weight.to(device) for weight in data.draw(lists_of_weights())]
    scalar = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 2.0]), st.floats(-20, 20, width=32))
    scalars = data.draw(st.lists(scalar, min_size=len(weights), max_size=len(weights)))
    check(penalty, weights, None if PARAMETERS[penalty] is None else torch.tensor(scalars))
