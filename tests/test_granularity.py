"""Segments that are channels or groups: what they are, and all that holds of whole weights, for each of them.

The judge cuts the weights itself, with indices and slices, and asks the specification for one value per piece.
"""

from __future__ import annotations

import pytest
import torch
from conftest import IS_INTERPRETED
from oracle import PARAMETERS, PENALTIES, Expected, default_parameter, expected
from tensors import DTYPES, LAYOUTS, leaves, randn, tied, with_offset
from tolerances import assert_gradient, assert_parameter_gradient, assert_values
from torch import Tensor, nn

import r2_kernels
from r2_kernels import RangeRegularizer, ops, optim, reference
from r2_kernels.granularity import Granularity, group_size_of, segment_counts
from r2_kernels.penalties import CHUNK_SIZE

GRANULARITIES: tuple[Granularity, ...] = ("channel", 1, 32, 128)
INTERPRETED = ("channel", 32)  # interpreted kernels take seconds a call
each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
each_parametric_penalty = pytest.mark.parametrize("penalty", [name for name in PENALTIES if PARAMETERS[name]])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_granularity = pytest.mark.parametrize("granularity", INTERPRETED if IS_INTERPRETED else GRANULARITIES)


def pieces(weight: Tensor, granularity: Granularity) -> list[Tensor]:
    """The segments of a weight, as the documentation has it."""
    if granularity == "tensor" or weight.numel() == 0:
        return [weight.reshape(-1)]
    channels = [weight[index].reshape(-1) for index in range(len(weight))] if weight.ndim >= 2 else [weight.reshape(-1)]
    if granularity == "channel":
        return channels
    return [
        channel[start : start + granularity] for channel in channels for start in range(0, len(channel), granularity)
    ]


def call(penalty: str, weights: list[Tensor], parameter: Tensor | None, granularity: Granularity) -> Tensor:
    arguments = [weights] if parameter is None else [weights, parameter]
    return getattr(r2_kernels, penalty)(*arguments, granularity=granularity)


def check(
    penalty: str,
    weights: list[Tensor],
    granularity: Granularity,
    parameter: Tensor | None = None,
    *,
    shared: bool = False,
    frozen: tuple[int, ...] = (),
) -> None:
    """Values and all gradients, every segment with an upstream gradient of its own, through every operator."""
    device = weights[0].device
    cut = [pieces(weight.detach(), granularity) for weight in weights]
    counts = [len(of_weight) for of_weight in cut]
    assert segment_counts(weights, granularity) == counts
    flat = [piece for of_weight in cut for piece in of_weight]
    owner = torch.tensor([index for index, count in enumerate(counts) for _ in range(count)])
    if parameter is None:
        parameter = default_parameter(penalty, weights if shared else flat)
        if penalty == "soft_min_max":
            parameter.clamp_(max=50)  # of a single entry near 0 it would be so high that exp(-a) is subnormal
    if parameter is not None:
        parameter = parameter.to(device).requires_grad_()
    own = parameter.detach()[owner] if shared and parameter is not None else parameter
    coefficients = torch.rand(len(flat)) + 0.5
    wanted = expected(penalty, flat, own, coefficients)

    weights = [weight.detach().requires_grad_(index not in frozen) for index, weight in enumerate(weights)]
    values = call(penalty, weights, parameter, granularity)
    values.backward(coefficients.to(device, values.dtype))
    assert_values(values.detach(), wanted.values, flat, wanted.value_scales)
    assert all(weights[index].grad is None for index in frozen)
    _assert_gradients([weight.grad for weight in weights], wanted, counts, granularity)
    slopes, scales = wanted.parameter_gradient, wanted.parameter_scales
    if parameter is not None:
        if shared:
            slopes, scales = (torch.zeros(len(weights)).double().index_add_(0, owner, x) for x in (slopes, scales))
        assert_parameter_gradient(parameter.grad, slopes, scales)

    scalars = None if parameter is None else parameter.detach()
    added = [torch.zeros_like(weight) for weight in weights]
    own_values, own_slopes = ops.kernel("reduce_apply_", device)(
        penalty, weights, scalars, coefficients.to(device), added, group_size_of(granularity)
    )
    assert_values(own_values, wanted.values, flat, wanted.value_scales)
    _assert_gradients(added, wanted, counts, granularity)
    if parameter is not None:
        assert_parameter_gradient(own_slopes.float(), wanted.parameter_gradient / coefficients, wanted.parameter_scales)


