"""The optimizers' operators of the Triton backend, against those of the reference on the same numbers in float64.

Without a GPU this needs ``TRITON_INTERPRET=1``, like every test that runs the kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import pytest
import torch
from conftest import IS_INTERPRETED, require
from oracle import PENALTIES, call_reference, default_parameter
from tensors import randn, with_offset
from tolerances import TOLERANCES
from torch import Tensor, nn

pytest.importorskip("triton")
if not IS_INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and the interpreter is off", allow_module_level=True)

import r2_kernels.optim
from r2_kernels import RangeRegularizer, ops, use_backend
from r2_kernels.backends import reference
from r2_kernels.backends import triton as backend
from r2_kernels.backends.triton import chunk_table, operators, step_operators, step_table
from r2_kernels.penalties import CHUNK_SIZE, by_name

BACKEND = "triton"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")

each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
with_and_without_penalty = pytest.mark.parametrize("penalty", [None, *PENALTIES])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or IS_INTERPRETED, reason="needs a GPU")

# Of the arithmetic, relative to the largest number before and after; the rounding of what is stored comes on top.
ARITHMETIC = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# What most tests cut tensors into, as the interpreter is slow.
SMALL_CHUNK = 256
KINDS = {"adamw": 2, "amsgrad": 3, "sgd": 0, "momentum": 1}


@dataclass
class Step:
    """The arguments of either operator."""

    kind: str
    weights: list[Tensor]
    gradients: list[Tensor]
    states: list[list[Tensor]]
    steps: list[Tensor]
    started: list[int] = field(default_factory=list)
    lr: float = 0.05
    settings: dict[str, float] = field(default_factory=dict)
    nesterov: bool = False
    maximize: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip_coefficient: Tensor | None = None
    rounding_seed: int | None = None
    penalty: str | None = None
    parameter: Tensor | None = None
    next_parameter: Tensor | None = None
    statistics: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64, device=DEVICE))
    partials: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device=DEVICE))
    coefficients: Tensor = field(default_factory=lambda: torch.empty(0, device=DEVICE))
    is_decoupled: bool = False

    def watch(self, penalty: str | None, count: int) -> Step:
        """With the penalty on the first weights, and the statistics that this backend finds of them."""
        if penalty is None:
            return self
        watched = self.weights[:count]
        parameter = default_parameter(penalty, watched)
        _, _, statistics, partials = operators.reduce(penalty, watched, parameter)
        coefficients = torch.linspace(0.5, 1.5, count, device=DEVICE)
        following = None if parameter is None else parameter * 1.1
        return replace(
            self,
            penalty=penalty,
            parameter=parameter,
            next_parameter=following,
            statistics=statistics,
            partials=partials,
            coefficients=coefficients,
        )

    def in_float64(self) -> Step:
        """The same numbers on the CPU, to be stepped by the reference."""
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            changed[name] = value
            if isinstance(value, Tensor):
                changed[name] = value.detach().cpu().double().clone()
            elif name in ("weights", "gradients", "steps"):
                changed[name] = [tensor.detach().cpu().double().clone() for tensor in value]
        changed["states"] = [[tensor.detach().cpu().double().clone() for tensor in state] for state in self.states]
        return Step(**changed)

    def run(self, by: Any = backend) -> None:
        lr = torch.tensor(self.lr, dtype=torch.float64, device=self.statistics.device)
        shared = (
            self.maximize,
            self.grad_scale,
            self.found_inf,
            self.clip_coefficient,
            self.rounding_seed,
            self.penalty,
            self.parameter,
            self.next_parameter,
            self.statistics,
            self.partials,
            self.coefficients,
            self.is_decoupled,
        )
        if self.kind in ("adamw", "amsgrad"):
            first, second, *largest = self.states
            settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1, **self.settings}.values()
            largest = largest[0] if largest else []
            by.adamw_step_(self.weights, self.gradients, first, second, largest, self.steps, lr, *settings, *shared)
            return
        settings = {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, **self.settings}
        if self.kind == "sgd":
            settings["momentum"] = 0.0
        buffers = self.states[0] if self.states else []
        arguments = (self.weights, self.gradients, buffers, self.started, lr, *settings.values(), self.nesterov)
        by.sgd_step_(*arguments, *shared)


def make_step(
    kind: str,
    weights: Sequence[Tensor],
    gradient_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    **options: Any,
) -> Step:
    """A step in the middle of a training, with arrays laid out as the weights."""

    def like(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
        other = torch.empty_like(weight, dtype=dtype or weight.dtype)
        return other.copy_(randn(*weight.shape, device=DEVICE))

    gradients = [like(weight, gradient_dtype) for weight in weights]
    states = [[like(weight, state_dtype) for weight in weights] for _ in range(KINDS[kind])]
    for state in states[1:]:
        for tensor in state:
            tensor.square_()
    counted = kind in ("adamw", "amsgrad")
    steps = [torch.tensor(float(index % 4), device=DEVICE) for index in range(len(weights))] if counted else []
    started = [] if counted else [int(index % 3 != 1) for index in range(len(weights))]
    return Step(kind, list(weights), gradients, states, steps, started, **options)


def some_weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Sizes and layouts: the first three are to be watched."""
    return [
        randn(SMALL_CHUNK + 9, dtype=dtype, device=DEVICE),
        randn(4, 6, 3, 3, dtype=dtype, device=DEVICE).to(memory_format=torch.channels_last),
        randn(7, dtype=dtype, device=DEVICE),
        randn(SMALL_CHUNK, dtype=dtype, device=DEVICE),
        randn(1, dtype=dtype, device=DEVICE),
        with_offset(randn(33, dtype=dtype, device=DEVICE), 3),
    ]


