"""RangeRegularizer: what it watches, its two ways to the same gradients, its state, and models that change under it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from oracle import PARAMETERS, PENALTIES, expected
from tensors import randn
from tolerances import assert_gradient, assert_parameter_gradient, assert_values
from torch import Tensor, nn

from r2_kernels import RangeRegularizer
from r2_kernels.penalties import RANGE_PENALTIES
from r2_kernels.report import Report

each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
each_parametric_penalty = pytest.mark.parametrize("penalty", [name for name in PENALTIES if PARAMETERS[name]])


class Model(nn.Module):
    """Weights of one to four dimensions, biases, a norm, a frozen weight, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6, bias=False))
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


WATCHED = ["embedding.weight", "convolution.weight", "hidden.0.weight", "hidden.2.weight"]


@pytest.fixture
def model(device: torch.device) -> Model:
    return Model().to(device)


def weights_of(model: Model) -> list[Tensor]:
    return [model.get_parameter(name) for name in WATCHED]


def parameter_of(reg: RangeRegularizer) -> nn.Parameter | None:
    return next(iter(reg.parameters()), None)


def assert_right(reg: RangeRegularizer, weights: list[Tensor], strength: float | list[float] = 0.01) -> None:
    """add_gradients_() against the specification, from no gradients."""
    parameter = parameter_of(reg)
    for tensor in [*weights, *reg.parameters()]:
        tensor.grad = None
    coefficients = torch.tensor(strength, dtype=torch.float64).expand(len(weights))
    wanted = expected(reg.penalty, weights, parameter, coefficients)
    loss = reg.add_gradients_()
    total = (wanted.values * coefficients).sum()
    torch.testing.assert_close(loss.cpu().double(), total, rtol=2e-6, atol=0)
    for index, (weight, gradient) in enumerate(zip(weights, wanted.gradients, strict=True)):
        assert weight.grad.dtype is weight.dtype
        assert_gradient(weight.grad, gradient, index=index)
    if parameter is not None:
        assert parameter.grad.dtype is parameter.dtype
        assert_parameter_gradient(parameter.grad.float(), wanted.parameter_gradient, wanted.parameter_scales)


# Which weights


def test_the_default_selection() -> None:
    """Two or more dimensions, requiring a gradient, a tied weight once, under its first name."""
    assert RangeRegularizer(Model()).names == WATCHED


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ("hidden.*", None, ["hidden.0.weight", "hidden.0.bias", "hidden.2.weight"]),
        ("*.weight", "norm.*", [*WATCHED, "frozen.weight"]),
        (["hidden.?.weight", "conv*"], "*.bias", ["convolution.weight", "hidden.0.weight", "hidden.2.weight"]),
        (None, ["embedding.*", "hidden.2.*"], ["convolution.weight", "hidden.0.weight"]),
        (None, "*embedding*", WATCHED[1:]),
        (lambda name, parameter: parameter.ndim == 4, None, ["convolution.weight"]),
        (None, lambda name, parameter: parameter.ndim == 4, [name for name in WATCHED if "conv" not in name]),
        (lambda name, parameter: name.startswith("norm"), "*.bias", ["norm.weight"]),
    ],
)
def test_selections(include: Any, exclude: Any, names: list[str]) -> None:
    found = RangeRegularizer(Model(), include=include, exclude=exclude).names
    order = [name for name, _ in Model().named_parameters()]
    assert sorted(found, key=order.index) == found
    if include == "*.weight":
        names = sorted(names, key=order.index)
    assert found == names


def test_predicates_see_name_and_parameter() -> None:
    model = Model()
    seen = []

    def predicate(name: str, parameter: Tensor) -> bool:
        seen.append((name, parameter))
        return True

    RangeRegularizer(model, include=predicate)
    assert [name for name, _ in seen] == [name for name, _ in model.named_parameters()]
    assert all(parameter is model.get_parameter(name) for name, parameter in seen)


@each_penalty
def test_named_parameters_instead_of_a_model(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model.named_parameters(), penalty)
    assert reg.names == WATCHED
    assert_right(reg, weights_of(model))


