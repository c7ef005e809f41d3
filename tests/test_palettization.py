"""DKM: outputs, centroids and gradients against the specification by autograd, and against coremltools."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DTYPES, LAYOUTS, randn, with_offset
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from r2_kernels import dkm, dkm_ops, reference, use_backend
from r2_kernels.attention import HEAD_START

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 1023, 1025, 16385)
SPREAD = 0.05
# Relative to the largest: of outputs and centroids, and of gradients, in which distances over the temperature multiply
# what rounding leaves, in each iteration.
VALUES = {dtype: 1e-12 if dtype is torch.float64 else 2e-6 for dtype in DTYPES}
GRADIENTS = {dtype: 1e-9 if dtype is torch.float64 else 1e-4 for dtype in DTYPES}
# Of what is computed, half a unit in the last place.
ARITHMETIC = {dtype: 2**-53 if dtype is torch.float64 else 2**-24 for dtype in DTYPES}
# Of what is stored, half a unit in the last place.
STORAGE = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def evenly(clusters: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Over two standard deviations to either side."""
    return torch.linspace(-2 * SPREAD, 2 * SPREAD, clusters, dtype=torch.float64).to(dtype)


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (SPREAD * randn(*shape, dtype=torch.float64)).to(dtype)


def oracle(weight: Tensor, centroids: Tensor, upstream: Tensor, **options: float) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, centroids and the weight's gradient, by autograd in float64."""
    wide = weight.detach().double().requires_grad_()
    outputs, last = reference.dkm(wide, centroids.double(), **options)  # type: ignore[arg-type]
    outputs.backward(upstream.double())
    assert wide.grad is not None
    return outputs.detach(), last, wide.grad


def check(weight: Tensor, centroids: Tensor, **options: float) -> None:
    dtype = weight.dtype
    weight = weight.detach()
    upstream = randn(weight.numel(), dtype=dtype).reshape(weight.shape)
    leaf = weight.requires_grad_()
    outputs, last = dkm(leaf, centroids, **options)  # type: ignore[arg-type]
    outputs.backward(upstream)
    assert outputs.dtype is dtype
    assert outputs.shape == weight.shape
    assert last.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert not last.requires_grad
    assert leaf.grad is not None
    assert leaf.grad.dtype is dtype
    wanted, wanted_last, wanted_gradient = oracle(weight, centroids, upstream, **options)
    values = VALUES[dtype] + rounded_exponents(centroids, ARITHMETIC[dtype], options.get("temperature", 1e-4))
    assert_near(last, wanted_last, values, ARITHMETIC[dtype])
    assert_near(outputs.detach(), wanted, values, STORAGE[dtype])
    assert_near(leaf.grad, wanted_gradient, GRADIENTS[dtype], STORAGE[dtype])


def rounded_exponents(centroids: Tensor, rounding: float, temperature: float) -> float:
    """What outputs are off, as a share of the largest, where an entry lies between two centroids at the widest gap.

    Of its squared distances, (gap / 2)², both have two rounding errors of an entry's offset and one of the square, and
    the centroids one; together, over the temperature, gap² · rounding / temperature in the exponent. At p = 1/2 that
    moves the output by a quarter of it times the gap, and the largest output is half a gap or more.
    """
    gap = centroids.double().sort().values.diff().max().item() if len(centroids) > 1 else 0.0
    return rounding * gap**2 / temperature / 2


def assert_near(actual: Tensor, wanted: Tensor, share: float, rounding: float) -> None:
    torch.testing.assert_close(actual.double(), wanted, rtol=rounding, atol=share * wanted.abs().max().item())