def _assert_gradients(
    gradients: list[Tensor | None], wanted: Expected, counts: list[int], granularity: Granularity
) -> None:
    start = 0
    for gradient, count in zip(gradients, counts, strict=True):
        if gradient is not None:
            for index, piece in enumerate(pieces(gradient, granularity), start):
                right, noise = wanted.gradients[index], wanted.noises[index]
                assert_gradient(piece, right, index=index, coefficient=1.5, noise=noise)
        start += count


def matrices(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Channels shorter and longer than a vector, groups that divide them and that do not, vectors, a scalar."""
    shapes = [(3, 160), (5, 64), (2, 130), (4, 3, 3, 3), (7, 1), (1, 50), (9,), (), (6, 33), (40, 9)]
    return [
        randn(*shape, dtype=dtype, device=device) if shape else randn(1, dtype=dtype, device=device).reshape(())
        for shape in shapes
    ]


# What a segment is


def test_the_segments_of_a_matrix() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5, 4.0], [-9.0, 0.0, 1.0, 7.0, -1.0]])
    for function in (r2_kernels.linf, reference.linf):
        assert function([weight, weight[0]], granularity="tensor").tolist() == [9, 4]
        assert function([weight, weight[0]], granularity="channel").tolist() == [4, 9, 4]
        assert function([weight, weight[0]], granularity=2).tolist() == [2, 3, 4, 9, 7, 1, 2, 3, 4]
        assert function([weight, weight[0]], granularity=5).tolist() == [4, 9, 4]
        assert function([weight, weight[0]], granularity=1000).tolist() == [4, 9, 4]


def test_groups_run_along_the_inputs_whatever_the_layout() -> None:
    """A convolution's (inputs, kernel) in the order of its indices, also where memory has the kernel outside."""
    weight = torch.arange(16.0).reshape(1, 4, 2, 2)
    for layout in (weight, weight.to(memory_format=torch.channels_last)):
        assert r2_kernels.linf([layout], granularity=4).tolist() == [3, 7, 11, 15]


def test_counts_split_the_values_by_weight() -> None:
    weights = [randn(3, 70), randn(5), randn(2, 4, 3, 3)]
    assert segment_counts(weights, "tensor") == [1, 1, 1]
    assert segment_counts(weights, "channel") == [3, 1, 2]
    assert segment_counts(weights, 32) == [9, 1, 4]
    parts = r2_kernels.linf(weights, granularity=32).split(segment_counts(weights, 32))
    assert [len(part) for part in parts] == [9, 1, 4]
    assert parts[2].amax() == weights[2].abs().amax()


@pytest.mark.parametrize("wrong", [0, -1, -128, "row", "Tensor", ""], ids=repr)
def test_an_unknown_granularity(wrong: Granularity) -> None:
    for use in (r2_kernels.linf, reference.linf):
        with pytest.raises(ValueError, match="granularity: expected 'tensor', 'channel' or the size of a group"):
            use([randn(3, 4)], granularity=wrong)
    with pytest.raises(ValueError, match="granularity"):
        RangeRegularizer(nn.Linear(2, 2), "linf", granularity=wrong)


@pytest.mark.parametrize("wrong", [None, 1.5, True, [32]], ids=repr)
def test_a_granularity_of_another_type(wrong: Granularity) -> None:
    with pytest.raises(TypeError, match="granularity"):
        r2_kernels.linf([randn(3, 4)], granularity=wrong)


@each_parametric_penalty
@pytest.mark.parametrize("count", [1, 3, 11])
def test_a_parameter_of_the_wrong_length(backend: str, device: torch.device, penalty: str, count: int) -> None:
    weights = [randn(3, 64, device=device), randn(2, 64, device=device)]
    with pytest.raises(ValueError, match=r"expected shape \(2,\), one entry per weight, or \(10,\), one per segment"):
        call(penalty, weights, torch.ones(count, device=device), 32)
    if backend != "reference":
        with pytest.raises(RuntimeError, match="parameter"):
            ops.kernel("reduce", device)(penalty, weights, torch.ones(count, device=device), 32)


# The reference


@each_penalty
@each_granularity
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_gradients_by_finite_differences(penalty: str, granularity: Granularity, shared: bool) -> None:
    weights = leaves([randn(3, 7, dtype=torch.float64), randn(2, 3, 2, 2, dtype=torch.float64)])
    count = 2 if shared else sum(segment_counts(weights, granularity))
    own = [] if PARAMETERS[penalty] is None else leaves([torch.rand(count, dtype=torch.float64) + 0.2])

    def function(*inputs: Tensor) -> Tensor:
        return call(penalty, list(inputs[:2]), inputs[2] if own else None, granularity)

    def specified(*inputs: Tensor) -> Tensor:
        return getattr(reference, penalty)(list(inputs[:2]), *inputs[2:], granularity=granularity)

    assert torch.autograd.gradcheck(function, (*weights, *own))
    assert torch.autograd.gradcheck(specified, (*weights, *own))
    torch.testing.assert_close(function(*weights, *own), specified(*weights, *own), rtol=1e-12, atol=0)


# Every backend


@each_penalty
@each_dtype
@each_granularity
def test_shapes(backend: str, device: torch.device, penalty: str, dtype: torch.dtype, granularity: Granularity) -> None:
    check(penalty, matrices(dtype, device), granularity)


@each_parametric_penalty
@each_granularity
def test_a_parameter_that_segments_share(
    backend: str, device: torch.device, penalty: str, granularity: Granularity
) -> None:
    check(penalty, matrices(torch.float32, device), granularity, shared=True)
    check(penalty, matrices(torch.float32, device), granularity, shared=True, frozen=(0, 2, 3))


@each_penalty
def test_frozen_weights(backend: str, device: torch.device, penalty: str) -> None:
    check(penalty, matrices(torch.float32, device), 32, frozen=(1, 4, 9))


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, device: torch.device, penalty: str, dtype: torch.dtype, layout: str) -> None:
    weights = [randn(4, 40, dtype=dtype, device=device), LAYOUTS[layout](dtype, device)]
    check(penalty, weights, "channel")
    if not IS_INTERPRETED:
        check(penalty, weights, 8)


