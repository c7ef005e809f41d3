"""``add_gradients_`` needs next to nothing beyond the gradients; sizes beyond 32 bits work."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import PARAMETERS, PENALTIES, default_parameter
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import r2_kernels
from r2_kernels import RangeRegularizer, ops
from r2_kernels.penalties import by_name

BACKEND = "cpu"
MEBIBYTE = 2**20

pytestmark = pytest.mark.usefixtures("cpu_backend")
each_penalty = pytest.mark.parametrize("penalty", PENALTIES)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """20 million parameters, in 20 matrices and a convolution."""
    layers = [nn.Linear(1000, 970, bias=False, dtype=dtype) for _ in range(20)]
    return nn.ModuleList([*layers, nn.Conv2d(256, 256, 3, bias=False, dtype=dtype)])


def allocated(run: profile) -> int:
    """All that torch's allocator gave out, whether it came back or not."""
    events = run.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_add_gradients_allocates_next_to_nothing(penalty: str, dtype: torch.dtype) -> None:
    watched = model(dtype)
    reg = RangeRegularizer(watched, penalty)
    for parameter in [*watched.parameters(), *reg.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        reg.add_gradients_()
    assert allocated(run) < MEBIBYTE


def test_the_measure_sees_a_dense_temporary() -> None:
    """What the test above is worth."""
    weight = torch.zeros(1000, 970)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        weight.abs().amax()
    assert allocated(run) >= weight.numel() * 4


PEAK = """
import sys, torch
from torch import nn
from r2_kernels import RangeRegularizer

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def regularizer(count):
    layers = nn.ModuleList([nn.Linear(1000, 970, bias=False) for _ in range(count)])
    reg = RangeRegularizer(layers, sys.argv[1])
    for parameter in [*layers.parameters(), *reg.parameters()]:
        parameter.grad = torch.full_like(parameter, 0.5)
    return reg

small, large = regularizer(1), regularizer(20)
for _ in range(3):
    small.add_gradients_()
reset_peak()
before = peak()
large.add_gradients_()
print(peak() - before)
"""


@each_penalty
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a part of a run")
def test_add_gradients_in_the_process_memory(penalty: str) -> None:
    """Whatever allocator the kernels use: the peak of the whole process."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, penalty],
        env={"PYTHONPATH": str(Path(r2_kernels.__file__).parent.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MEBIBYTE


@each_penalty
def test_autograd_allocates_the_gradients_alone(penalty: str) -> None:
    weights = [parameter.detach().requires_grad_() for parameter in model().parameters()]
    parameter = default_parameter(penalty, weights)
    function = getattr(r2_kernels, penalty)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        (function(weights) if parameter is None else function(weights, parameter)).sum().backward()
    dense = sum(weight.numel() * weight.element_size() for weight in weights)
    assert allocated(run) < 1.01 * dense + MEBIBYTE


def lazy_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    size = count * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype, count=count)


@each_penalty
@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs anonymous memory maps")
def test_more_elements_than_31_bits_count(penalty: str) -> None:
    count = 2**31 + 12_345
    weights = [lazy_zeros(count, torch.bfloat16), torch.tensor([1.0, -2.0])]
    weights[0][2**31 + 5] = -3.0
    weights[0][7] = 2.0
    parameter = None if PARAMETERS[penalty] is None else torch.tensor([0.5, 0.5])
    values, slopes, statistics, partials = ops.kernel("reduce", weights[0].device)(penalty, weights, parameter)
    if penalty == "linf":
        assert values.tolist() == [3.0, 2.0]
        gradients = [lazy_zeros(count, torch.bfloat16), torch.zeros(2)]
        ones = torch.ones(2)
        ops.kernel("apply_", ones.device)(penalty, weights, parameter, statistics, partials, ones, gradients)
        assert gradients[0][2**31 + 5] == -1.0
        assert gradients[0][7] == 0.0
        assert gradients[0][2**31 - 10 : 2**31 + 20].count_nonzero() == 1
        assert gradients[1].tolist() == [0.0, -1.0]
    elif penalty == "margin":
        assert values.tolist() == pytest.approx([0.5 + 1.5 + 2.5, 0.5 + 0.5 + 1.5])
        assert slopes.tolist() == [-1.0, -1.0]
    elif penalty == "kurtosis":
        # Of a two and a minus three among zeros the fourth moment is 97 / n, the variance 13 / n.
        assert values[0].item() == pytest.approx((97 * count / 13**2 - 1.8) ** 2, rel=1e-6)
        assert values[1].item() == pytest.approx((1 - 1.8) ** 2)
    else:
        rule = by_name(penalty)
        maximum, minimum, z_upper, *_ = statistics[0].tolist()
        assert (maximum, minimum) == (2.0, -3.0)
        assert rule.statistics[2] == "z_upper"
        exact = (count - 2) * torch.exp(torch.tensor(-1.0, dtype=torch.float64)).item() + 1
        assert z_upper == pytest.approx(exact, rel=1e-6)