def by_coremltools(weight: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and centroids of ``FakePalettize`` in training, as ``DKMPalettizer`` puts it at a layer."""
    palettization = pytest.importorskip("coremltools.optimize.torch.palettization")
    observer = torch.ao.quantization.MovingAverageMinMaxObserver.with_args(dtype=torch.qint8)
    module = palettization.FakePalettize(observer, n_bits=(len(centroids) - 1).bit_length(), cluster_dim=1)
    assert module.n_clusters == len(centroids)
    module.enable_fake_palett()
    module.create_partitions(weight.detach())
    module.centroids = [centroids.detach().clone()[:, None]]
    return module.train()(weight), module.centroids[0].flatten()


# ---- the same as coremltools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 50), (16, 1), (8, 3, 3, 3)])
@pytest.mark.parametrize("clusters", [2, 4, 16])
@pytest.mark.parametrize("spread", [0.002, 0.05, 1.0])
def test_the_same_as_coremltools(backend: str, shape: tuple[int, ...], clusters: int, spread: float) -> None:
    """Step after step, each from the centroids that the last has left."""
    weight = (spread * randn(*shape, dtype=torch.float64)).requires_grad_()
    mine = theirs = torch.linspace(-2 * spread, 2 * spread, clusters, dtype=torch.float64)
    for _ in range(3):
        upstream = randn(*shape, dtype=torch.float64)
        outputs, mine = dkm(weight, mine)
        (gradient,) = torch.autograd.grad(outputs, weight, upstream)
        wanted, theirs = by_coremltools(weight, theirs)
        (wanted_gradient,) = torch.autograd.grad(wanted, weight, upstream)
        # Their squared distances are differences of squares: by the time of the gradients 1e-16 is 1e-9.
        assert_near(mine, theirs, 1e-10, 0)
        assert_near(outputs.detach(), wanted.detach(), 1e-10, 0)
        assert_near(gradient, wanted_gradient, 1e-7, 0)


@pytest.mark.parametrize(
    "centroids",
    [
        [0.1, 0.1, -0.05, 0.0],
        [0.0, -0.1, 0.2, 0.2],
        [0.05, 0.05, 0.05, -0.1],
        [0.1, 0.1, 0.1, 0.1],
        [0.1, -0.1, 0.1, -0.1],
        [0.1, 0.1 + 1e-12, -0.1, 0.0],
    ],
)
def test_equal_centroids_part_as_in_coremltools(backend: str, centroids: list[float]) -> None:
    weight = weights(500, dtype=torch.float64)
    starts = torch.tensor(centroids, dtype=torch.float64)
    outputs, last = dkm(weight, starts)
    wanted, wanted_last = by_coremltools(weight.requires_grad_(), starts)
    assert_near(last, wanted_last, 1e-9, 0)
    assert_near(outputs, wanted.detach(), 1e-9, 0)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.05])
def test_constant_weights_as_in_coremltools(backend: str, value: float) -> None:
    """Distances of exactly zero, or all the same; a sum of zero is for coremltools no sum."""
    weight = torch.full((100,), value, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([0.0, 0.1], dtype=torch.float64)
    outputs, last = dkm(weight, starts)
    wanted, wanted_last = by_coremltools(weight, starts)
    torch.testing.assert_close(last, wanted_last, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(outputs, wanted, rtol=1e-10, atol=1e-14)


# ---- the same as the specification ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_dtype(backend: str, size: int, dtype: torch.dtype) -> None:
    check(weights(size, dtype=dtype), evenly(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clusters", [1, 2, 3, 5, 16, 17, 255, 256])
def test_every_number_of_clusters(backend: str, clusters: int, dtype: torch.dtype) -> None:
    check(weights(2100, dtype=dtype), evenly(clusters))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout(backend: str, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(LAYOUTS[layout](dtype, torch.device("cpu")), 20 * evenly(4), temperature=0.05)


@pytest.mark.parametrize("offset", range(1, 9))
def test_misaligned(backend: str, offset: int) -> None:
    check(with_offset(weights(1000, dtype=torch.bfloat16), offset), evenly(4))


def test_the_gradient_may_lie_in_another_order(backend: str) -> None:
    weight = weights(6, 5, 4, 3).to(memory_format=torch.channels_last).requires_grad_()
    upstream = randn(6, 5, 4, 3)
    outputs, _ = dkm(weight, evenly(4))
    outputs.backward(upstream)
    assert weight.grad is not None
    assert_near(weight.grad, oracle(weight, evenly(4), upstream)[2], 1e-4, 0)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 300),
    clusters=st.integers(1, 20),
    iterations=st.integers(1, 5),
    temperature=st.sampled_from([1e-4, 1e-3, 0.1, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_any_settings(size: int, clusters: int, iterations: int, temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    for name in ("reference", "cpu"):
        with use_backend(name):
            check(
                weights(size, dtype=torch.float64),
                SPREAD * randn(clusters, dtype=torch.float64),
                temperature=temperature,
                iterations=iterations,
            )


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_gradients_by_finite_differences(backend: str, iterations: int) -> None:
    weight = weights(40, dtype=torch.float64).requires_grad_()

    def outputs(entries: Tensor) -> Tensor:
        return dkm(entries, evenly(5, torch.float64), temperature=1e-3, iterations=iterations)[0]

    assert torch.autograd.gradcheck(outputs, weight)


# ---- single facts --------------------------------------------------------------------------------------------------


def forward(weight: Tensor, centroids: Tensor, iterations: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return dkm_ops.ops.kernel("dkm_forward", weight.device)(weight, centroids, 1e-4, iterations)


def test_settled_centroids_end_the_iterations(backend: str) -> None:
    """The second iteration is the first that may, so that there are two, whose outcome counts."""
    weight = torch.tensor([-0.1, 0.1] * 50) + torch.linspace(-1e-3, 1e-3, 100)
    _, history, totals = forward(weight, torch.tensor([-0.1, 0.1]), 5)
    assert (totals[:2] > 0).all()
    assert (totals[2:] == 0).all()
    assert torch.equal(history[2:], history[2].expand(4, 2))
    _, history, totals = forward(weight, torch.tensor([-0.2, 0.5]), 5)
    assert (totals[2] > 0).all()


def test_by_hand(backend: str) -> None:
    """One iteration, of entries halfway between two centroids: only centroid 0's head start tells them apart."""
    outputs, last = dkm(torch.full((8,), 0.5), torch.tensor([0.0, 1.0]), temperature=HEAD_START, iterations=1)
    torch.testing.assert_close(last, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(outputs, torch.full((8,), 0.5))
    weight, centroids = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.25, 0.75, 0, 0]], dtype=torch.float64)
    outputs, last = dkm(weight, centroids[:2], iterations=1)
    # Each centroid gets 2 of 1, and 2 of 1e-7.
    wanted = torch.tensor([1e-7, 1.0], dtype=torch.float64) / (1 + 1e-7)
    torch.testing.assert_close(last, wanted, rtol=1e-9, atol=0)
    low, high = wanted[0] + 1e-7 * wanted[1], wanted[1] + 1e-7 * wanted[0]
    torch.testing.assert_close(outputs, torch.stack([low, high, low, high]), rtol=1e-9, atol=0)