@pytest.mark.large
@each_penalty
@each_dtype
def test_segments_around_the_chunk(backend: str, device: torch.device, penalty: str, dtype: torch.dtype) -> None:
    """Some are parts of a chunk, some are cut into chunks, in one list."""
    sizes = (CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 5, 100)
    weights = [randn(3, size, dtype=dtype, device=device) for size in sizes]
    check(penalty, weights, "channel")
    check(penalty, weights, CHUNK_SIZE + 3)
    check(penalty, weights, CHUNK_SIZE // 3)


@pytest.mark.large
@each_penalty
@each_dtype
def test_nothing_outside_a_tensor_is_read_or_written(
    backend: str, device: torch.device, penalty: str, dtype: torch.dtype
) -> None:
    for granularity in ("channel", 7, 16, 64):
        for shape in [(1, 1), (3, 5), (2, 16), (17, 16), (3, 200)]:
            size = shape[0] * shape[1]
            storages = [torch.full((size + 70,), 1000.0, dtype=dtype, device=device) for _ in range(2)]
            weight, gradient = (storage[3 : 3 + size].view(shape) for storage in storages)
            weight.copy_(randn(*shape, dtype=dtype, device=device))
            gradient.zero_()
            cut = pieces(weight, granularity)
            parameter = default_parameter(penalty, cut)
            ones = torch.ones(len(cut), device=device)
            values, _ = ops.kernel("reduce_apply_", device)(
                penalty, [weight], parameter, ones, [gradient], group_size_of(granularity)
            )
            wanted = expected(penalty, cut, parameter)
            assert_values(values, wanted.values, cut, wanted.value_scales)
            _assert_gradients([gradient], wanted, [len(cut)], granularity)
            for storage in storages:
                assert bool((storage[:3] == 1000).all())
                assert bool((storage[3 + size :] == 1000).all())


@each_penalty
@pytest.mark.parametrize("granularity", ["channel", 8])
def test_gradients_in_other_layouts_than_their_weights(
    backend: str, device: torch.device, penalty: str, granularity: Granularity
) -> None:
    channels_last = torch.channels_last
    pairs = [
        (randn(30, 40), 0.1 * randn(40, 30).t()),
        (randn(30, 40).t(), 0.1 * randn(40, 30)),
        (randn(6, 5, 3, 3), (0.1 * randn(6, 5, 3, 3)).to(memory_format=channels_last)),
        (randn(6, 5, 3, 3).to(memory_format=channels_last), 0.1 * randn(6, 5, 3, 3)),
        (randn(30, 40), 0.1 * randn(30, 80)[:, ::2]),
        (randn(30, 80)[:, 1::2], 0.1 * randn(30, 40)),
        (randn(5).expand(7, 5), 0.1 * randn(7, 5)),
        (randn(3, 9), with_offset(0.1 * randn(3, 9), 1)),
    ]
    weights, gradients = ([tensor.to(device) for tensor in tensors] for tensors in zip(*pairs, strict=True))
    before = [gradient.clone() for gradient in gradients]
    strides = [gradient.stride() for gradient in gradients]
    cut = [piece for weight in weights for piece in pieces(weight, granularity)]
    parameter = default_parameter(penalty, cut)
    coefficients = torch.linspace(0.5, 1.5, len(weights), device=device)  # one per weight
    size = group_size_of(granularity)
    for operator in ("reduce_apply_", "apply_"):
        outputs = [torch.empty_strided(g.shape, g.stride(), device=device).copy_(g) for g in before]
        if operator == "apply_":
            _, _, statistics, partials = ops.kernel("reduce", device)(penalty, weights, parameter, size)
            ops.kernel("apply_", device)(penalty, weights, parameter, statistics, partials, coefficients, outputs, size)
        else:
            ops.kernel("reduce_apply_", device)(penalty, weights, parameter, coefficients, outputs, size)
        counts = segment_counts(weights, granularity)
        spread = coefficients.cpu().repeat_interleave(torch.tensor(counts))
        exact = expected(penalty, cut, parameter, spread)
        wanted = zip(exact.gradients, exact.noises, strict=True)
        for output, old, stride in zip(outputs, before, strides, strict=True):
            assert output.stride() == stride
            for piece, was in zip(pieces(output, granularity), pieces(old, granularity), strict=True):
                right, noise = next(wanted)
                assert_gradient(piece, right, before=was, coefficient=1.5, noise=noise)


@pytest.mark.large
@each_penalty
@each_dtype
@each_granularity
def test_ties_and_constants(
    backend: str, device: torch.device, penalty: str, dtype: torch.dtype, granularity: Granularity
) -> None:
    weights = [tied(dtype, device, 640).view(4, 160), tied(dtype, device, 60).view(20, 3)]
    weights += [torch.full((3, 70), value, dtype=dtype, device=device) for value in (0.0, -0.0, -0.37)]
    check(penalty, weights, granularity)


SPANS = (1e-6, 1e-4, 1e-2, 0.1, 0.5, 0.99, 1.01, 2.0, 5.0, 20.0, 59.0, 61.0, 80.0, 180.0, 1e3, 1e5)


@each_dtype
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("size", [100] if IS_INTERPRETED else [3, 32, 100])
def test_temperatures_by_span(backend: str, device: torch.device, dtype: torch.dtype, sign: int, size: int) -> None:
    """|a|·(max w - min w) from 1e-6 to 1e5: runs of channels with nearly the same, and all of them mixed."""
    count = 4 if IS_INTERPRETED else 20
    near = randn(len(SPANS) * count, size, dtype=dtype, device=device)
    extents = near.cpu().double().amax(1) - near.cpu().double().amin(1)
    for spans in (torch.tensor(SPANS).repeat_interleave(count), torch.tensor(SPANS).repeat(count)):
        temperature = (sign * spans.double() / extents).float()
        if sign < 0:  # exp(-a) stays finite
            temperature.clamp_(min=-80)
        check("soft_min_max", [near], "channel", temperature)


@each_penalty
@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e-6, 1e6, 1e20, 1e35])
def test_magnitudes(backend: str, device: torch.device, penalty: str, scale: float) -> None:
    """Groups of any magnitude, and among others of the usual one."""
    weights = [scale * randn(5, 64, device=device), randn(40, 64, device=device)]
    weights[1][::7] *= scale
    if penalty == "soft_min_max":
        flat = [piece for weight in weights for piece in pieces(weight, 32)]
        extents = torch.stack([piece.cpu().double().amax() - piece.cpu().double().amin() for piece in flat])
        check(penalty, weights, 32, (3 / extents).float())
    else:
        check(penalty, weights, 32)


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_entry_stays_in_its_segment(
    backend: str, device: torch.device, penalty: str, dtype: torch.dtype, bad: float
) -> None:
    """In every position of a segment, with others around it that have none."""
    for size in (3, 16, 33, 40):
        weight = randn(2 * size + 1, size, dtype=dtype, device=device)
        clean = weight[::2].clone()
        for position in range(size):
            weight[2 * position + 1, position] = bad
        weights = leaves([weight])
        parameter = default_parameter(penalty, list(clean))
        if parameter is not None:
            parameter = parameter.repeat_interleave(2)[:-1]
        values = call(penalty, weights, parameter, "channel")
        values.sum().backward()
        spoiled = values.detach()[1::2]
        assert spoiled.isnan().all() if bad != bad or penalty in ("soft_min_max", "kurtosis") else spoiled.isinf().all()
        wanted = expected(penalty, list(clean), None if parameter is None else parameter[::2])
        assert_values(values.detach()[::2], wanted.values, list(clean), wanted.value_scales)
        for gradient, right, noise in zip(weights[0].grad[::2], wanted.gradients, wanted.noises, strict=True):
            assert_gradient(gradient, right, noise=noise)


