"""``python -m benchmarks.palettization``: DKM of one layer, forward and backward, by r2_kernels and by coremltools.

Each runs in a process of its own, which reads from Linux how much memory it has held at most beside the weight, its
gradient and the outputs' gradient. Times are the least of some repetitions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

REPEATS = 3
SPREAD = 0.05


def fused(weight: Tensor, starts: Tensor) -> Callable[[], Tensor]:
    from r2_kernels import dkm

    return lambda: dkm(weight, starts)[0]


def coremltools(weight: Tensor, starts: Tensor) -> Callable[[], Tensor]:
    """``FakePalettize`` in training, as ``DKMPalettizer`` puts it at a layer."""
    from coremltools.optimize.torch.palettization import FakePalettize

    observer = torch.ao.quantization.MovingAverageMinMaxObserver.with_args(dtype=torch.qint8)
    module = FakePalettize(observer, n_bits=(len(starts) - 1).bit_length(), cluster_dim=1).train()
    module.enable_fake_palett()
    module.create_partitions(weight.detach())

    def forward() -> Tensor:
        module.centroids = [starts.clone()[:, None]]
        return module(weight)

    return forward


CANDIDATES = {"r2_kernels": fused, "coremltools": coremltools}


def measure(which: str, count: int, clusters: int) -> tuple[float, int]:
    """Seconds of a forward and a backward pass, and bytes held at most beside the tensors that are given."""
    torch.manual_seed(0)
    weight = (SPREAD * torch.randn(count // 1000, 1000)).requires_grad_()
    weight.grad, upstream = torch.zeros_like(weight), torch.randn_like(weight)
    starts = torch.linspace(-2 * SPREAD, 2 * SPREAD, clusters)
    forward = CANDIDATES[which](weight, starts)
    small = (SPREAD * torch.randn(10, 1000)).requires_grad_()
    CANDIDATES[which](small, starts)().sum().backward()  # what is loaded and started once
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        forward().backward(upstream)
        times.append(time.perf_counter() - start)
    return min(times), _resident("VmHWM") - before


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what + ":")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.palettization", description=__doc__)
    parser.add_argument("--weights", type=int, default=10_000_000, help="entries of the layer (default: ten million)")
    parser.add_argument("--clusters", type=int, default=16, help="centroids (default: 16)")
    parser.add_argument("--only", choices=CANDIDATES, help="this one, in this process: seconds and bytes")
    options = parser.parse_args()
    if options.only:
        print(*measure(options.only, options.weights, options.clusters))
        return
    print(f"{options.weights:,} weights, {options.clusters} clusters, {torch.get_num_threads()} threads, float32\n")
    print("| | seconds | extra memory, MB |\n|---|---:|---:|")
    found = {}
    for which in CANDIDATES:
        command = [sys.executable, "-m", "benchmarks.palettization", "--only", which]
        command += ["--weights", str(options.weights), "--clusters", str(options.clusters)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        found[which] = float(output[-2]), int(output[-1])
        print(f"| {which} | {found[which][0]:.2f} | {found[which][1] / 1e6:.0f} |", flush=True)
    (time_mine, memory_mine), (time_theirs, memory_theirs) = found["r2_kernels"], found["coremltools"]
    print(f"| ratio | {time_mine / time_theirs:.3f} | {memory_mine / memory_theirs:.3f} |")


if __name__ == "__main__":
    main()