def test_a_weight_tied_in_the_list() -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    assert RangeRegularizer([("a", weight), ("b", nn.Parameter(torch.randn(2, 2))), ("c", weight)]).names == ["a", "b"]


@each_penalty
def test_a_tied_weight_counts_once(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty, include="*embedding*")
    again = RangeRegularizer([("weight", model.embedding.weight)], penalty)
    torch.testing.assert_close(reg(), again())
    reg.add_gradients_()
    once = model.head.weight.grad.clone()
    model.zero_grad()
    again.add_gradients_()
    assert torch.equal(once, model.embedding.weight.grad)


def test_the_model_is_not_a_part_of_the_regularizer() -> None:
    """Its parameters would be optimized, moved and saved twice."""
    for penalty in PENALTIES:
        reg = RangeRegularizer(Model(), penalty)
        name = PARAMETERS[penalty]
        assert [name for name, _ in reg.named_parameters()] == ([] if name is None else [name])
        assert list(reg.children()) == []
        tensors = {key for key, entry in reg.state_dict().items() if isinstance(entry, Tensor)}
        assert tensors == (set() if name is None else {name})


def test_parametrized_weights() -> None:
    """The parameter behind a parametrization is what is trained, and regularized."""
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    reg = RangeRegularizer(layer, "linf")
    assert reg.names == [name for name, p in layer.named_parameters() if p.ndim >= 2]
    reg.add_gradients_()
    assert all(p.grad is not None for p in layer.parameters() if p.ndim >= 2)


# M and the temperature


def test_the_temperature_starts_at_a_tenth() -> None:
    reg = RangeRegularizer(Model())
    assert reg.penalty == "soft_min_max"
    assert reg.temperature.tolist() == pytest.approx([0.1] * 4)
    assert reg.temperature.dtype is torch.float32
    assert reg.temperature.requires_grad


def test_the_margin_starts_at_twice_the_deviation() -> None:
    model = Model()
    margin = RangeRegularizer(model, "margin").margin
    assert margin.shape == (4,)
    for weight, start in zip(weights_of(model), margin.tolist(), strict=True):
        assert start == pytest.approx(2 * weight.detach().double().std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize("start", [3.0, 3, [1.0, 2.0, 3.0, 4.0], (1, 2, 3, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])])
def test_starts(start: Any) -> None:
    model = Model()
    numbers = torch.as_tensor(start, dtype=torch.float32).expand(4)
    assert torch.equal(RangeRegularizer(model, temperature=start).temperature, numbers)
    deviations = torch.stack([weight.detach().std(correction=0) for weight in weights_of(model)])
    torch.testing.assert_close(RangeRegularizer(model, "margin", margin=start).margin.detach(), numbers * deviations)


def test_a_start_is_copied() -> None:
    start = torch.ones(4)
    reg = RangeRegularizer(Model(), temperature=start)
    start.add_(1.0)
    assert reg.temperature.tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_parameter_is_float32_for_models_of_any_dtype(dtype: torch.dtype) -> None:
    for penalty in ("margin", "soft_min_max"):
        assert parameter_of(RangeRegularizer(Model().to(dtype), penalty)).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_parametric_penalty
def test_a_cast_does_not_narrow_the_parameter(penalty: str, dtype: torch.dtype) -> None:
    """Steps smaller than an 8-bit mantissa resolves must not be lost."""
    reg = RangeRegularizer(Model(), penalty, strength=[0.1, 0.2, 0.3, 0.4])
    before = parameter_of(reg).detach().clone()
    reg.to(dtype)
    assert parameter_of(reg).dtype is torch.float32
    assert torch.equal(parameter_of(reg), before)
    nn.ModuleList([reg]).to(dtype)
    assert parameter_of(reg).dtype is torch.float32
    assert reg.double() is reg
    assert parameter_of(reg).dtype is torch.float64
    assert isinstance(parameter_of(reg), nn.Parameter)