@each_penalty
@pytest.mark.parametrize("operator", ["apply", "reduce_apply_"])
def test_empty_weights(backend: str, device: torch.device, penalty: str, operator: str) -> None:
    """Each is one empty segment, also where there is no channel, or none with an entry."""
    weights = [randn(*shape, device=device) for shape in [(0, 4), (3, 5), (3, 0), (0,), (2, 4)]]
    for granularity, counts in (("channel", [1, 3, 1, 1, 2]), (2, [1, 9, 1, 1, 4])):
        assert segment_counts(weights, granularity) == counts
        parameter = None if PARAMETERS[penalty] is None else torch.ones(sum(counts), device=device)
        coefficients = torch.ones(sum(counts), device=device)
        size = group_size_of(granularity)
        values, _, statistics, partials = ops.kernel("reduce", device)(penalty, weights, parameter, size)
        assert values.shape == (sum(counts),)
        if operator == "apply":
            gradients = ops.kernel("apply", device)(
                penalty, weights, parameter, statistics, partials, coefficients, size
            )
        else:
            gradients = [torch.zeros_like(weight) for weight in weights]
            ops.kernel("reduce_apply_", device)(penalty, weights, parameter, coefficients, gradients, size)
        full = [piece for index in (1, 4) for piece in pieces(weights[index], granularity)]
        wanted = expected(
            penalty, full, default_parameter(penalty, full) if parameter is None else parameter[: len(full)]
        )
        _assert_gradients([gradients[1], gradients[4]], wanted, [counts[1], counts[4]], granularity)
        assert [gradient.shape for gradient in gradients] == [weight.shape for weight in weights]


