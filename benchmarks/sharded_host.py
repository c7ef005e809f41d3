"""``python -m benchmarks.sharded_host``: what ``add_gradients_()`` costs on the host for weights that are ``DTensor``s.

One process with a mesh of one rank, so that nothing travels, and weights so small that computing them costs little. A
row is the median of some steps, in microseconds a layer.
"""

from __future__ import annotations

import argparse
import statistics
import timeit

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from r2_kernels import RangeRegularizer
from r2_kernels.penalties import RANGE_PENALTIES

STEPS = 31


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded_host", description=__doc__)
    parser.add_argument("--layers", type=int, default=1000, help="how many weights (default: 1000)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    print(f"{'µs a layer':16}{'plain':>10}{'DTensor':>10}")
    for penalty in RANGE_PENALTIES:
        plain = [torch.randn(8, 8) for _ in range(arguments.layers)]
        sharded = [distribute_tensor(weight, mesh, [Shard(0)]) for weight in plain]
        print(f"{penalty:16}" + "".join(f"{_median(penalty, weights):10.1f}" for weights in (plain, sharded)))
    dist.destroy_process_group()


def _median(penalty: str, weights: list[torch.Tensor]) -> float:
    layers = [(str(index), nn.Parameter(weight)) for index, weight in enumerate(weights)]
    regularizer = RangeRegularizer(layers, penalty)
    regularizer.add_gradients_()
    times = timeit.repeat(regularizer.add_gradients_, number=1, repeat=STEPS)
    return 1e6 * statistics.median(times) / len(layers)


if __name__ == "__main__":
    main()