@each_penalty
def test_a_widened_regularizer(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty).double()
    assert_right(reg, weights_of(model))


@each_parametric_penalty
def test_a_frozen_parameter_gets_no_gradient(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty)
    parameter_of(reg).requires_grad_(False)
    reg.add_gradients_()
    assert parameter_of(reg).grad is None
    assert all(weight.grad is not None for weight in weights_of(model))
    reg().backward()
    assert parameter_of(reg).grad is None


# The loss and its gradients


@each_penalty
def test_the_loss_is_the_strength_times_the_sum(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty, strength=0.03)
    wanted = expected(penalty, weights_of(model), parameter_of(reg))
    loss = reg()
    assert loss.shape == ()
    assert loss.requires_grad
    torch.testing.assert_close(loss.detach().cpu().double(), 0.03 * wanted.values.sum(), rtol=1e-6, atol=0)


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_in_place_gradients_from_none(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    model = Model().to(device, dtype)
    reg = RangeRegularizer(model, penalty, strength=0.5).to(device)
    assert_right(reg, weights_of(model), 0.5)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in WATCHED)


@each_penalty
def test_both_ways_give_the_same_gradients(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty, strength=0.2)
    through_autograd = reg()
    through_autograd.backward()
    named = [*model.named_parameters(), *reg.named_parameters()]
    first = {name: tensor.grad.clone() for name, tensor in named if tensor.grad is not None}
    model.zero_grad()
    reg.zero_grad()
    in_place = reg.add_gradients_()
    assert not in_place.requires_grad
    torch.testing.assert_close(in_place, through_autograd.detach(), rtol=1e-6, atol=0)
    second = {name: tensor.grad for name, tensor in named if tensor.grad is not None}
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert_gradient(second[name], gradient.cpu().double())


@each_penalty
def test_gradients_accumulate(backend: str, model: Model, penalty: str) -> None:
    """Into what the task's backward left, in the same memory."""
    reg = RangeRegularizer(model, penalty, strength=0.2)
    everything = [*weights_of(model), *reg.parameters()]
    for tensor in everything:
        tensor.grad = randn(*tensor.shape, device=tensor.device)
    before = [tensor.grad.clone() for tensor in everything]
    kept = [tensor.grad for tensor in everything]
    wanted = expected(penalty, weights_of(model), parameter_of(reg), torch.full((4,), 0.2))
    reg.add_gradients_()
    for index, weight in enumerate(weights_of(model)):
        assert weight.grad is kept[index]
        assert_gradient(weight.grad, wanted.gradients[index], before=before[index], index=index)
    if PARAMETERS[penalty] is not None:
        assert parameter_of(reg).grad is kept[4]
        torch.testing.assert_close(
            parameter_of(reg).grad.cpu().double(), before[4].cpu() + wanted.parameter_gradient, rtol=1e-5, atol=1e-6
        )


@each_penalty
def test_a_graph_that_saved_a_gradient_notices_the_change(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty)
    for tensor in weights_of(model):
        tensor.grad = torch.ones_like(tensor)
    factor = torch.ones((), device=model.head.bias.device, requires_grad=True)
    product = (factor * model.convolution.weight.grad).sum()
    reg.add_gradients_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@each_penalty
def test_some_gradients_are_there_and_some_are_not(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty, strength=1.0)
    weights = weights_of(model)
    weights[1].grad = torch.ones_like(weights[1])
    wanted = expected(penalty, weights, parameter_of(reg))
    reg.add_gradients_()
    for index, weight in enumerate(weights):
        before = torch.ones_like(weight) if index == 1 else None
        assert_gradient(weight.grad, wanted.gradients[index], before=before, index=index)


@each_penalty
def test_gradients_of_another_layout(backend: str, device: torch.device, penalty: str) -> None:
    model = nn.Conv2d(5, 6, 3).to(device)
    weight = model.weight
    weight.grad = torch.zeros_like(weight).to(memory_format=torch.channels_last)
    reg = RangeRegularizer(model, penalty)
    wanted = expected(penalty, [weight], parameter_of(reg), torch.tensor([0.01]))
    reg.add_gradients_()
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert_gradient(weight.grad, wanted.gradients[0])


