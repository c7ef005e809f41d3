"""The CPU backend gives bit for bit the same for any number of threads, and may be called from several at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import PARAMETERS, PENALTIES, call, default_parameter
from tensors import randn
from torch import Tensor

from r2_kernels import ops, use_backend
from r2_kernels.penalties import CHUNK_SIZE

BACKEND = "cpu"

pytestmark = pytest.mark.usefixtures("cpu_backend", "restored_threads")
each_penalty = pytest.mark.parametrize("penalty", PENALTIES)

LISTS = {
    "one large": (1_500_007,),
    "many small": tuple(1 + (i * 131) % 3001 for i in range(300)),
    "uneven": (3, 700_000, 5, CHUNK_SIZE, 2 * CHUNK_SIZE + 1, 100, 40_000, 1),
}


def results(penalty: str, weights: list[Tensor]) -> list[Tensor]:
    """Everything that the operators compute."""
    parameter = default_parameter(penalty, weights)
    device = weights[0].device
    coefficients = torch.linspace(0.1, 1.0, len(weights))
    reduced = ops.kernel("reduce", device)(penalty, weights, parameter)
    fresh = ops.kernel("apply", device)(penalty, weights, parameter, *reduced[2:], coefficients)
    added = [torch.full_like(weight, 0.25) for weight in weights]
    ops.kernel("apply_", device)(penalty, weights, parameter, *reduced[2:], coefficients, added)
    fused = [torch.full_like(weight, 0.25) for weight in weights]
    values = ops.kernel("reduce_apply_", device)(penalty, weights, parameter, coefficients, fused)
    return [*reduced, *fresh, *added, *values, *fused]


def assert_bitwise_equal(first: list[Tensor], second: list[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), f"result {index}"


@each_penalty
@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
def test_any_number_of_threads(penalty: str, sizes: str, dtype: torch.dtype) -> None:
    weights = [randn(size, dtype=dtype) for size in LISTS[sizes]]
    torch.set_num_threads(1)
    alone = results(penalty, weights)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_bitwise_equal(alone, results(penalty, weights))
        assert_bitwise_equal(alone, results(penalty, weights))


@each_penalty
def test_nan_with_any_number_of_threads(penalty: str) -> None:
    weights = [randn(200_000), randn(300_000), randn(10)]
    weights[1][123_456] = torch.nan
    values = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        values.append(results(penalty, weights)[0])
    assert values[0].isnan().tolist() == [False, True, False]
    assert all(torch.equal(value[[0, 2]], values[0][[0, 2]]) for value in values)


@each_penalty
def test_calls_from_several_threads(penalty: str) -> None:
    """Each gets what it would have got alone."""
    torch.set_num_threads(2)
    lists = [[randn(size + 17 * worker) for size in (5, 50_000, 3000, CHUNK_SIZE)] for worker in range(4)]
    alone = [results(penalty, weights) for weights in lists]

    def work(worker: int) -> list[Tensor]:
        with use_backend("cpu"):
            for _ in range(10):
                last = results(penalty, lists[worker])
        return last

    with ThreadPoolExecutor(4) as pool:
        for before, after in zip(alone, pool.map(work, range(4)), strict=True):
            assert_bitwise_equal(before, after)


@each_penalty
def test_through_autograd(penalty: str) -> None:
    parameter = torch.tensor([0.5, 1.5, 1.0])
    values, gradients = [], []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        weights = [randn(size).requires_grad_() for size in (100_000, 7, 300_001)]
        results = call(penalty, weights, None if PARAMETERS[penalty] is None else parameter)
        results.backward(torch.tensor([1.0, -2.0, 0.5]))
        values.append(results.detach())
        gradients.append([weight.grad for weight in weights])
    for other in range(1, 4):
        assert torch.equal(values[0], values[other])
        assert_bitwise_equal(gradients[0], gradients[other])
