"""The optimizers that carry the penalty: held to torch.optim's with the reference penalty in the loss."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from r2_kernels import RangeRegularizer, ops, optim, reference
from r2_kernels.penalties import PENALTIES

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    ("AdamW", {"maximize": True}),
    ("AdamW", {"lr": torch.tensor(0.01, dtype=torch.float64)}),
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]
each_penalty = pytest.mark.parametrize("penalty", PENALTIES)

# Each of them has soft-min-max compute in another way.
TEMPERATURES = [("soft_min_max", temperature) for temperature in (0.0, 1e-3, 0.01, 0.1, 1.0, 10.0)]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """More than a chunk in one weight, odd sizes, and biases that nobody watches."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(301, 67), nn.ReLU(), nn.Linear(67, 5)).to(dtype)


def regularizer(model: nn.Module, penalty: str, **settings: Any) -> RangeRegularizer:
    start = {"temperature": 3.0} if penalty == "soft_min_max" else {}
    return RangeRegularizer(model, penalty, strength=0.05, **start, **settings)


def task_loss(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = next(model.parameters())
    inputs = torch.randn(16, 301, generator=generator).to(weight.dtype)
    return model(inputs).float().square().mean()


def reference_loss(reg: RangeRegularizer) -> Tensor:
    own = reg.own_parameter()
    # AdamW divides even the smallest gradients by their size: they are to be exact.
    weights = [weight.double() for weight in reg.weights()]
    values = getattr(reference, reg.penalty)(weights, *([] if own is None else [own]))
    return 0.05 * values.sum()


def train(optimizer: torch.optim.Optimizer, model: nn.Module, added: RangeRegularizer | None, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task_loss(model)
        (loss if added is None else loss + reference_loss(added)).backward()
        optimizer.step()


def torch_optimizer(name: str, model: nn.Module, reg: RangeRegularizer, **settings: Any) -> torch.optim.Optimizer:
    groups = [{"params": list(model.parameters())}]
    if reg.own_parameter() is not None:
        groups.append({"params": list(reg.parameters()), "weight_decay": 0.0})
    return getattr(torch.optim, name)(groups, **{"lr": 0.01, **settings})


def tensors(model: nn.Module, reg: RangeRegularizer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in (*model.parameters(), *reg.parameters())]


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    rtol, atol = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-12, 1e-13)}[dtype]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, check_dtype=False)


@each_penalty
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_those_of_torch(
    name: str, settings: dict[str, Any], penalty: str, backend: str, dtype: torch.dtype
) -> None:
    model, expected_model = network(dtype), network(dtype)
    reg, expected_reg = regularizer(model, penalty), regularizer(expected_model, penalty)
    train(torch_optimizer(name, expected_model, expected_reg, **settings), expected_model, expected_reg)
    train(getattr(optim, name)(model.parameters(), regularizer=reg, **{"lr": 0.01, **settings}), model, None)
    # The penalty's own parameter is float32 in any case.
    count = len(list(model.parameters()))
    loose = torch.float32 if penalty == "soft_min_max" else dtype
    assert_close(tensors(model, reg)[:count], tensors(expected_model, expected_reg)[:count], loose)
    assert_close(tensors(model, reg)[count:], tensors(expected_model, expected_reg)[count:])


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_without_regularizer(name: str, settings: dict[str, Any]) -> None:
    model, expected_model = network(), network()
    train(getattr(optim, name)(model.parameters(), **{"lr": 0.01, **settings}), model, None)
    train(getattr(torch.optim, name)(expected_model.parameters(), **{"lr": 0.01, **settings}), expected_model, None)
    assert_close(list(model.parameters()), list(expected_model.parameters()))


@each_penalty
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_decoupled_is_a_step_of_its_own(name: str, penalty: str) -> None:
    model, expected_model = network(), network()
    reg, expected_reg = regularizer(model, penalty), regularizer(expected_model, penalty)
    task_loss(model).backward()
    getattr(optim, name)(model.parameters(), lr=0.01, regularizer=reg, decoupled=True).step()
    slopes = torch.autograd.grad(reference_loss(expected_reg), expected_reg.weights())
    task_loss(expected_model).backward()
    with torch.no_grad():
        for weight, slope in zip(expected_reg.weights(), slopes, strict=True):
            weight -= 0.01 * slope
    getattr(torch.optim, name)(expected_model.parameters(), lr=0.01).step()
    assert_close(list(model.parameters()), list(expected_model.parameters()))