# Operators and threads of the CPU backend


@each_penalty
@pytest.mark.parametrize("operator", [name for name in ops.SCHEMAS if name != "finalize"])
@pytest.mark.usefixtures("cpu_backend")
def test_opcheck(operator: str, penalty: str) -> None:
    weights = [
        randn(3, 40),
        randn(4, 5).t(),
        randn(2, 4, 2, 2).to(memory_format=torch.channels_last),
        randn(7, dtype=torch.bfloat16),
    ]
    for size in (-1, 8):
        count = sum(segment_counts(weights, "channel" if size < 0 else size))
        parameter = None if PARAMETERS[penalty] is None else torch.linspace(0.3, 0.6, count)
        _, _, statistics, partials = torch.ops.r2_kernels.reduce(penalty, weights, parameter, size)
        coefficients = torch.linspace(0.5, 1.5, count)
        gradients = [torch.zeros_like(weight) for weight in weights]
        arguments = {
            "reduce": (),
            "apply": (statistics, partials, coefficients),
            "apply_": (statistics, partials, coefficients, gradients),
            "reduce_apply_": (coefficients, gradients),
        }[operator]
        overload = getattr(torch.ops.r2_kernels, operator).default
        torch.library.opcheck(overload, (penalty, weights, parameter, *arguments, size))