@each_penalty
def test_created_gradients_match_their_weights_layout(backend: str, device: torch.device, penalty: str) -> None:
    model = nn.Conv2d(5, 6, 3).to(device, memory_format=torch.channels_last)
    RangeRegularizer(model, penalty).add_gradients_()
    assert model.weight.grad.stride() == model.weight.stride()


@each_penalty
def test_a_scale_multiplies_gradients_but_not_the_loss(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty, strength=0.2)
    loss = reg.add_gradients_()
    everything = [*weights_of(model), *reg.parameters()]
    once = [tensor.grad.clone() for tensor in everything]
    for scale in (1024.0, torch.tensor(1024.0, device=loss.device), 1024):
        for tensor in everything:
            tensor.grad = None
        assert torch.equal(reg.add_gradients_(scale=scale), loss)
        for tensor, gradient in zip(everything, once, strict=True):
            torch.testing.assert_close(tensor.grad, 1024 * gradient, rtol=1e-6, atol=0)


def test_with_a_gradient_scaler(backend: str, device: torch.device) -> None:
    """Scaled in, unscaled out: the step is the one without a scaler."""
    steps = []
    for is_scaled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).to(device)
        reg = RangeRegularizer(model, strength=0.1).to(device)
        optimizer = torch.optim.SGD([*model.parameters(), *reg.parameters()], lr=0.1)
        scaler = torch.amp.GradScaler(device.type, enabled=is_scaled, init_scale=512.0)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 4, device=device)).square().mean()).backward()
            reg.add_gradients_(scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        steps.append([parameter.detach().clone() for parameter in [*model.parameters(), *reg.parameters()]])
    for plain, scaled in zip(*steps, strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-7)


@each_penalty
def test_training_shrinks_the_range(backend: str, device: torch.device, penalty: str) -> None:
    model = nn.Linear(20, 20).to(device)
    reg = RangeRegularizer(model, penalty, strength=0.1, **({"temperature": 5.0} if penalty == "soft_min_max" else {}))
    optimizer = torch.optim.SGD([*model.parameters(), *reg.to(device).parameters()], lr=0.05)
    before = model.weight.abs().max().item()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(reg.add_gradients_().item())
        optimizer.step()
    if penalty in RANGE_PENALTIES:
        assert model.weight.abs().max().item() < before
    assert losses[-1] < losses[0]


@each_penalty
def test_losses_by_name(backend: str, model: Model, penalty: str) -> None:
    """Without the strength, detached."""
    reg = RangeRegularizer(model, penalty, strength=[0.0, 1.0, 2.0, 3.0])
    losses = reg.losses()
    assert list(losses) == WATCHED
    assert all(value.shape == () and not value.requires_grad for value in losses.values())
    wanted = expected(penalty, weights_of(model), parameter_of(reg))
    assert_values(torch.stack(list(losses.values())), wanted.values, weights_of(model))


def test_no_graph_under_no_grad(backend: str, model: Model) -> None:
    reg = RangeRegularizer(model)
    with torch.no_grad():
        assert not reg().requires_grad
    assert reg().requires_grad


# Strength


@each_penalty
@pytest.mark.parametrize(
    "strength",
    [[0.1, 0.0, -0.3, 2.0], (0.1, 0.0, -0.3, 2.0), torch.tensor([0.1, 0.0, -0.3, 2.0])],
    ids=["list", "tuple", "tensor"],
)
def test_one_strength_per_layer(backend: str, model: Model, penalty: str, strength: Any) -> None:
    reg = RangeRegularizer(model, penalty, strength=strength)
    wanted = expected(penalty, weights_of(model), parameter_of(reg))
    numbers = [0.1, 0.0, -0.3, 2.0]
    total = (wanted.values * torch.tensor(numbers, dtype=torch.float64)).sum()
    torch.testing.assert_close(reg().detach().cpu().double(), total, rtol=1e-5, atol=1e-6)
    for tensor in [*weights_of(model), *reg.parameters()]:
        tensor.grad = None
    coefficients = torch.tensor(numbers, dtype=torch.float64)
    gradients = expected(penalty, weights_of(model), parameter_of(reg), coefficients).gradients
    reg.add_gradients_()
    for index, weight in enumerate(weights_of(model)):
        assert_gradient(weight.grad, gradients[index], index=index, coefficient=2.0)


@pytest.mark.parametrize("strength", [0, 1, 0.5, torch.tensor(0.5), -0.5], ids=repr)
def test_one_strength_for_all(backend: str, model: Model, strength: Any) -> None:
    reg = RangeRegularizer(model, "linf", strength=strength)
    total = sum(weight.detach().abs().max().item() for weight in weights_of(model))
    assert reg().item() == pytest.approx(float(strength) * total, rel=1e-6)
    assert reg.add_gradients_().item() == pytest.approx(float(strength) * total, rel=1e-6)


def test_a_strength_changed_on_the_way(backend: str, model: Model) -> None:
    """Assigning the public attribute is what users do; it must not be ignored."""
    for start in (0.5, [0.1, 0.2, 0.3, 0.4], torch.ones(4), lambda step: 7.0):
        reg = RangeRegularizer(model, "linf", strength=start)
        reg.strength = 0.25
        total = sum(weight.detach().abs().max().item() for weight in weights_of(model))
        assert reg().item() == pytest.approx(0.25 * total, rel=1e-6)
        assert reg.add_gradients_().item() == pytest.approx(0.25 * total, rel=1e-6)


def test_a_schedule_sees_the_steps(backend: str, model: Model) -> None:
    """One add_gradients_() or, in training mode, one reg() with a graph is a step; looking is none."""
    seen = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 0.1 * step

    reg = RangeRegularizer(model, "linf", strength=schedule)
    total = sum(weight.detach().abs().max().item() for weight in weights_of(model))
    assert reg.add_gradients_().item() == 0.0
    assert reg.add_gradients_().item() == pytest.approx(0.1 * total)
    assert reg().item() == pytest.approx(0.2 * total)
    reg.losses()
    reg.report()
    reg.eval()
    assert reg().item() == pytest.approx(0.3 * total)
    assert reg().item() == pytest.approx(0.3 * total)
    reg.train()
    with torch.no_grad():
        assert reg().item() == pytest.approx(0.3 * total)
    assert reg.add_gradients_().item() == pytest.approx(0.3 * total)
    assert reg.step == 4
    assert seen[:3] == [0, 1, 2]


def test_an_error_is_no_step(backend: str, model: Model) -> None:
    reg = RangeRegularizer(model, "linf", strength=lambda step: 0.1)
    with torch.no_grad():
        model.convolution.weight[0, 0, 0, 0] = torch.nan
    for use in (reg, reg.add_gradients_):
        with pytest.raises(FloatingPointError):
            use(check_finite=True)
    assert reg.step == 0


def test_a_strength_in_mixed_precision_lists(backend: str, device: torch.device) -> None:
    """A float64 layer is held to float64 wherever in the list it is, by both ways."""
    narrow, wide = (
        nn.Parameter(randn(3, 3, device=device)),
        nn.Parameter(randn(3, 3, dtype=torch.float64, device=device)),
    )
    reg = RangeRegularizer([("narrow", narrow), ("wide", wide)], "linf", strength=0.1)
    total = 0.1 * (narrow.detach().double().abs().max() + wide.detach().abs().max())
    torch.testing.assert_close(reg().detach(), total, rtol=1e-8, atol=0)
    torch.testing.assert_close(reg.add_gradients_(), total, rtol=1e-8, atol=0)
    assert wide.grad.abs().max().item() == pytest.approx(0.1, rel=1e-14)


# NaN


@each_penalty
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_check_finite_names_the_layer(backend: str, model: Model, penalty: str, bad: float) -> None:
    reg = RangeRegularizer(model, penalty)
    reg(check_finite=True)
    weights = weights_of(model)
    with torch.no_grad():
        weights[2][-1, -1] = bad
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    for use in (reg, reg.add_gradients_):
        with pytest.raises(FloatingPointError, match=r"'hidden\.0\.weight'") as error:
            use(check_finite=True)
        assert penalty in str(error.value)
        assert "convolution" not in str(error.value)
    assert all(bool((weight.grad == 1).all()) for weight in weights)
    assert parameter_of(reg) is None or parameter_of(reg).grad is None


@each_penalty
def test_nan_in_one_layer_leaves_the_others_right(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty, strength=1.0)
    weights = weights_of(model)
    with torch.no_grad():
        weights[2][0, 3] = torch.nan
    wanted = expected(penalty, weights, parameter_of(reg))
    right = [0, 1, 3]
    assert reg.add_gradients_().isnan()
    assert [bool(value.isnan()) for value in reg.losses().values()] == [False, False, True, False]
    for index in right:
        assert_gradient(weights[index].grad, wanted.gradients[index], index=index)
    if PARAMETERS[penalty] is not None:
        assert_parameter_gradient(
            parameter_of(reg).grad[right], wanted.parameter_gradient[right], wanted.parameter_scales[right]
        )


# The report


@each_penalty
def test_the_report(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty)
    report = reg.report()
    assert isinstance(report, Report)
    assert len(report) == 4
    assert list(report) == list(report.rows)
    assert [row["layer"] for row in report.rows] == WATCHED
    values = expected(penalty, weights_of(model), parameter_of(reg)).values
    for index, (row, weight) in enumerate(zip(report.rows, weights_of(model), strict=True)):
        flat = weight.detach().double()
        low, high, largest = flat.min().item(), flat.max().item(), flat.abs().max().item()
        assert (row["min"], row["max"]) == (low, high)
        assert row["std"] == pytest.approx(flat.std(correction=0).item())
        assert row["max/std"] == pytest.approx(largest / row["std"])
        assert row["penalty"] == pytest.approx(values[index].item(), rel=1e-6)
        for bits in (8, 4, 3, 2):
            is_asymmetric = penalty == "soft_min_max"
            step = (high - low) / (2**bits - 1) if is_asymmetric else largest / (2 ** (bits - 1) - 1)
            assert row[f"step {bits} bit"] == pytest.approx(step)
        name = PARAMETERS[penalty]
        if name is None:
            assert "margin" not in row
            assert "temperature" not in row
        else:
            assert row[name] == pytest.approx(parameter_of(reg)[index].item())
    scalars = report.scalars()
    assert len(scalars) == sum(len(row) - 1 for row in report)
    assert scalars[f"max_over_std/{WATCHED[1]}"] == report.rows[1]["max/std"]


@each_penalty
def test_the_report_as_a_table(backend: str, model: Model, penalty: str) -> None:
    report = RangeRegularizer(model, penalty).report()
    lines = str(report).splitlines()
    assert len(lines) == 2 + 4
    assert len({len(line) for line in lines}) == 1
    for name, line in zip(WATCHED, lines[2:], strict=True):
        assert line.startswith(name)
    for column in report.rows[0]:
        assert column in lines[0]


def test_the_report_of_nan_and_constant_layers(backend: str, model: Model) -> None:
    with torch.no_grad():
        model.convolution.weight.zero_()
        model.hidden[0].weight.fill_(torch.nan)
    rows = RangeRegularizer(model, "linf").report().rows
    assert str(rows[1]["max/std"]) == "nan"
    assert str(rows[2]["penalty"]) == "nan"
    assert rows[3]["penalty"] > 0


def test_the_report_leaves_no_trace(backend: str, model: Model) -> None:
    reg = RangeRegularizer(model, strength=lambda step: 1.0)
    reg.report()
    reg.losses()
    assert reg.step == 0
    assert all(parameter.grad is None for parameter in model.parameters())


# State


@each_penalty
def test_state_round_trip(penalty: str) -> None:
    model = Model()
    reg = RangeRegularizer(model, penalty, strength=lambda step: 0.1)
    for _ in range(3):
        reg.add_gradients_()
    if (parameter := parameter_of(reg)) is not None:
        with torch.no_grad():
            parameter.add_(torch.arange(4.0))
    file = io.BytesIO()
    torch.save(reg.state_dict(), file)
    file.seek(0)
    other = RangeRegularizer(Model(), penalty, strength=lambda step: 0.1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.step == 3
    assert parameter is None or torch.equal(parameter_of(other), parameter)


def test_state_of_another_penalty() -> None:
    state = RangeRegularizer(Model(), "margin").state_dict()
    for penalty in ("linf", "soft_min_max"):
        with pytest.raises((ValueError, RuntimeError), match=rf"'{penalty}', got 'margin'"):
            RangeRegularizer(Model(), penalty).load_state_dict(state)


@pytest.mark.parametrize("selection", ["hidden.*.weight", "*.weight"])
@each_penalty
def test_state_of_other_weights(penalty: str, selection: str) -> None:
    state = RangeRegularizer(Model(), penalty).state_dict()
    other = RangeRegularizer(Model(), penalty, include=selection)
    before = None if parameter_of(other) is None else parameter_of(other).detach().clone()
    with pytest.raises((ValueError, RuntimeError), match=r"watched weights|size mismatch"):
        other.load_state_dict(state)
    assert before is None or torch.equal(parameter_of(other), before)


def test_state_of_as_many_weights_of_other_names_changes_nothing() -> None:
    """The shapes fit, so only the names can tell."""
    state = RangeRegularizer(Model(), include=["convolution.weight", "hidden.0.weight"], temperature=3.0).state_dict()
    other = RangeRegularizer(Model(), include=["hidden.0.weight", "hidden.2.weight"])
    with pytest.raises(ValueError, match=r"convolution\.weight.*hidden\.2\.weight"):
        other.load_state_dict(state)
    assert other.temperature.tolist() == pytest.approx([0.1, 0.1])
    assert other.step == 0


@each_penalty
def test_state_inside_a_larger_module(penalty: str) -> None:
    model = Model()
    both = nn.ModuleDict({"model": model, "reg": RangeRegularizer(model, penalty)})
    other_model = Model()
    other = nn.ModuleDict({"model": other_model, "reg": RangeRegularizer(other_model, penalty)})
    other.load_state_dict(both.state_dict())
    torch.testing.assert_close(other["reg"](), both["reg"]())


# Models that change


@each_penalty
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_moved_to_another_dtype(backend: str, model: Model, penalty: str, dtype: torch.dtype) -> None:
    reg = RangeRegularizer(model, penalty)
    assert_right(reg, weights_of(model))
    model.to(dtype)
    assert_right(reg, weights_of(model))


@each_penalty
def test_a_state_assigned_to_the_model(backend: str, model: Model, device: torch.device, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty)
    reg.add_gradients_()
    old = weights_of(model)
    model.load_state_dict(Model().to(device).state_dict(), assign=True)
    new = weights_of(model)
    assert all(before is not after for before, after in zip(old, new, strict=True))
    assert_right(reg, new)


@each_penalty
def test_reassigned_data(backend: str, model: Model, device: torch.device, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty)
    assert_right(reg, weights_of(model))
    for weight in weights_of(model):
        weight.data = 3 * randn(*weight.shape, device=device)
    assert_right(reg, weights_of(model))


@each_penalty
def test_reassigned_data_of_another_size(backend: str, model: Model, device: torch.device, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty)
    assert_right(reg, weights_of(model))
    for weight in weights_of(model):
        weight.grad = None
        weight.data = randn(17, weight.shape[0] + 40, device=device)
    assert_right(reg, weights_of(model))


@each_penalty
def test_memory_that_is_freed_and_taken_again(backend: str, device: torch.device, penalty: str) -> None:
    """A table of addresses that was kept would fit: the same address, another size or dtype."""
    model = nn.Linear(64, 64, bias=False).to(device)
    reg = RangeRegularizer(model, penalty)
    addresses = set()
    for step in range(40):
        model.weight.grad = None
        model.weight = None
        dtype = torch.float32 if step % 3 else torch.bfloat16
        model.weight = nn.Parameter(randn(64, (64, 32, 63)[step % 3], dtype=dtype, device=device))
        addresses.add(model.weight.data_ptr())
        assert_right(reg, [model.weight])
    assert len(addresses) < 40, "the allocator never reused an address: the test saw nothing"


@each_penalty
def test_a_replaced_parameter(backend: str, model: Model, device: torch.device, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty)
    model.convolution.weight = nn.Parameter(randn(5, 5, device=device))
    assert_right(reg, weights_of(model))


@each_penalty
def test_a_replaced_submodule(backend: str, model: Model, device: torch.device, penalty: str) -> None:
    """As adapters and quantizers do: what is no longer in the model is not what to regularize."""
    reg = RangeRegularizer(model, penalty)
    model.convolution = nn.Conv2d(3, 4, 3).to(device)
    model.hidden[2] = nn.Linear(5, 9, bias=False).to(device)
    assert_right(reg, weights_of(model))


@each_penalty
def test_gradients_set_to_none_between_steps(backend: str, model: Model, penalty: str) -> None:
    reg = RangeRegularizer(model, penalty)
    optimizer = torch.optim.SGD([*model.parameters(), *reg.parameters()], lr=0.1)
    for set_to_none in (True, False, True, True):
        assert_right(reg, weights_of(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


# Copies


@each_penalty
def test_deepcopy_of_model_and_regularizer_together(backend: str, model: Model, penalty: str) -> None:
    both = nn.ModuleDict({"model": model, "reg": RangeRegularizer(model, penalty)})
    twin = copy.deepcopy(both)
    with torch.no_grad():
        for parameter in twin["model"].parameters():
            parameter.mul_(2.0)
    before = both["reg"]()
    assert_right(twin["reg"], weights_of(twin["model"]))
    assert all(weight.grad is None for weight in weights_of(model))
    torch.testing.assert_close(both["reg"](), before)
    assert parameter_of(twin["reg"]) is None or parameter_of(twin["reg"]) is not parameter_of(both["reg"])


@each_penalty
def test_pickle_of_model_and_regularizer_together(backend: str, model: Model, penalty: str) -> None:
    both = nn.ModuleDict({"model": model, "reg": RangeRegularizer(model, penalty, strength=[0.1, 0.2, 0.3, 0.4])})
    twin = pickle.loads(pickle.dumps(both))
    torch.testing.assert_close(twin["reg"](), both["reg"](), rtol=0, atol=0)
    assert twin["reg"].names == WATCHED
    twin["reg"].add_gradients_()
    assert all(weight.grad is not None for weight in weights_of(twin["model"]))
    assert all(weight.grad is None for weight in weights_of(model))


def test_repr() -> None:
    text = repr(RangeRegularizer(Model(), "margin", strength=0.05))
    assert "RangeRegularizer" in text
    assert "'margin'" in text
    assert "0.05" in text


# With torch's optimizers


@each_penalty
def test_a_training_loop_of_either_way(backend: str, device: torch.device, penalty: str) -> None:
    """loss + reg() and add_gradients_() train the same model."""
    results = []
    for in_place in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
        reg = RangeRegularizer(model, penalty, strength=0.05).to(device)
        optimizer = torch.optim.AdamW([*model.parameters(), *reg.parameters()], lr=1e-2, weight_decay=0.0)
        inputs = randn(32, 6, device=device)
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            if in_place:
                loss.backward()
                reg.add_gradients_()
            else:
                (loss + reg()).backward()
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in [*model.parameters(), *reg.parameters()]])
    for through_autograd, in_place_result in zip(*results, strict=True):
        torch.testing.assert_close(through_autograd, in_place_result, rtol=1e-3, atol=1e-4)