@each_penalty
def test_losses_after_a_step_are_those_of_the_new_weights(penalty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    reg = regularizer(model, penalty)
    train(optim.AdamW(model.parameters(), regularizer=reg), model, None)
    expected = reg._values()
    monkeypatch.setattr(RangeRegularizer, "_values", lambda self: pytest.fail("a pass over the weights"))
    assert torch.equal(torch.stack(list(reg.losses().values())), expected.detach())


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
@pytest.mark.parametrize(("penalty", "start"), [("linf", None), ("kurtosis", None), ("margin", 1.0), *TEMPERATURES])
def test_statistics_of_a_step_are_bitwise_those_of_a_pass(
    penalty: str, start: float | None, settings: dict[str, Any]
) -> None:
    """A step gathers them from registers, in one look where it can; a pass over the new weights must not tell."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(size, generator=generator)) for size in (1, 15, 1024, 1041, 16384, 40001)]
    with torch.no_grad():
        weights[-1][1500] = 1e4  # what the first entries of a chunk do not suggest
        weights[-1][20000] = torch.inf
        weights[-2][-1] = torch.nan
        weights[2][5] = 1e-40
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    starts = {} if start is None else {"margin" if penalty == "margin" else "temperature": start}
    reg = RangeRegularizer([(str(i), w) for i, w in enumerate(weights)], penalty, include="*", **starts)
    kind = optim.SGD if "momentum" in settings else optim.AdamW
    optimizer = kind(weights, lr=0.01, regularizer=reg, **settings)
    optimizer.step()
    (carried,) = reg.carried_statistics
    _, _, statistics, partials = torch.ops.r2_kernels.reduce(penalty, weights, carried.parameter)
    assert_bitwise_equal(carried.statistics, statistics)
    assert_bitwise_equal(carried.partials, partials)


@pytest.mark.parametrize("penalty", ["linf", "margin", "soft_min_max", "kurtosis"])
def test_a_step_leaves_the_row_of_an_empty_weight_empty(penalty: str, backend: str) -> None:
    """Whatever row it was given: that of a whole weight, of which this rank has no entry."""
    weights = [torch.randn(0, 3), torch.randn(5, 3), torch.randn(0)]
    gradients = [torch.zeros_like(weight) for weight in weights]
    rule = ops.by_name(penalty)
    parameter = None if rule.parameter is None else torch.ones(3)
    _, _, statistics, partials = ops.kernel("reduce", weights[0].device)(penalty, weights, parameter)
    given = statistics[1].expand_as(statistics).contiguous()
    number = torch.ones((), dtype=torch.float64)
    ops.kernel("sgd_step_", weights[0].device)(
        *(weights, gradients, [], [], 0 * number, 0.0, 0.0, 0.0, False, False, None, None, None, None),
        *(penalty, parameter, parameter, given, partials, torch.zeros(3), False),
    )
    assert torch.equal(given, statistics)


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """NaNs count as equal whatever their bits."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num().view(torch.int64), expected.nan_to_num().view(torch.int64))


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)


def change_by_load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


def change_storage(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data * 2


@each_penalty
@pytest.mark.parametrize("change", [change_in_place, change_by_load, change_storage])
def test_changed_weights_are_noticed(penalty: str, change: Any) -> None:
    model = network()
    reg = regularizer(model, penalty)
    optimizer = optim.SGD(model.parameters(), lr=0.01, regularizer=reg)
    train(optimizer, model, None, 1)
    change(model)
    expected_model = copy.deepcopy(model)
    expected_reg = regularizer(expected_model, penalty)
    expected_reg.load_state_dict(reg.state_dict())
    torch.testing.assert_close(list(reg.losses().values()), list(expected_reg.losses().values()))
    train(optimizer, model, None, 1)
    train(torch_optimizer("SGD", expected_model, expected_reg), expected_model, expected_reg, 1)
    assert_close(tensors(model, reg), tensors(expected_model, expected_reg))


def test_a_write_through_data_is_noticed_on_demand() -> None:
    model = network()
    reg = regularizer(model, "linf")
    optimizer = optim.SGD(model.parameters(), lr=0.01, regularizer=reg)
    train(optimizer, model, None, 1)
    model[0].weight.data.mul_(2)
    optimizer.refresh_statistics()
    assert reg.losses()["0.weight"] == model[0].weight.abs().max()


@each_penalty
def test_a_checkpoint_goes_both_ways(penalty: str) -> None:
    for first, second in ((optim.AdamW, torch.optim.AdamW), (torch.optim.AdamW, optim.AdamW)):
        model = network()
        reg = regularizer(model, penalty)

        def make(kind: Any, model: nn.Module, reg: RangeRegularizer) -> torch.optim.Optimizer:
            if kind is optim.AdamW:
                return optim.AdamW(model.parameters(), lr=0.01, regularizer=reg)
            return torch_optimizer("AdamW", model, reg)

        before = make(first, model, reg)
        train(before, model, None if first is optim.AdamW else reg)
        after_model = copy.deepcopy(model)
        after_reg = regularizer(after_model, penalty)
        after_reg.load_state_dict(reg.state_dict())
        after = make(second, after_model, after_reg)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        train(before, model, None if first is optim.AdamW else reg)
        train(after, after_model, None if second is optim.AdamW else after_reg)
        assert_close(tensors(model, reg), tensors(after_model, after_reg))


def test_resuming_is_bitwise_the_same() -> None:
    model = network()
    reg = regularizer(model, "soft_min_max")
    optimizer = optim.AdamW(model.parameters(), lr=0.01, regularizer=reg)
    train(optimizer, model, None)
    resumed_model = copy.deepcopy(model)
    resumed_reg = regularizer(resumed_model, "soft_min_max")
    resumed_reg.load_state_dict(reg.state_dict())
    resumed = optim.AdamW(resumed_model.parameters(), lr=0.01, regularizer=resumed_reg)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, None)
    train(resumed, resumed_model, None)
    assert all(map(torch.equal, tensors(model, reg), tensors(resumed_model, resumed_reg)))