@each_penalty
@each_granularity
@pytest.mark.usefixtures("cpu_backend", "restored_threads")
def test_any_number_of_threads(penalty: str, granularity: Granularity) -> None:
    """Bit for bit the same."""
    weights = [randn(300, 130), randn(5, CHUNK_SIZE + 9), randn(64, 32, 3, 3), randn(1000)]
    size = group_size_of(granularity)
    cut = segment_counts(weights, granularity)
    parameter = None if PARAMETERS[penalty] is None else torch.rand(sum(cut)) + 0.5
    coefficients = torch.rand(sum(cut))
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        reduced = ops.kernel("reduce", torch.device("cpu"))(penalty, weights, parameter, size)
        fresh = ops.kernel("apply", torch.device("cpu"))(penalty, weights, parameter, *reduced[2:], coefficients, size)
        fused = [torch.full_like(weight, 0.25) for weight in weights]
        values = ops.kernel("reduce_apply_", torch.device("cpu"))(
            penalty, weights, parameter, coefficients, fused, size
        )
        results.append([*reduced, *fresh, *values, *fused])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


# The regularizer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3)
        self.hidden = nn.Linear(70, 5)
        self.head = nn.Linear(64, 3)


@each_penalty
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("granularity", ["channel", 32])
def test_the_regularizer(
    backend: str, device: torch.device, penalty: str, shared: bool, granularity: Granularity
) -> None:
    """reg() and add_gradients_() give the sum over the segments, times the strength of their layer."""
    if shared and PARAMETERS[penalty] is None:
        with pytest.raises(ValueError, match="shared: expected False"):
            RangeRegularizer(Model(), penalty, granularity=granularity, shared=True)
        return
    model = Model().to(device)
    strengths = [0.5, 2.0, 1.0]
    reg = RangeRegularizer(model, penalty, strength=strengths, granularity=granularity, shared=shared)
    weights = reg.weights()
    counts = segment_counts(weights, granularity)
    cut = [piece.detach() for weight in weights for piece in pieces(weight, granularity)]
    own = reg.own_parameter()
    owner = torch.tensor([index for index, count in enumerate(counts) for _ in range(count)])
    of_segments = None if own is None else own.detach()[owner] if shared else own
    coefficients = torch.tensor(strengths)[owner]
    wanted = expected(penalty, cut, of_segments, coefficients)
    total = (wanted.values * coefficients).sum()

    loss = reg()
    loss.backward()
    torch.testing.assert_close(loss.detach().cpu().double(), total, rtol=1e-5, atol=0)
    first = [parameter.grad.clone() for parameter in [*weights, *reg.parameters()]]
    for parameter in [*weights, *reg.parameters()]:
        parameter.grad = None
    torch.testing.assert_close(reg.add_gradients_().cpu().double(), total, rtol=1e-5, atol=0)
    _assert_gradients([weight.grad for weight in weights], wanted, counts, granularity)
    for parameter, gradient in zip([*weights, *reg.parameters()], first, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    if own is not None:
        slopes, scales = wanted.parameter_gradient, wanted.parameter_scales
        if shared:
            slopes, scales = (torch.zeros(3).double().index_add_(0, owner, x) for x in (slopes, scales))
        assert_parameter_gradient(own.grad, slopes, scales)
    by_layer = torch.zeros(3).double().index_add_(0, owner, wanted.values)
    losses = reg.losses()
    assert list(losses) == ["convolution.weight", "hidden.weight", "head.weight"]
    torch.testing.assert_close(torch.stack([*losses.values()]).cpu().double(), by_layer, rtol=1e-5, atol=0)


def test_margins_start_at_the_deviation_of_each_segment() -> None:
    model = Model()
    for granularity in ("channel", 32):
        own = RangeRegularizer(model, "margin", granularity=granularity).margin
        cut = [piece for weight in RangeRegularizer(model, "linf").weights() for piece in pieces(weight, granularity)]
        torch.testing.assert_close(own, 2 * torch.stack([piece.std(correction=0) for piece in cut]))
        shared = RangeRegularizer(model, "margin", granularity=granularity, shared=True).margin
        torch.testing.assert_close(shared, RangeRegularizer(model, "margin").margin)


def test_where_parameters_start() -> None:
    model = Model()
    assert RangeRegularizer(model, granularity=32).temperature.tolist() == pytest.approx([0.1] * 27)
    by_layer = RangeRegularizer(model, granularity="channel", temperature=[1, 2, 3]).temperature
    assert by_layer.tolist() == [1.0] * 6 + [2.0] * 5 + [3.0] * 3
    by_segment = RangeRegularizer(model, granularity="channel", temperature=list(range(14))).temperature
    assert by_segment.tolist() == list(range(14))
    assert RangeRegularizer(model, granularity=32, temperature=[1, 2, 3], shared=True).temperature.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"one per layer, shape \(3,\), or one per segment, shape \(14,\)"):
        RangeRegularizer(model, granularity="channel", temperature=[1, 2])