def test_a_head_start_of_centroid_0(backend: str) -> None:
    weight = torch.full((4,), 0.5, dtype=torch.float64)
    _, _, totals = forward(weight, torch.tensor([0.0, 1.0], dtype=torch.float64), 1)
    share = torch.sigmoid(torch.tensor(HEAD_START / 1e-4, dtype=torch.float64)).item()
    torch.testing.assert_close(totals, torch.tensor([[4 * share, 4 - 4 * share]], dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 99])
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_nan_or_an_infinity_is_everywhere(backend: str, bad: float, place: int, iterations: int) -> None:
    weight = weights(100)
    weight[place] = bad
    weight.requires_grad_()
    outputs, last = dkm(weight, evenly(4), iterations=iterations)
    assert outputs.isnan().all()
    assert last.isnan().all()
    outputs.backward(torch.ones(100))
    assert weight.grad is not None
    assert weight.grad.isnan().all()


def test_an_empty_weight(backend: str) -> None:
    weight = torch.empty(0, 3, requires_grad=True)
    outputs, last = dkm(weight, evenly(4))
    assert outputs.shape == (0, 3)
    assert torch.equal(last, evenly(4))
    outputs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_at_their_centroids_stay(backend: str, dtype: torch.dtype) -> None:
    levels = torch.tensor([-0.3, 0.1, 0.7], dtype=dtype)
    outputs, last = dkm(levels.repeat(50), levels)
    torch.testing.assert_close(last, levels, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs, levels.repeat(50), rtol=1e-6, atol=1e-6)