def test_the_state_dict_holds_the_statistics() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.01, regularizer=regularizer(model, "linf"))
    train(optimizer, model, None)
    rows = optimizer.state_dict()["range_statistics"]["rows"]
    assert {name: float(row[0]) for name, row in rows.items()} == {
        "0.weight": float(model[0].weight.detach().abs().max()),
        "2.weight": float(model[2].weight.detach().abs().max()),
    }


def test_a_weight_that_moves_to_another_group_is_carried_there() -> None:
    model = network()
    reg = regularizer(model, "linf")
    optimizer = optim.SGD(model.parameters(), lr=0.01, regularizer=reg)
    train(optimizer, model, None)
    first = optimizer.param_groups[0]
    first["params"] = [parameter for parameter in first["params"] if parameter is not model[2].weight]
    optimizer.add_param_group({"params": [model[2].weight], "lr": 0.1})
    train(optimizer, model, None)
    rows = optimizer.state_dict()["range_statistics"]["rows"]
    assert {name: float(row[0]) for name, row in rows.items()} == {
        name: float(weight.detach().abs().max()) for name, weight in zip(reg.names, reg.weights(), strict=True)
    }
    second = optimizer.param_groups[1]
    first["params"], second["params"] = second["params"], first["params"]
    train(optimizer, model, None)
    assert len(optimizer.state_dict()["range_statistics"]["rows"]) == 2


def test_found_inf_leaves_everything_as_it_is() -> None:
    model = network()
    reg = regularizer(model, "soft_min_max")
    optimizer = optim.AdamW(model.parameters(), lr=0.01, regularizer=reg)
    train(optimizer, model, None)
    before = tensors(model, reg)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(map(torch.equal, tensors(model, reg), before))
    assert all(float(state["step"]) == 3 for state in optimizer.state.values())


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_grad_scaler_and_clipping(name: str) -> None:
    model, expected_model = network(), network()
    reg, expected_reg = regularizer(model, "soft_min_max"), regularizer(expected_model, "soft_min_max")
    optimizer = getattr(optim, name)(model.parameters(), lr=0.01, regularizer=reg)
    expected = getattr(optim, name)(expected_model.parameters(), lr=0.01, regularizer=expected_reg)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(task_loss(model)).backward()
        scaler.step(optimizer, clip_coefficient=torch.tensor(0.25))
        scaler.update()
        expected.zero_grad()
        (0.25 * task_loss(expected_model)).backward()
        expected.step()
    assert_close(tensors(model, reg), tensors(expected_model, expected_reg))


@each_penalty
def test_bfloat16_weights_with_float32_moments(penalty: str) -> None:
    model = network(torch.bfloat16)
    reg = regularizer(model, penalty)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, regularizer=reg, state_dtype=torch.float32)
    train(optimizer, model, None)
    assert {state["exp_avg"].dtype for p, state in optimizer.state.items() if p.ndim == 2} == {torch.float32}
    restored = optim.AdamW(model.parameters(), lr=0.01, regularizer=reg, state_dtype=torch.float32)
    restored.load_state_dict(optimizer.state_dict())
    weight = model[0].weight
    assert torch.equal(restored.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])


