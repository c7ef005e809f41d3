"""The operators under the CUDA dispatch key, traced with fake tensors of a GPU: no GPU is needed.

Backward is not traced: autograd asks for the device's own stream, which only a build of torch for GPUs has.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import PARAMETERS, PENALTIES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from r2_kernels import ops
from r2_kernels.penalties import CHUNK_SIZE, by_name

operators = torch.ops.r2_kernels
each_penalty = pytest.mark.parametrize("penalty", PENALTIES)


@pytest.mark.parametrize("operator", list(ops.SCHEMAS))
def test_has_a_kernel_for_gpus(operator: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"r2_kernels::{operator}", "CUDA")


@each_penalty
@pytest.mark.parametrize("has_float64", [False, True])
def test_operators_on_a_gpu_are_traced(penalty: str, has_float64: bool) -> None:
    """Both ways to the gradients in one graph: every operator once, its outputs where and what they should be."""
    rule = by_name(penalty)

    def step(parameter: Any, coefficients: Any, weights: list[Any], gradients: list[Any]) -> Any:
        values, slopes, statistics, partials = operators.reduce(penalty, weights, parameter)
        fresh = operators.apply(penalty, weights, parameter, statistics, partials, coefficients)
        operators.apply_(penalty, weights, parameter, statistics, partials, coefficients, gradients)
        merged = operators.finalize(penalty, statistics, parameter, values.dtype)
        fused = operators.reduce_apply_(penalty, weights, parameter, coefficients, gradients)
        return (values, slopes, statistics, partials), fresh, merged, fused

    with FakeTensorMode():
        last = torch.float64 if has_float64 else torch.float16
        weights = [
            torch.empty(CHUNK_SIZE + 1, device="cuda"),
            torch.empty(4, 5, device="cuda", dtype=torch.bfloat16).t(),
            torch.empty(7, device="cuda", dtype=last),
        ]
        parameter = None if PARAMETERS[penalty] is None else torch.empty(3, device="cuda")
        inputs = (parameter, torch.empty(3, device="cuda"), weights, [torch.empty_like(weight) for weight in weights])
        graph = make_fx(step, tracing_mode="fake")(*inputs)
        reduced, fresh, merged, fused = step(*inputs)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert {getattr(operators, name).default for name in ops.SCHEMAS} <= set(called)
    dtype = torch.float64 if has_float64 else torch.float32
    parameters = 0 if rule.parameter is None else 3
    wanted = [((3,), dtype), ((parameters,), dtype), ((3, len(rule.statistics)), torch.float64)]
    wanted.append(((4 if rule.is_sparse else 0,), torch.float64))
    assert [(tuple(output.shape), output.dtype) for output in reduced] == wanted
    for pair in (merged, fused):
        assert [(tuple(output.shape), output.dtype) for output in pair] == wanted[:2]
    for gradient, weight in zip(fresh, weights, strict=True):
        assert (gradient.shape, gradient.stride(), gradient.dtype) == (weight.shape, weight.stride(), weight.dtype)
    assert all(output.device.type == "cuda" for outputs in (reduced, fresh, merged, fused) for output in outputs)