def use_chunks_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tensors into other chunks than usual, whole and partial, and let a segment have more than merge at a time."""
    other = {"CHUNK": size, "BLOCK": size // 2, "LANES": 4}

    def patch(module: Any, name: str) -> None:
        uncached = getattr(module, name).__wrapped__  # It would remember what it is built of here.

        def constants(*args: Any) -> dict[str, Any]:
            made = uncached(*args)
            return made | {name: value for name, value in other.items() if name in made}

        monkeypatch.setattr(module, name, constants)

    for name in ("reduce_constants", "merge_constants"):
        patch(operators, name)
    for name in ("step_constants", "finish_constants"):
        patch(step_operators, name)
    for module in (operators, step_operators, reference):
        monkeypatch.setattr(module, "CHUNK_SIZE", size)
    monkeypatch.setattr(operators, "_weight_tables", chunk_table.TableCache())


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunks_of(SMALL_CHUNK, monkeypatch)


in_small_chunks = pytest.mark.usefixtures("_small_chunks")


def check(step: Step) -> None:
    """The step does what the reference does on the same numbers, and leaves the statistics of its new weights."""
    before, exact = step.in_float64(), step.in_float64()
    if step.penalty is not None:
        watched = exact.weights[: len(step.statistics)]
        _, _, exact.statistics, exact.partials = reference.reduce(step.penalty, watched, exact.parameter)
    exact.run(reference)
    step.run()
    assert_close("weights", step.weights, exact.weights, before.weights, before.gradients)
    for index, (state, expected, old) in enumerate(zip(step.states, exact.states, before.states, strict=True)):
        assert_close(f"states[{index}]", state, expected, old, before.gradients)
    assert [count.item() for count in step.steps] == [count.item() for count in exact.steps]
    check_statistics(step)


def check_statistics(step: Step) -> None:
    """The statistics are what ``reduce`` finds in the weights as they are stored."""
    if step.penalty is None:
        return
    watched = step.weights[: len(step.statistics)]
    _, _, statistics, partials = operators.reduce(step.penalty, watched, step.next_parameter)
    if IS_INTERPRETED or by_name(step.penalty).parameter != "margin":
        assert torch.equal(step.statistics, statistics)
    else:  # gathered in other lanes where the states' dtype is another
        torch.testing.assert_close(step.statistics, statistics, rtol=1e-5, atol=0)
    assert torch.equal(step.partials, partials)


def assert_close(name: str, actual: Sequence[Tensor], *numbers: Sequence[Tensor]) -> None:
    """``numbers`` are those expected, those before, and the gradients, in float64."""
    for index, (stored, exact, *others) in enumerate(zip(actual, *numbers, strict=True)):
        if exact.numel() == 0:
            continue
        largest = max(tensor.abs().max().item() for tensor in (exact, *others))
        tolerance = TOLERANCES[stored.dtype]
        allowed = ARITHMETIC[stored.dtype] * largest + tolerance.storage * exact.abs() + tolerance.smallest
        error = (stored.detach().cpu().double() - exact).abs()
        assert bool((error <= allowed).all()), f"{name}[{index}]: off by {(error / allowed).max():.3g} of what may be"


# Rules, options, dtypes


# Without a penalty, see ``test_dtypes`` and ``test_found_inf_leaves_everything``.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "adamw-maximize": ("adamw", {"maximize": True}),
    "adamw-decoupled": ("adamw", {"is_decoupled": True}),
    "adamw-no-betas": ("adamw", {"settings": {"beta1": 0.0, "beta2": 0.0, "eps": 0.1}}),
    "amsgrad-decoupled-maximize": ("amsgrad", {"is_decoupled": True, "maximize": True}),
    "amsgrad": ("amsgrad", {}),
    "sgd": ("sgd", {}),
    "sgd-maximize-decoupled": ("sgd", {"maximize": True, "is_decoupled": True}),
    "momentum": ("momentum", {}),
    "nesterov-maximize": ("momentum", {"nesterov": True, "maximize": True, "settings": {"dampening": 0.0}}),
    "nesterov-decoupled": ("momentum", {"nesterov": True, "is_decoupled": True}),
}


@in_small_chunks
@each_penalty
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, penalty: str) -> None:
    kind, given = OPTIONS[options]
    check(make_step(kind, some_weights(), **given).watch(penalty, 3))


DTYPES = {
    "bfloat16-gradients": (torch.float32, torch.bfloat16, torch.float32),
    "float32-states": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16, torch.float16),
    "bfloat16-states": (torch.float32, torch.float16, torch.bfloat16),
    "float64": (torch.float64, torch.float64, torch.float64),
    "float64-from-bfloat16": (torch.float64, torch.float32, torch.bfloat16),
}


@in_small_chunks
@with_and_without_penalty
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes: str, penalty: str | None) -> None:
    weight, gradient, state = DTYPES[dtypes]
    check(make_step("adamw", some_weights(weight), gradient, state).watch(penalty, 3))


@in_small_chunks
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes_with_momentum(dtypes: str) -> None:
    weight, gradient, state = DTYPES[dtypes]
    check(make_step("momentum", some_weights(weight), gradient, state).watch("margin", 3))


@in_small_chunks
@with_and_without_penalty
def test_several_dtypes_in_one_list(penalty: str | None) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    weights = [randn(50 + index, dtype=dtypes[index % 3], device=DEVICE) for index in range(7)]
    check(make_step("adamw", weights).watch(penalty, 5))


@in_small_chunks
@each_penalty
def test_scaling(penalty: str) -> None:
    scaling = {"grad_scale": 64.0, "clip_coefficient": 0.3, "found_inf": 0.0}
    options = {name: torch.tensor(number, device=DEVICE) for name, number in scaling.items()}
    check(make_step("adamw", some_weights()[1:], **options).watch(penalty, 2))


@in_small_chunks
@pytest.mark.parametrize("kind", KINDS)
@with_and_without_penalty
def test_found_inf_leaves_everything(penalty: str | None, kind: str) -> None:
    found_inf = torch.tensor(1.0, device=DEVICE)
    step = make_step(kind, some_weights()[1:], found_inf=found_inf).watch(penalty, 2)
    # Numbers that no weights have, and that nothing may gather anew.
    step.statistics.mul_(1.25)
    step.partials.mul_(1.5)
    before = step.in_float64()
    step.gradients[0].fill_(torch.inf)
    step.run()
    for changed, kept in zip(
        [*step.weights, *chain(*step.states), *step.steps, step.statistics, step.partials],
        [*before.weights, *chain(*before.states), *before.steps, before.statistics, before.partials],
        strict=True,
    ):
        assert torch.equal(changed.cpu().double(), kept)


def test_nan_and_infinity_reach_the_weights_that_they_belong_to() -> None:
    step = make_step("amsgrad", [randn(40, device=DEVICE), randn(40, device=DEVICE)]).watch("soft_min_max", 2)
    step.gradients[0][3] = torch.nan
    step.run()
    assert step.weights[0].isnan().nonzero().tolist() == [[3]]
    assert step.states[2][0].isnan().nonzero().tolist() == [[3]]
    assert not step.weights[1].isnan().any()
    assert step.statistics[0, 2:].isnan().all()
    assert step.statistics[1].isfinite().all()


def test_subnormal_second_moments() -> None:
    """Squares of small gradients are subnormal in float32, their roots are not."""
    step = make_step("adamw", [randn(100, device=DEVICE)], settings={"eps": 0.0, "beta1": 0.0, "beta2": 0.0})
    step.gradients[0] = torch.linspace(1e-20, 2e-20, 100, device=DEVICE)
    step.states[0][0].zero_()
    check(step)


# Lists, chunks, alignment


@in_small_chunks
@pytest.mark.parametrize(("penalty", "count"), [(None, 300), ("linf", 20), ("margin", 30), ("soft_min_max", 15)])
def test_many_tiny_tensors(penalty: str | None, count: int) -> None:
    weights = [randn(1 + index % 5, device=DEVICE) for index in range(count)]
    check(make_step("momentum", weights).watch(penalty, 2 * count // 3))


@each_penalty
def test_several_whole_chunks(penalty: str) -> None:
    check(make_step("adamw", [randn(3 * CHUNK_SIZE, device=DEVICE), randn(5, device=DEVICE)]).watch(penalty, 2))


@pytest.mark.parametrize("empty", [(0,), (1,), (2,), (0, 1, 2)])
@with_and_without_penalty
def test_empty_tensors(penalty: str | None, empty: tuple[int, ...]) -> None:
    weights = [randn(0 if index in empty else 20, device=DEVICE) for index in range(3)]
    step = make_step("adamw", weights).watch(penalty, 2)
    check(step)
    assert [count.item() for count in step.steps] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("array", ["weight", "gradient", "first", "second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_array_of_a_full_chunk_is_not_aligned(array: str, dtype: torch.dtype) -> None:
    step = make_step("adamw", [randn(CHUNK_SIZE, dtype=dtype, device=DEVICE)]).watch("margin", 1)
    lists = {"weight": step.weights, "gradient": step.gradients, "first": step.states[0], "second": step.states[1]}
    lists[array][0] = with_offset(lists[array][0], 3)
    check(step)


@with_and_without_penalty
def test_more_chunks_than_merge_at_a_time(penalty: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunks_of(128, monkeypatch)
    sizes = (1, 127, 128, 2 * 128, 9 * 128 + 1, 128 + 3)
    check(make_step("adamw", [randn(size, device=DEVICE) for size in sizes]).watch(penalty, 5))


@with_and_without_penalty
@pytest.mark.parametrize(("kind", "finish"), [("adamw", True), ("momentum", False)])
def test_two_launches_per_combination_of_dtypes(
    kind: str, finish: bool, penalty: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: Counter[str] = Counter()

    def count(kernel: Any, programs: int, arguments: Any, constants: Any) -> None:
        launches[kernel.__name__] += 1

    dtypes = (torch.float32, torch.bfloat16)
    weights = [randn(1 + 37 * index, dtype=dtypes[index % 2], device=DEVICE) for index in range(13)]
    step = make_step(kind, weights, torch.bfloat16).watch(penalty, 6)
    monkeypatch.setattr(operators, "launch", count)
    step.run()
    assert launches == {"step_chunks": 2} | ({"finish_tensors": 2} if finish or penalty else {})


# Tables


@in_small_chunks
@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_a_table_is_never_stale(kind: str) -> None:
    """Everything that may happen to tensors between two steps, each at first with the tables of the step before."""
    weights = [randn(300, device=DEVICE), randn(SMALL_CHUNK + 5, device=DEVICE), randn(40, 6, device=DEVICE)]
    step = make_step(kind, weights)

    def again() -> None:
        nonlocal step
        check(replace(step, penalty=None).watch("linf", 2))

    def arrays(index: int) -> list[Tensor]:
        return [step.weights[index], step.gradients[index], *(state[index] for state in step.states)]

    again()
    step.gradients[0] = randn(300, device=DEVICE)  # a gradient that was set to None and came back
    again()
    step.weights[0].data = randn(300, device=DEVICE)  # another address
    again()
    step.states[0][1] = randn(SMALL_CHUNK + 5, device=DEVICE)  # another state, as after load_state_dict
    again()
    for tensor in arrays(0):  # another size at the same address
        tensor.data = tensor.data[:200]
    again()
    for tensor in arrays(2):  # another shape, then other strides at the same address
        tensor.data = tensor.data.view(6, 40)
    again()
    for tensor in arrays(2):
        tensor.data = tensor.data.view(40, 6).t()
    again()
    step.gradients[0] = step.gradients[0].view(torch.bfloat16)[:200]  # another dtype at the same address
    step.gradients[0].copy_(randn(200))
    again()
    if step.steps:
        step.steps[1] = torch.tensor(7.0, device=DEVICE)
    else:
        step.started = [1, 1, 1]
    again()


@in_small_chunks
def test_the_tables_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step("adamw", some_weights()[1:3]).watch("linf", 1)
    step.run()

    def fail(*arguments: Any) -> None:
        raise AssertionError("a table is built again")

    monkeypatch.setattr(step_table, "StepTable", fail)
    monkeypatch.setattr(step_table, "GradientTable", fail)
    step.lr, step.settings = 0.01, {"beta1": 0.8}
    step.run()


# Stochastic rounding


@in_small_chunks
@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_rounding_is_reproducible(kind: str) -> None:
    results = []
    for seed in (5, 5, 2**61 + 3):
        torch.manual_seed(0)
        step = make_step(kind, some_weights(torch.bfloat16), rounding_seed=seed).watch("linf", 3)
        step.run()
        check_statistics(step)
        results.append([*step.weights, *chain(*step.states)])
    assert all(map(torch.equal, results[0], results[1]))
    differs = [(a != b).double().mean().item() for a, b in zip(results[0], results[2], strict=True) if a.numel() > 9]
    assert all(0.02 < share < 0.7 for share in differs)


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    size = 2 * CHUNK_SIZE
    weights = [torch.full((size,), sign, dtype=torch.bfloat16, device=DEVICE) for sign in (1.0, -1.0)]
    step = make_step("sgd", weights, lr=1.0, settings={"weight_decay": 0.0}, rounding_seed=11)
    step.gradients = [torch.full_like(weight, 2.0**-12) * weight for weight in weights]
    step.run()
    # To 1 - 2^-12 from below 1, where bfloat16 is spaced 2^-8, is a chance of 1/16 to go down.
    for weight, sign in zip(step.weights, (1.0, -1.0), strict=True):
        assert set(weight.unique().tolist()) == {sign, sign * (1 - 2**-8)}
        share = (weight != sign).double().mean().item()
        assert abs(share - 1 / 16) < 5 * (1 / 16 * 15 / 16 / size) ** 0.5
        firsts, seconds = (weight != sign).view(2, -1)
        assert not torch.equal(firsts, seconds)
    assert not torch.equal(step.weights[0] != 1, step.weights[1] != -1)


def test_stochastic_rounding_has_the_bits_of_the_cpu() -> None:
    """Where the numbers before rounding are exact, as here, both backends store the same."""
    require("cpu")
    weights = [randn(size, dtype=torch.bfloat16) for size in (CHUNK_SIZE + 7, 1, 500)]
    gradients = [torch.full_like(weight, 2.0**-9) for weight in weights]
    options = {"lr": 1.0, "rounding_seed": 2**40 + 1, "settings": {"weight_decay": 0.0}}
    here = make_step("sgd", [weight.to(DEVICE, copy=True) for weight in weights], **options)
    here.gradients = [gradient.to(DEVICE) for gradient in gradients]
    here.run()
    there = replace(here, weights=[weight.clone() for weight in weights], gradients=gradients)
    empty = torch.empty(0, 0, dtype=torch.float64)
    there.statistics, there.partials, there.coefficients = empty, empty.view(0), empty.view(0)
    there.run(Cpu())
    for ours, theirs in zip(here.weights, there.weights, strict=True):
        assert torch.equal(ours.cpu(), theirs)


class Cpu:
    """The operators of the CPU backend."""

    def __getattr__(self, name: str) -> Any:
        return ops.kernel_of("cpu", name, torch.device("cpu"))


def test_infinity_and_nan_are_not_rounded_to_numbers() -> None:
    weight = randn(64, dtype=torch.bfloat16, device=DEVICE)
    weight[0], weight[1], weight[2] = torch.inf, -torch.inf, torch.nan
    step = make_step("adamw", [weight], rounding_seed=1)
    step.run()
    assert weight[:2].tolist() == [torch.inf, -torch.inf]
    assert weight.isnan().nonzero().tolist() == [[2]]


# Whole optimizers


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {"lr": 0.01, "eps": 1e-3}),
    "AdamW-amsgrad": ("AdamW", {"lr": 0.01, "eps": 1e-3, "amsgrad": True, "maximize": True}),
    "SGD": ("SGD", {"lr": 0.05}),
    "SGD-nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD-dampening": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
}


@each_penalty
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_equal_those_of_torch(optimizer: str, penalty: str) -> None:
    """Two steps equal two steps of ``torch.optim``'s with the reference penalty added to the loss."""
    name, options = OPTIMIZERS[optimizer]
    models, losses = [], []
    for is_ours in (True, False):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).to(DEVICE)
        inputs, targets = torch.randn(16, 20).to(DEVICE), torch.randn(16, 5).to(DEVICE)
        with use_backend("triton"):
            reg = RangeRegularizer(model, penalty, strength=0.05)
        own = reg.own_parameter()
        if is_ours:
            stepper = getattr(r2_kernels.optim, name)(model.parameters(), regularizer=reg, **options)
        else:
            groups = [{"params": list(model.parameters())}]
            groups += [] if own is None else [{"params": [own], "weight_decay": 0.0}]
            stepper = getattr(torch.optim, name)(groups, **options)
        for _ in range(2):
            stepper.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            if not is_ours:
                loss = loss + 0.05 * call_reference(penalty, reg.weights(), own).sum()
            loss.backward()
            with use_backend("triton"):
                stepper.step()
        models.append([*model.parameters(), *([] if own is None else [own])])
        with use_backend("triton"):
            losses.append(torch.stack(list(reg.losses().values())))
    for ours, theirs in zip(*models, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


# Bad input, said before anything is touched


def _with(**changes: Any) -> Step:
    return replace(make_step("adamw", [randn(4, 3, device=DEVICE), randn(5, device=DEVICE)]), **changes)


def test_bad_lists() -> None:
    step = _with()
    cases: list[tuple[Step, str]] = [
        (replace(step, weights=[]), "steps: expected 0 tensors"),
        (replace(step, gradients=step.gradients[:1]), "gradients: expected 2 tensors"),
        (replace(step, steps=step.steps[:1]), "steps: expected 2 tensors"),
        (replace(step, states=[step.states[0], step.states[1][:1]]), "exp_avg_sqs: expected 2 tensors"),
        (
            replace(step, gradients=[step.gradients[0].t().contiguous().t(), step.gradients[1]]),
            r"gradients\[0\]: expected shape \(4, 3\) and strides \(3, 1\) of its weight",
        ),
        (
            replace(step, states=[step.states[0], [step.states[1][0], step.states[1][1].double()]]),
            r"exp_avg_sqs\[1\]: expected torch.float32 of exp_avgs, got torch.float64",
        ),
        (
            replace(step, gradients=[step.gradients[0], step.gradients[1].int()]),
            r"gradients\[1\]: expected dtype float32, bfloat16, float16 or float64, got torch.int32",
        ),
        (
            replace(step, weights=[torch.zeros(4, 6, device=DEVICE)[:, ::2], step.weights[1]]),
            r"weights\[0\]: expected a dense layout",
        ),
        (replace(step, steps=[step.steps[0], step.steps[1].int()]), r"steps\[1\]: expected dtype float32"),
        (replace(step, steps=[torch.zeros(2, device=DEVICE), step.steps[1]]), r"steps\[0\]: expected one"),
        (replace(step, found_inf=torch.zeros(2, device=DEVICE)), "found_inf: expected one number"),
        (replace(step, penalty="linf"), r"statistics: expected shape \(W, S\)"),
    ]
    before = step.in_float64()
    for bad, message in cases:
        with pytest.raises(RuntimeError, match=message):
            bad.run()
    for weight, kept in zip(step.weights, before.weights, strict=True):
        assert torch.equal(weight.cpu().double(), kept)


def test_bad_statistics() -> None:
    step = _with().watch("soft_min_max", 2)
    cases: list[tuple[Step, str]] = [
        (replace(step, statistics=step.statistics[:1]), "coefficients: expected a tensor of shape"),
        (replace(step, statistics=step.statistics[:, :3]), "statistics: expected shape"),
        (replace(step, statistics=step.statistics.float()), "statistics: expected a float64 tensor"),
        (replace(step, next_parameter=None), "next_parameter: expected a tensor"),
        (replace(step, penalty=None), "statistics: expected shape"),
        (replace(step, statistics=step.statistics.t().contiguous().t()), "statistics: expected a contig"),
    ]
    for bad, message in cases:
        with pytest.raises(RuntimeError, match=message):
            bad.run()
    with pytest.raises(RuntimeError, match="partials: expected shape"):
        replace(_with().watch("linf", 2), partials=step.partials).run()


# CUDA graphs


@needs_gpu
@each_penalty
def test_a_captured_step_replays(penalty: str) -> None:
    step = make_step("adamw", some_weights()).watch(penalty, 3)
    twin = make_step("adamw", some_weights()).watch(penalty, 3)
    for mine, other in zip(
        [*step.weights, *step.gradients, *chain(*step.states), *step.steps, step.statistics, step.partials],
        [*twin.weights, *twin.gradients, *chain(*twin.states), *twin.steps, twin.statistics, twin.partials],
        strict=True,
    ):
        other.copy_(mine)
    twin = replace(twin, parameter=step.parameter, next_parameter=step.next_parameter)
    step.run()
    twin.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    graph.replay()
    twin.run()
    assert all(map(torch.equal, step.weights, twin.weights))
    assert torch.equal(step.statistics, twin.statistics)


@needs_gpu
@each_penalty
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_synchronizes(kind: str, penalty: str) -> None:
    step = make_step(kind, some_weights(), found_inf=torch.tensor(0.0, device=DEVICE)).watch(penalty, 3)
    step.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
