"""The specification against finite differences, and the closed forms in ``penalties.py`` against the specification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import PENALTIES, call_reference, default_parameter, expected
from torch import Tensor

from r2_kernels import reference
from r2_kernels.penalties import CHUNK_SIZE, by_name
from r2_kernels.penalties import PENALTIES as RULES

BACKEND = "reference"

each_penalty = pytest.mark.parametrize("penalty", PENALTIES)


def doubles(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


# The specification itself, by hand


def test_linf_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0], [2.0, 0.0]], requires_grad=True)
    value = reference.linf([weight])
    value.backward()
    assert value.tolist() == [3.0]
    assert weight.grad.tolist() == [[0.0, -1.0], [0.0, 0.0]]


def test_tied_linf_by_hand() -> None:
    weight = torch.tensor([3.0, -3.0, 2.0, 3.0, -3.0], requires_grad=True)
    reference.linf([weight]).backward()
    assert weight.grad.tolist() == [0.25, -0.25, 0.0, 0.25, -0.25]


def test_margin_by_hand() -> None:
    weight = torch.tensor([1.0, -3.0, 2.0, 0.5, -1.5], requires_grad=True)
    margin = torch.tensor([-1.5], requires_grad=True)
    value = reference.margin([weight], margin)
    value.backward()
    assert value.tolist() == [1.5 + 1.5 + 0.5]
    assert weight.grad.tolist() == [0.0, -1.0, 1.0, 0.0, 0.0]
    assert margin.grad.tolist() == [-1.0 * (1 - 2)]


def test_kurtosis_by_hand() -> None:
    # Of -1, -1, 1, 1 all moments are one; of 0, 0, 0, 4 the variance is 3, the fourth moment 21.
    values = reference.kurtosis([torch.tensor([-1.0, -1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 4.0])])
    torch.testing.assert_close(values, torch.tensor([(1 - 1.8) ** 2, (21 / 9 - 1.8) ** 2]))
    assert reference.kurtosis([torch.rand(200_000)]).item() < 1e-3
    constant = torch.full((3, 5), 0.1, requires_grad=True)
    value = reference.kurtosis([constant])
    value.backward()
    assert value.item() == 0
    assert not constant.grad.any()


def test_soft_min_max_by_hand() -> None:
    """Two values, 0 and 1: p = (1/(1 + e^a), e^a/(1 + e^a)), and q is its mirror image."""
    a = 1.7
    weight = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([a], dtype=torch.float64, requires_grad=True)
    value = reference.soft_min_max([weight], temperature)
    value.backward()
    top = math.exp(a) / (1 + math.exp(a))
    variance = top * (1 - top)
    assert value.item() == pytest.approx(top - (1 - top) + math.exp(-a), rel=1e-14)
    assert temperature.grad.item() == pytest.approx(2 * variance - math.exp(-a), rel=1e-13)
    slope = top * (1 + a * (1 - top)) - (1 - top) * (1 - a * (1 - (1 - top)))
    assert weight.grad.tolist() == pytest.approx([-slope, slope], rel=1e-13)


def test_soft_min_max_tends_to_the_hard_range() -> None:
    weight = torch.tensor([-1.0, 0.3, 2.5], dtype=torch.float64)
    assert reference.soft_min_max([weight], torch.tensor([500.0])).item() == pytest.approx(3.5, rel=1e-14)


def test_one_value_per_weight_in_the_wider_dtype() -> None:
    weights = [torch.ones(2, 3), torch.full((4,), 2.0, dtype=torch.bfloat16)]
    assert reference.linf(weights).tolist() == [1.0, 2.0]
    assert reference.linf(weights).dtype is torch.float32
    assert reference.linf([*weights, torch.ones(1, dtype=torch.float64)]).dtype is torch.float64


@each_penalty
def test_gradcheck(penalty: str) -> None:
    weights = [weight.requires_grad_() for weight in doubles(1, 6, 9)]
    parameter = default_parameter(penalty, weights)
    if parameter is None:
        assert torch.autograd.gradcheck(lambda *ws: call_reference(penalty, ws), weights)
        return
    parameter = parameter.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, *ws: call_reference(penalty, ws, p), (parameter, *weights))


# The closed forms


@each_penalty
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0, 1e-3, 30.0])
@pytest.mark.parametrize("size", [1, 2, 37, 1000])
def test_closed_forms_equal_autograd(penalty: str, scale: float, size: int) -> None:
    rule = by_name(penalty)
    weight = doubles(size)[0]
    scalar = scale * torch.tensor([0.8], dtype=torch.float64)
    row = rule.reduce(weight, scalar[0])
    assert row.shape == (len(rule.statistics),)
    values, slopes = rule.finalize(row[None], scalar)
    wanted = expected(penalty, [weight], None if rule.parameter is None else scalar)
    torch.testing.assert_close(values, wanted.values, rtol=1e-13, atol=1e-13)
    gradient = rule.gradient(weight, row, scalar[0])
    torch.testing.assert_close(gradient, wanted.gradients[0], rtol=1e-11, atol=1e-13)
    if rule.parameter is None:
        assert slopes.shape == (0,)
    else:
        torch.testing.assert_close(slopes, wanted.parameter_gradient, rtol=1e-12, atol=1e-12)


@each_penalty
def test_closed_forms_of_ties(penalty: str) -> None:
    rule = by_name(penalty)
    weight = torch.tensor([1.0, -2.0, 2.0, 0.0, 0.5, -0.5, 2.0, -2.0, -2.0], dtype=torch.float64)
    for number in (0.5, -0.5, 2.0, 0.0):
        scalar = torch.tensor([number], dtype=torch.float64)
        row = rule.reduce(weight, scalar[0])
        wanted = expected(penalty, [weight], None if rule.parameter is None else scalar)
        values, slopes = rule.finalize(row[None], scalar)
        torch.testing.assert_close(values, wanted.values)
        if rule.parameter is not None:
            torch.testing.assert_close(slopes, wanted.parameter_gradient)
        torch.testing.assert_close(rule.gradient(weight, row, scalar[0]), wanted.gradients[0])


@each_penalty
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_parts_merge_into_the_whole(penalty: str, data: st.DataObject) -> None:
    """Any split into any number of parts, empty ones included, in one merge or pair by pair."""
    rule = by_name(penalty)
    integers = st.integers(-4, 4).map(float)
    entries = data.draw(st.lists(st.one_of(integers, st.floats(-10, 10)), min_size=1, max_size=30))
    weight = torch.tensor(entries, dtype=torch.float64)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(entries)), max_size=8)))
    scalar = torch.tensor([data.draw(st.floats(-5, 5))], dtype=torch.float64)
    parts = weight.tensor_split(cuts)
    rows = torch.stack([rule.reduce(part, scalar[0])[None] for part in parts])
    whole = rule.reduce(weight, scalar[0])[None]
    at_once = rule.merge(rows, scalar)
    torch.testing.assert_close(at_once, whole, rtol=1e-12, atol=1e-11)
    one_by_one = rows[0]
    for row in rows[1:]:
        one_by_one = rule.merge(torch.stack([one_by_one, row]), scalar)
    torch.testing.assert_close(one_by_one, whole, rtol=1e-12, atol=1e-11)


@each_penalty
def test_many_segments_merge_at_once(penalty: str) -> None:
    rule = by_name(penalty)
    halves = [doubles(3, 5, 1), doubles(4, 2, 7)]
    scalars = torch.tensor([0.3, -0.7, 2.0], dtype=torch.float64)
    pairs = [[rule.reduce(part, scalar) for part, scalar in zip(half, scalars, strict=True)] for half in halves]
    merged = rule.merge(torch.stack([torch.stack(rows) for rows in pairs]), scalars)
    for index, scalar in enumerate(scalars):
        whole = rule.reduce(torch.cat([halves[0][index], halves[1][index]]), scalar)
        torch.testing.assert_close(merged[index], whole, rtol=1e-12, atol=1e-12)


@each_penalty
def test_only_empty_parts(penalty: str) -> None:
    rule = by_name(penalty)
    scalar = torch.tensor([0.4], dtype=torch.float64)
    nothing = rule.reduce(torch.empty(0, dtype=torch.float64), scalar[0])
    merged = rule.merge(torch.stack([nothing, nothing, nothing])[:, None], scalar)
    assert merged[0].tolist() == nothing.tolist()
    value = {"margin": 0.4, "soft_min_max": math.exp(-0.4)}.get(penalty, 0.0)
    assert rule.finalize(merged, scalar)[0].item() == pytest.approx(value)


@each_penalty
@pytest.mark.parametrize("position", range(3))
def test_nan_survives_the_merge(penalty: str, position: int) -> None:
    rule = by_name(penalty)
    scalar = torch.tensor([0.4], dtype=torch.float64)
    parts = [*doubles(3, 4, 5), torch.empty(0, dtype=torch.float64)]
    parts[position][-1] = math.nan
    merged = rule.merge(torch.stack([rule.reduce(part, scalar[0])[None] for part in parts]), scalar)
    assert rule.finalize(merged, scalar)[0].isnan().all()


def test_the_rules_cover_the_public_penalties() -> None:
    assert tuple(RULES) == PENALTIES
    for name, rule in RULES.items():
        assert rule.name == name
        assert len(set(rule.statistics)) == len(rule.statistics)
    assert CHUNK_SIZE % 64 == 0


@pytest.mark.parametrize("name", ["l2", "", "LINF", None, ["linf"]])
def test_an_unknown_penalty(name: object) -> None:
    with pytest.raises(ValueError, match=r"penalty: expected one of 'linf', 'margin', 'soft_min_max', 'kurtosis', got"):
        by_name(name)
