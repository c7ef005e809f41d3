"""What the Triton backend adds to the properties of all: tables that are never stale, few launches, CUDA graphs.

Without a GPU this needs ``TRITON_INTERPRET=1``, like every test that runs the kernels.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import test_ops
import torch
from conftest import IS_INTERPRETED
from oracle import PENALTIES, default_parameter, expected
from tensors import randn, with_offset
from tolerances import assert_gradient, assert_values
from torch import Tensor

pytest.importorskip("triton")
if not IS_INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and the interpreter is off", allow_module_level=True)

from r2_kernels.backends.triton import chunk_table, operators
from r2_kernels.penalties import CHUNK_SIZE
from r2_kernels.penalties import PENALTIES as PENALTY_RULES

BACKEND = "triton"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")

each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or IS_INTERPRETED, reason="needs a GPU")


def check_step(penalty: str, weights: list[Tensor], gradients: list[Tensor]) -> None:
    """One step adds what it should to the gradients as they are."""
    before = [gradient.clone() for gradient in gradients]
    parameter = default_parameter(penalty, weights)
    coefficients = torch.linspace(0.5, 1.5, len(weights), device=DEVICE)
    values, _ = operators.reduce_apply_(penalty, weights, parameter, coefficients, gradients)
    wanted = expected(penalty, weights, parameter, coefficients)
    assert_values(values, wanted.values, weights)
    for index, gradient in enumerate(gradients):
        assert_gradient(gradient, wanted.gradients[index], before=before[index], index=index)


# Tables


@each_penalty
def test_a_table_is_never_stale(penalty: str) -> None:
    """Everything that may happen to tensors between two steps, each at first with the tables of the step before."""
    weights = [randn(300, device=DEVICE), randn(CHUNK_SIZE + 5, device=DEVICE), randn(40, 6, device=DEVICE)]
    gradients = [torch.zeros_like(weight) for weight in weights]
    check_step(penalty, weights, gradients)
    weights[0].normal_()  # new values
    check_step(penalty, weights, gradients)
    weights[0].data = randn(300, device=DEVICE)  # another address
    check_step(penalty, weights, gradients)
    weights[0].data = weights[0].data[:200]  # another size at the same address
    gradients[0].data = gradients[0].data[:200]
    check_step(penalty, weights, gradients)
    weights[2].data = weights[2].data.view(6, 40)  # another shape at the same address
    gradients[2].data = gradients[2].data.view(6, 40)
    check_step(penalty, weights, gradients)
    gradients[2].data = gradients[2].data.view(40, 6).t()  # other strides at the same address
    check_step(penalty, weights, gradients)
    weights[2].data = weights[2].data.view(40, 6).t()
    check_step(penalty, weights, gradients)
    halves = [tensor.view(torch.bfloat16) for tensor in (weights[0], gradients[0])]  # another dtype at the same address
    halves[0].copy_(randn(400, dtype=torch.bfloat16))
    halves[1].zero_()
    check_step(penalty, [halves[0], *weights[1:]], [halves[1], *gradients[1:]])
    gradients[1] = torch.zeros_like(weights[1])  # gradients that were set to None and came back
    check_step(penalty, weights, gradients)
    order = [2, 0, 1]
    check_step(penalty, [weights[i] for i in order], [gradients[i] for i in order])


def test_freed_storage_that_comes_back_with_another_size() -> None:
    """As a sharded model frees and gathers its weights: the allocator may give the same address to another size."""
    for size in (5000, 4000, 5000, 3000, 5000):
        weight = randn(size, device=DEVICE)
        check_step("soft_min_max", [weight], [torch.zeros_like(weight)])
        del weight


def test_the_cache_is_bounded_and_hits() -> None:
    built = 0

    def build() -> chunk_table.WeightTable:
        nonlocal built
        built += 1
        return chunk_table.WeightTable(tensors, CHUNK_SIZE)

    cache: chunk_table.TableCache[Any] = chunk_table.TableCache()
    kept = []
    for _ in range(2 * chunk_table.CACHED_LISTS):
        tensors = [randn(10, device=DEVICE), randn(20, device=DEVICE)]
        kept.append(tensors)
        first = cache.find(tensors, None, build)
        assert cache.find(list(tensors), None, build) is first
    assert built == 2 * chunk_table.CACHED_LISTS
    assert len(cache) == chunk_table.CACHED_LISTS


def test_a_plan_for_more_than_2_to_the_31_elements() -> None:
    """Made-up sizes: nothing is allocated but the plan."""
    sizes = [7, 2**31 + 5, 0, 3 * 2**32, CHUNK_SIZE]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    segments, groups, chunks = chunk_table.plan([0x1000 * i for i in range(5)], sizes, dtypes, CHUNK_SIZE)
    counts = [(size + CHUNK_SIZE - 1) // CHUNK_SIZE for size in sizes]
    assert chunks == sum(counts)
    assert segments[:, 1].tolist() == sizes
    assert segments[:, 2].tolist() == [sum(counts[:i]) for i in range(5)]
    assert [group[0] for group in groups] == [torch.float32, torch.bfloat16]
    narrow, wide = groups[1][1], groups[0][1]
    assert wide.tolist() == [[0, 0], [4, 0]]
    assert torch.bincount(narrow[:, 0], minlength=5).tolist() == [0, counts[1], 0, counts[3], 0]
    assert narrow[-1].tolist() == [3, counts[3] - 1]
    assert groups[0][2].tolist() == [0, 2, 4]


# Malformed calls


def arguments(operator: str, penalty: str, weights: list[Tensor]) -> dict[str, Any]:
    """Well-formed arguments of the operator, by name."""
    parameter = default_parameter(penalty, weights)
    values, _, statistics, partials = operators.reduce(penalty, weights, parameter)
    named = {
        "penalty": penalty,
        "weights": weights,
        "parameter": parameter,
        "statistics": statistics,
        "partials": partials,
        "coefficients": torch.ones(len(weights), device=DEVICE),
        "gradients": [torch.zeros_like(weight) for weight in weights],
        "dtype": values.dtype,
        "group_size": 0,
    }
    taken = inspect.signature(getattr(operators, operator)).parameters
    return {name: named[name] for name in taken}


@each_penalty
@pytest.mark.parametrize("argument", list(test_ops.BAD))
def test_malformed_calls_raise(penalty: str, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the C++ operators do: an error that names the argument, before anything is launched or written."""
    rule = PENALTY_RULES[penalty]
    weights = [randn(300, device=DEVICE), randn(4, 5, device=DEVICE), randn(40_000, device=DEVICE)]
    named = {operator: arguments(operator, penalty, weights) for operator in test_ops.WITH_ARGUMENT[argument]}
    monkeypatch.setattr(operators, "launch", lambda *_: pytest.fail("launched"))
    for bad, spoil in test_ops.BAD[argument].items():
        if (argument == "parameter" and rule.parameter is None) or (
            argument == "partials" and not rule.is_sparse and bad != "float32"
        ):
            continue
        for operator, good in named.items():
            if "gradients" in good:
                good["gradients"] = [torch.zeros_like(weight) for weight in weights]
            spoiled = good | {argument: spoil(good[argument])}
            with pytest.raises(RuntimeError, match=None if bad == "sparse" else argument):
                getattr(operators, operator)(**spoiled)
            assert not any(gradient.any() for gradient in good.get("gradients", ()))


