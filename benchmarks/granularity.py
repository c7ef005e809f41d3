"""``python -m benchmarks.granularity``: a step's penalty per channel and per group, against that per tensor.

Times of ``RangeRegularizer.add_gradients_()``, values and gradients added in place, medians of alternating repetitions,
in reads of the weights (``torch.sum`` of one flat tensor of the same bytes) and in times per tensor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers import TEMPERATURE
from benchmarks.shapes import MODELS, weights
from r2_kernels import RangeRegularizer, segment_counts
from r2_kernels.granularity import Granularity
from r2_kernels.penalties import RANGE_PENALTIES

GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", 128, 64, 32)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.granularity", description=__doc__)
    parser.add_argument("--model", default="GPT-2", choices=list(MODELS))
    parser.add_argument("--penalty", action="append", choices=list(RANGE_PENALTIES), help="only this one (repeatable)")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="of soft-min-max")
    parser.add_argument("--shared", action="store_true", help="one M or temperature per layer")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    parameters = [nn.Parameter(weight) for weight in weights(arguments.model)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    print(f"{arguments.model}, {flat.numel() / 1e6:.0f} M weights, {torch.get_num_threads()} threads\n")
    print("| penalty | segment | segments | time, ms | in reads | in times per tensor |")
    print("|---|---|---|---|---|---|")
    for penalty in arguments.penalty or RANGE_PENALTIES:
        functions: dict[Granularity, Callable[[], object]] = {"read": flat.sum}
        for granularity in GRANULARITIES:
            functions[granularity] = step(parameters, penalty, granularity, arguments.temperature, arguments.shared)
        times = medians(functions, arguments.repetitions)
        for granularity in GRANULARITIES:
            count = sum(segment_counts(parameters, granularity))
            median = times[granularity]
            print(
                f"| {penalty} | {granularity} | {count} | {median * 1e3:.1f} | {median / times['read']:.2f} | "
                f"{median / times['tensor']:.2f} |"
            )


def step(
    parameters: list[nn.Parameter], penalty: str, granularity: Granularity, temperature: float, shared: bool
) -> Callable[[], Tensor]:
    named = [(str(index), parameter) for index, parameter in enumerate(parameters)]
    start = {"soft_min_max": {"temperature": temperature}, "margin": {"margin": 2.576}}.get(penalty, {})
    is_shared = shared and penalty != "linf"
    return RangeRegularizer(named, penalty, granularity=granularity, shared=is_shared, **start).add_gradients_


def medians(functions: dict[Granularity, Callable[[], object]], repetitions: int) -> dict[Granularity, float]:
    """Of each function, all of them called in turn, so that a change of the machine's speed meets all."""
    times: dict[Granularity, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repetition > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(of_function) for name, of_function in times.items()}


if __name__ == "__main__":
    main()