def test_stochastic_rounding_keeps_small_updates_in_the_mean() -> None:
    def moved(is_stochastic: bool) -> float:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
        optimizer = optim.SGD([weight], lr=1.0, stochastic_rounding=is_stochastic)
        for _ in range(4):
            weight.grad = torch.full_like(weight, 2.0**-11)
            optimizer.step()
        return float(1 - weight.detach().double().mean())

    assert moved(False) == 0
    assert moved(True) == pytest.approx(4 * 2.0**-11, rel=0.1)
    assert moved(True) == moved(True)


def test_channels_last_and_several_groups() -> None:
    def build() -> tuple[nn.Module, RangeRegularizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
        for parameter in model.parameters():
            parameter.grad = torch.ones(parameter.shape)  # in another order than the weight's
        return model, regularizer(model, "margin")

    model, reg = build()
    groups = [{"params": model[1].parameters(), "lr": 0.1}, {"params": model[0].parameters()}]
    optim.SGD(groups, lr=0.01, regularizer=reg).step()
    expected_model, expected_reg = build()
    reference_loss(expected_reg).backward()
    groups = [{"params": expected_model[1].parameters(), "lr": 0.1}, {"params": expected_model[0].parameters()}]
    torch.optim.SGD([*groups, {"params": expected_reg.parameters()}], lr=0.01).step()
    assert_close(tensors(model, reg), tensors(expected_model, expected_reg))


def test_a_weight_without_a_gradient_still_feels_the_penalty() -> None:
    model = network()
    reg = regularizer(model, "linf")
    before = model[0].weight.detach().clone()
    optim.SGD(model.parameters(), lr=0.01, regularizer=reg).step()
    assert int((model[0].weight != before).sum()) == 1


def test_closures_copies_and_pickles() -> None:
    model = network()
    reg = regularizer(model, "soft_min_max")
    optimizer = optim.AdamW(model.parameters(), regularizer=reg)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task_loss(model)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.regularizer.penalty == "soft_min_max"
        assert other.regularizer.carried_statistics == []


def test_bad_arguments() -> None:
    model = network()
    reg = regularizer(model, "linf")
    with pytest.raises(ValueError, match=r"'0\.weight'"):
        optim.AdamW(model[2].parameters(), regularizer=reg)
    with pytest.raises(TypeError, match="regularizer: expected a RangeRegularizer"):
        optim.AdamW(model.parameters(), regularizer="linf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decoupled: expected False"):
        optim.SGD(model.parameters(), decoupled=True)
    with pytest.raises(TypeError, match="state_dtype"):
        optim.SGD(model.parameters(), state_dtype=torch.int32)
    with pytest.raises(ValueError, match="differentiable"):
        optim.SGD(model.parameters(), differentiable=True)
    with pytest.raises(ValueError, match="clip_coefficient"):
        optim.SGD(model.parameters(), regularizer=reg).step(clip_coefficient=torch.ones(2))
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0\.weight' to require a gradient"):
        optim.SGD(model.parameters(), regularizer=reg).step()


def gradient_that_is_sparse(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight).to_sparse()


def gradient_of_complex_numbers(weight: nn.Parameter) -> None:
    weight.grad = None
    weight.grad_dtype = torch.complex64
    weight.grad = torch.ones_like(weight, dtype=torch.complex64)


def weight_with_gaps(weight: nn.Parameter) -> None:
    weight.data = torch.ones(4, 6)[:, ::2]
    weight.grad = torch.ones(4, 3)


@pytest.mark.parametrize("kind", [optim.AdamW, optim.SGD])
@pytest.mark.parametrize("spoil", [gradient_that_is_sparse, gradient_of_complex_numbers, weight_with_gaps])
def test_what_no_kernel_reads_is_refused_before_anything_changes(kind: Any, spoil: Any) -> None:
    weights = {name: nn.Parameter(torch.randn(4, 3)) for name in ("first", "second")}
    reg = RangeRegularizer(weights.items(), "soft_min_max")
    optimizer = kind(weights.items(), lr=0.1, regularizer=reg)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    spoil(weights["second"])
    before = [tensor.detach().clone() for tensor in (*weights.values(), reg.temperature)]
    with pytest.raises(TypeError, match=r"group 0, parameter 1 \('second'\) of shape \(4, 3\)"):
        optimizer.step()
    assert all(map(torch.equal, before, (*weights.values(), reg.temperature)))
    assert not optimizer.state