def test_a_parameter_where_there_is_none() -> None:
    with pytest.raises(RuntimeError, match="parameter: expected None for penalty 'linf'"):
        operators.reduce("linf", [randn(3, device=DEVICE)], torch.ones(1, device=DEVICE))


# Launches


@each_penalty
def test_at_most_three_launches_per_dtype(penalty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: Counter[str] = Counter()

    def count(kernel: Any, programs: int, arguments: Any, constants: Any) -> None:
        launches[kernel.__name__] += 1

    dtypes = (torch.float32, torch.bfloat16)
    weights = [randn(1 + 37 * i, dtype=dtypes[i % 2], device=DEVICE) for i in range(101)]
    gradients = [torch.zeros_like(weight) for weight in weights]
    parameter = default_parameter(penalty, weights)
    monkeypatch.setattr(operators, "launch", count)
    operators.reduce_apply_(penalty, weights, parameter, torch.ones(101, device=DEVICE), gradients)
    assert launches == {"reduce_chunks": 2, "merge_chunks": 2, "apply_chunks": 2}


# Alignment and chunks


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_full_chunks_at_every_alignment(penalty: str, dtype: torch.dtype) -> None:
    """Aligned weights with misaligned gradients, and the reverse: neither may take the path of 16 bytes at a time."""
    weights, gradients = [], []
    for offset in range(16):
        weight = with_offset(randn(CHUNK_SIZE + 3, dtype=dtype, device=DEVICE), offset)
        weights.append(weight)
        gradients.append(with_offset(torch.zeros_like(weight), (offset * 5) % 16))
    check_step(penalty, weights, gradients)


@pytest.mark.parametrize("chunk_size", [128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_penalty
def test_other_chunk_sizes(penalty: str, dtype: torch.dtype, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of small tensors, whole and partial, and segments with more chunks than merge at a time."""
    small = {"CHUNK": chunk_size, "LANES": 4, "BLOCK": 64}
    for builder in (operators.reduce_constants, operators.merge_constants, operators.apply_constants):

        def constants(*args: Any, uncached: Any = builder.__wrapped__) -> dict[str, Any]:
            made = uncached(*args)  # Cached, other tests would find this chunk size.
            return made | {name: value for name, value in small.items() if name in made}

        monkeypatch.setattr(operators, builder.__name__, constants)
    monkeypatch.setattr(operators, "CHUNK_SIZE", chunk_size)
    monkeypatch.setattr(operators, "_weight_tables", chunk_table.TableCache())
    monkeypatch.setattr(operators, "_destination_tables", chunk_table.TableCache())
    sizes = (1, chunk_size - 1, chunk_size, 2 * chunk_size, 9 * chunk_size + 1)
    weights = [randn(size, dtype=dtype, device=DEVICE) for size in sizes]
    check_step(penalty, weights, [torch.zeros_like(weight) for weight in weights])


# What is missing is said in one sentence


def test_without_gpu_and_interpreter() -> None:
    script = "import torch, r2_kernels\nwith r2_kernels.use_backend('triton'): pass"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "RuntimeError: backend 'triton' is not available: there is no GPU" in result.stderr


def test_without_triton() -> None:
    script = "import sys\nsys.modules['triton'] = None\nimport r2_kernels\nwith r2_kernels.use_backend('triton'): pass"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "RuntimeError: backend 'triton' is not available: triton is not installed" in result.stderr


# CUDA graphs


@needs_gpu
@each_penalty
def test_a_captured_step_replays(penalty: str) -> None:
    weights = [randn(300, device=DEVICE), randn(CHUNK_SIZE + 5, device=DEVICE)]
    gradients = [torch.zeros_like(weight) for weight in weights]
    parameter = default_parameter(penalty, weights)
    coefficients = torch.ones(2, device=DEVICE)
    arguments = (penalty, weights, parameter, coefficients, gradients)
    operators.reduce_apply_(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, _ = operators.reduce_apply_(*arguments)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.normal_()
        gradient.zero_()
    coefficients.fill_(0.25)
    graph.replay()
    wanted = expected(penalty, weights, parameter, coefficients)
    assert_values(values, wanted.values, weights)
    for index, gradient in enumerate(gradients):
        assert_gradient(gradient, wanted.gradients[index], index=index)


@needs_gpu
def test_capture_with_unknown_addresses_is_an_error() -> None:
    weights = [randn(300, device=DEVICE)]
    error = pytest.raises(RuntimeError, match="run one step with the same tensors first")
    with error, torch.cuda.graph(torch.cuda.CUDAGraph()):
        operators.reduce("linf", weights, None)


@needs_gpu
@each_penalty
def test_a_step_never_synchronizes(penalty: str) -> None:
    weights = [randn(300, device=DEVICE), randn(CHUNK_SIZE + 5, device=DEVICE)]
    gradients = [torch.zeros_like(weight) for weight in weights]
    parameter = default_parameter(penalty, weights)
    arguments = (penalty, weights, parameter, torch.ones(2, device=DEVICE), gradients)
    operators.reduce_apply_(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        operators.reduce_apply_(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
