"""``python -m benchmarks.host``: what a step of the Triton backend costs on the host, its launches left out.

No GPU is needed: the tensors are on the CPU, the tables are cached, and the launch of a kernel does nothing. Streams
and devices are therefore not in it. A row is the median of some runs, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import timeit
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers import parameter
from r2_kernels.backends.triton import operators
from r2_kernels.penalties import RANGE_PENALTIES

REPEATS, CALLS = 31, 50


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--tensors", type=int, default=500, help="how many weights of two dimensions (default: 500)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    operators.launch = _launch_nothing
    count = arguments.tensors
    weights = [torch.randn(64, 64 + index % 7) for index in range(count)]
    gradients = [torch.zeros_like(weight) for weight in weights]
    coefficients = torch.ones(count)
    for penalty in RANGE_PENALTIES:
        scalars = next((scalar.detach() for scalar in parameter(penalty, count)), None)
        step = (penalty, weights, scalars, coefficients, gradients)
        _show(f"{penalty}: reduce_apply_", lambda step=step: operators.reduce_apply_(*step))
    table, _ = operators._weight_table(weights)
    _show("of which the table of the weights", lambda: operators._weight_table(weights))
    _show("of which the table of the gradients", lambda: operators.destination_table(table, weights, gradients))


def _launch_nothing(kernel: Any, programs: int, arguments: Any, constants: Any) -> None:
    pass


def _show(what: str, work: Callable[[], object]) -> None:
    work()
    times = timeit.repeat(work, number=CALLS, repeat=REPEATS)
    print(f"{what:40}{1e6 * statistics.median(times) / CALLS:8.1f} µs")


if __name__ == "__main__":
    main()