@pytest.mark.large
def test_the_same_for_any_number_of_threads(backend: str, restored_threads: None) -> None:
    weight, upstream = weights(100_001), randn(100_001)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        leaf = weight.clone().requires_grad_()
        outputs, last = dkm(leaf, evenly(4))
        outputs.backward(upstream)
        assert leaf.grad is not None
        results.append([outputs.detach(), last, leaf.grad])
    for result in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(result, results[0], strict=True))


def allocated(work: Callable[[], object]) -> int:
    """All bytes that torch's allocator gave out meanwhile, whether they came back or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    events = run.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_is_no_attention_matrix(cpu_backend: None, dtype: torch.dtype) -> None:
    """Outputs and gradients, and for 16 bits the latter in float32: a quarter or less of one matrix of 16 clusters."""
    weight = weights(300_000, dtype=dtype).requires_grad_()
    upstream = torch.ones_like(weight)
    assert allocated(lambda: dkm(weight, evenly(16))[0].backward(upstream)) < 300_000 * 16
    with use_backend("cpu"):
        assert allocated(lambda: reference.dkm(weight, evenly(16))) > 10 * 300_000 * 16


@pytest.mark.parametrize("case", ["contiguous", "strided", "channels_last", "empty"])
@pytest.mark.parametrize("operator", list(dkm_ops.SCHEMAS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(operator: str, case: str, dtype: torch.dtype) -> None:
    weight = {
        "contiguous": weights(5, 7),
        "strided": weights(9, 8)[::2, 1:],
        "channels_last": weights(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": weights(0, 3),
    }[case].to(dtype)
    arguments: tuple[object, ...] = (weight, evenly(4), 1e-4, 3)
    if operator == "dkm_backward":
        _, history, totals = forward(weight, evenly(4))
        arguments = (weight, history, totals, torch.ones_like(weight), 1e-4)
    torch.library.opcheck(getattr(torch.ops.r2_kernels, operator).default, arguments)


def test_bad_arguments_are_named() -> None:
    weight, centroids = weights(10), evenly(4)
    with pytest.raises(TypeError, match="weight: expected a tensor, got list"):
        dkm([1.0], centroids)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weight: .*int64"):
        dkm(torch.arange(3), centroids)
    with pytest.raises(TypeError, match=r"weight: .*sparse"):
        dkm(weight.to_sparse(), centroids)
    with pytest.raises(TypeError, match="centroids: expected a tensor, got list"):
        dkm(weight, [0.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"centroids: .*int64"):
        dkm(weight, torch.arange(3))
    for wrong in (centroids[:, None], centroids[:0], torch.zeros(257), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"centroids: expected shape \(K,\) with K from 1 to 256"):
            dkm(weight, wrong)
    with pytest.raises(ValueError, match="centroids: expected device cpu"):
        dkm(weight, centroids.to("meta"))
    with pytest.raises(ValueError, match="centroids: expected no gradient"):
        dkm(weight, centroids.requires_grad_())
    for temperature in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature: expected a positive"):
            dkm(weight, evenly(4), temperature)
    with pytest.raises(TypeError, match="temperature: expected a number"):
        dkm(weight, evenly(4), "1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iterations: expected 1"):
        dkm(weight, evenly(4), iterations=0)
    with pytest.raises(TypeError, match="iterations: expected an integer"):
        dkm(weight, evenly(4), iterations=2.0)  # type: ignore[arg-type]
