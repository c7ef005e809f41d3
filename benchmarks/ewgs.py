"""``python -m benchmarks.ewgs``: the EWGS quantizer, forward and backward, fused and in eager PyTorch.

Times are in units of ``torch.sum`` of the values, which reads them once: fused, forward reads and writes once, and
backward reads twice and writes once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r2_kernels import ewgs

LEVELS, DELTA = 4, 1e-3
SIZE = 10_000_000
REPEATS = 7


class _Rounding(torch.autograd.Function):
    """x on [0, 1] to the nearest level; backward g (1 + delta sign(g) (x - x_q))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int, delta: float) -> Tensor:
        rounded = (x * (levels - 1)).round() / (levels - 1)
        ctx.save_for_backward(x - rounded)
        ctx.delta = delta
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (error,) = ctx.saved_tensors
        return gradient * (1 + ctx.delta * gradient.sign() * error), None, None


def eager_ewgs(
    values: Tensor, lower: Tensor, upper: Tensor, first: Tensor, last: Tensor, levels: int, delta: float
) -> Tensor:
    """As ``r2_kernels.ewgs``, one operation after the other, for autograd."""
    x = _Rounding.apply(((values - lower) / (upper - lower)).clamp(0, 1), levels, delta)
    return first + x * (last - first)


def _seconds(work: Callable[[], Any]) -> float:
    """The least of some repetitions, after one to warm up."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _row(dtype: torch.dtype) -> str:
    values = torch.randn(SIZE).to(dtype).requires_grad_()
    upstream = torch.randn(SIZE).to(dtype)
    ends = [torch.tensor(end, requires_grad=True) for end in (-2.0, 2.0, -1.0, 1.0)]

    def step(quantize: Callable[..., Tensor]) -> None:
        values.grad = None
        quantize(values, *ends, LEVELS, DELTA).backward(upstream)

    read = _seconds(lambda: values.detach().sum())
    fused, eager = _seconds(lambda: step(ewgs)) / read, _seconds(lambda: step(eager_ewgs)) / read
    return f"| {str(dtype).removeprefix('torch.')} | {fused:.1f} | {eager:.1f} | {eager / fused:.1f} |"


if __name__ == "__main__":
    print(f"{SIZE:,} values, {LEVELS} levels, {torch.get_num_threads()} threads; in units of torch.sum's time\n")
    print("| dtype | fused | eager | eager / fused |\n|---|---:|---:|---:|")
    for each in (torch.float32, torch.bfloat16):
        print(_row(each))