def test_the_report_has_the_mean_step_of_a_quantizer_per_segment() -> None:
    model = Model()
    reg = RangeRegularizer(model, "linf", granularity=32)
    for row, weight in zip(reg.report(), reg.weights(), strict=True):
        cut = pieces(weight.detach(), 32)
        assert row["segments"] == len(cut)
        largest = torch.stack([piece.abs().amax() for piece in cut])
        assert row["penalty"] == pytest.approx(largest.sum().item(), rel=1e-5)
        assert row["step 4 bit"] == pytest.approx(largest.mean().item() / 7, rel=1e-5)
        assert row["max"] == weight.amax().item()


def test_the_report_has_the_mean_temperature_of_a_layer() -> None:
    reg = RangeRegularizer(Model(), granularity="channel", temperature=list(range(14)))
    assert [row["temperature"] for row in reg.report()] == [2.5, 8.0, 12.0]


def test_a_layer_that_is_not_finite_is_named() -> None:
    model = Model()
    with torch.no_grad():
        model.hidden.weight[3, 40] = torch.nan
    reg = RangeRegularizer(model, granularity=32)
    with pytest.raises(FloatingPointError, match=r"for 'hidden.weight'$"):
        reg(check_finite=True)


def test_states_of_another_granularity_are_refused() -> None:
    model = Model()
    state = RangeRegularizer(model, "linf", granularity=32).state_dict()
    RangeRegularizer(model, "linf", granularity=32).load_state_dict(state)
    with pytest.raises(ValueError, match="expected the state of granularity 'channel', got 32"):
        RangeRegularizer(model, "linf", granularity="channel").load_state_dict(state)


def test_fused_optimizers_refuse_segments_before_anything_is_touched() -> None:
    model = Model()
    reg = RangeRegularizer(model, granularity=32)
    for optimizer in (optim.AdamW, optim.SGD):
        with pytest.raises(ValueError, match=r"regularizer: expected granularity 'tensor', got 32"):
            optimizer(model.parameters(), lr=0.1, regularizer=reg)


@pytest.mark.usefixtures("cpu_backend")
def test_training_with_groups_shrinks_their_ranges() -> None:
    model = nn.Linear(64, 8, bias=False)
    reg = RangeRegularizer(model, strength=0.01, granularity=32, temperature=20.0)
    optimizer = torch.optim.SGD([*model.parameters(), *reg.parameters()], lr=0.5)
    before = [row["step 4 bit"] for row in reg.report()]
    for _ in range(60):
        optimizer.zero_grad()
        reg.add_gradients_()
        optimizer.step()
    assert reg.report().rows[0]["step 4 bit"] < 0.8 * before[0]


@each_penalty
@pytest.mark.usefixtures("cpu_backend")
def test_under_torch_compile(penalty: str) -> None:
    model = Model()
    reg = RangeRegularizer(model, penalty, granularity=32)
    reg().backward()
    eager = [weight.grad.clone() for weight in reg.weights()]
    model.zero_grad()
    torch.compile(reg, backend="aot_eager", fullgraph=True)().backward()
    for weight, gradient in zip(reg.weights(), eager, strict=True):
        assert torch.equal(weight.grad, gradient)
