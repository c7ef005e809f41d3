"""``python -m benchmarks.roofline``: how long the Triton kernels should take, PREDICTED from machine code.

Nothing here is measured on a GPU. The kernels are compiled for the GPU's architecture, the instructions of the path
that a full, aligned chunk takes are counted, and each resource's time is work over throughput; the slowest bounds the
kernel. ``docs/roofline.md`` explains the arithmetic and shows the tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.machine_code import (
    STEP_DTYPES,
    STEPS,
    STREAMING,
    MachineCode,
    Path16,
    compile_kernel,
    compile_source,
    read,
    read_step,
    step_source,
)
from r2_kernels.backends.triton.penalties import FUNCTIONS
from r2_kernels.penalties import CHUNK_SIZE, RANGE_PENALTIES


@dataclass(frozen=True)
class Gpu:
    """Published peak numbers, but for ``l2`` of NVIDIA's, an assumption: NVIDIA publishes none. All per second."""

    name: str
    target: str
    processors: int
    clock: float  # boost, hertz
    memory: float  # bytes
    l2: float  # bytes
    l1: int  # bytes a processor holds
    lanes: int = 128  # 32-bit operations a processor issues a clock
    special_lanes: int = 16  # MUFU
    shuffle_lanes: int = 32
    has_special_unit: bool = True  # else exponentials take the vector unit's own time


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "sm_80", 108, 1.41e9, 2.04e12, 4.5e12, 192 << 10, lanes=64),
        Gpu("H100", "sm_90", 132, 1.98e9, 3.35e12, 5.5e12, 256 << 10),
        Gpu("H200", "sm_90", 132, 1.98e9, 4.8e12, 5.5e12, 256 << 10),
        Gpu("B200", "sm_100", 148, 1.965e9, 8.0e12, 10.0e12, 256 << 10),
        Gpu(
            "MI300X",
            "gfx942",
            304,
            2.1e9,
            5.3e12,
            34.4e12,
            32 << 10,
            lanes=64,
            shuffle_lanes=64,
            has_special_unit=False,
        ),
    )
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _llama(width: int, hidden: int, key_value: int, layers: int, vocabulary: int) -> list[int]:
    attention = 2 * width * width + 2 * key_value * width
    matrices = [width * width, key_value * width, key_value * width, width * width, *3 * [hidden * width]]
    assert sum(matrices[:4]) == attention
    return [vocabulary * width, *layers * matrices, vocabulary * width]


def _from_shapes(model: str) -> list[int]:
    from benchmarks.shapes import MODELS

    return [math.prod(shape) for shape in MODELS[model][0]]


MODELS = {
    "ResNet-18": lambda: _from_shapes("ResNet-18"),
    "GPT-2": lambda: _from_shapes("GPT-2"),
    "Llama-2-7B": lambda: _llama(4096, 11008, 4096, 32, 32000),
    "Llama-3-70B": lambda: _llama(8192, 28672, 1024, 80, 128256),
}


@dataclass(frozen=True)
class Prediction:
    """Seconds per element of each resource, for one path through a kernel."""

    gpu: str
    kernel: str
    penalty: str
    dtype: str
    exponentials: float  # per element
    instructions: float  # per element
    memory: float
    issue: float
    special: float
    shuffle: float
    l2: float

    @property
    def bound(self) -> str:
        names = ("memory", "issue", "special", "shuffle", "l2")
        return max(names, key=lambda name: getattr(self, name))

    @property
    def slowest(self) -> float:
        return float(getattr(self, self.bound))


@cache
def _code(kernel: str, penalty: str, dtype: torch.dtype, target: str) -> MachineCode:
    return read(compile_kernel(kernel, penalty, dtype, target), kernel, penalty, dtype)


@cache
def _step_code(step: str, penalty: str | None, dtypes: str, target: str) -> MachineCode:
    arguments = (penalty, STEP_DTYPES[dtypes], STEPS[step])
    return read_step(compile_source(step_source("step", *arguments), target), *arguments)


def predict_step(gpu: Gpu, step: str, penalty: str | None, dtypes: str) -> Iterator[Prediction]:
    """The same for an optimizer's step, the penalty's slope and the new statistics included."""
    weight, gradient, state, _ = STEP_DTYPES[dtypes]
    if STEPS[step].is_stochastic and weight is not torch.bfloat16:
        return  # There is nothing to round.
    code = _step_code(step, penalty, dtypes, gpu.target)
    states = STEPS[step].states
    sums = 0 if penalty is None else _sum_bytes(penalty)
    per_chunk = 8 + 24 + 8 * (2 + states) + sums
    memory_bytes = 2 * weight.itemsize + gradient.itemsize + 2 * states * state.itemsize + per_chunk / CHUNK_SIZE
    looks = 1 if penalty is not None and FUNCTIONS[penalty].ends else 0
    by_exponentials = {round(path.exponentials_per_element): path for path in code.paths}
    for exponentials, path in by_exponentials.items():
        # The second look at the new weights is taken to go to the L2 cache, always.
        l2_bytes = memory_bytes + looks * weight.itemsize
        yield _prediction(gpu, step, str(penalty), dtypes, exponentials, path, memory_bytes, l2_bytes)


def _prediction(
    gpu: Gpu,
    kernel: str,
    penalty: str,
    dtype: str,
    exponentials: float,
    path: Path16,
    memory_bytes: float,
    l2_bytes: float,
) -> Prediction:
    per_second = gpu.processors * gpu.clock
    # Of a unit that exponentials share, each takes as many turns as they are slower, one of which is counted.
    turns = 0 if gpu.has_special_unit else gpu.lanes / gpu.special_lanes - 1
    return Prediction(
        gpu.name,
        kernel,
        penalty,
        dtype,
        exponentials,
        path.per_element,
        memory_bytes / gpu.memory,
        (path.per_element + turns * path.exponentials_per_element) / (gpu.lanes * per_second),
        path.exponentials_per_element / (gpu.special_lanes * per_second),
        path.shuffles_per_element / (gpu.shuffle_lanes * per_second),
        l2_bytes / gpu.l2,
    )


def _sum_bytes(penalty: str) -> int:
    """Bytes of a chunk's sums, written and read, of entries up to float32."""
    functions = FUNCTIONS[penalty]
    return 2 * functions.stored(torch.float32).itemsize * functions.sums_of(torch.float32)


def predict(gpu: Gpu, kernel: str, penalty: str, dtype: torch.dtype) -> Iterator[Prediction]:
    """One prediction per path that a full, aligned chunk may take: soft-min-max has cheap and costly temperatures."""
    code = _code(kernel, penalty, dtype, gpu.target)
    streams = {"reduce": 1, "apply": 2, "apply_": 3}[kernel]
    # A row of the table, a segment, and the chunk's sums, which are written, and read by the merge.
    per_chunk = 8 + 24 + (_sum_bytes(penalty) if kernel == "reduce" else 8)
    memory_bytes = streams * dtype.itemsize + per_chunk / CHUNK_SIZE
    looks = 2 if kernel == "reduce" and FUNCTIONS[penalty].ends else 1
    resident = code.occupancy * 2048 / code.threads * CHUNK_SIZE * dtype.itemsize
    l2_bytes = memory_bytes + (looks - 1) * dtype.itemsize * max(0.0, 1 - gpu.l1 / resident)
    name = str(dtype).removeprefix("torch.")
    by_exponentials = {round(path.exponentials_per_element): path for path in code.paths}
    for exponentials, path in by_exponentials.items():
        yield _prediction(gpu, kernel, penalty, name, exponentials, path, memory_bytes, l2_bytes)


def as_table(rows: list[Prediction]) -> str:
    """Each resource's time in shares of the memory's, which is what a kernel that only moved the bytes would take."""
    lines = [
        "| GPU | kernel | penalty | dtype | exp | instructions | issue | MUFU | SHFL | L2 | bound by | time |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = [f"{getattr(row, name) / row.memory:.2f}" for name in ("issue", "special", "shuffle", "l2")]
        lines.append(
            f"| {row.gpu} | `{row.kernel}` | {row.penalty} | {row.dtype} | {row.exponentials:.0f} | "
            f"{row.instructions:.1f} | {' | '.join(shares)} | {row.bound} | {row.slowest / row.memory:.2f} |"
        )
    return "\n".join(lines)


def model_table(rows: list[Prediction]) -> str:
    """The predicted time of each kernel over whole models, launches and tails left out."""
    sizes = {model: sum(count()) for model, count in MODELS.items()}
    lines = [
        f"| GPU | kernel | penalty | dtype | exp | {' | '.join(sizes)} | share of the memory limit |",
        f"|---|---|---|---|---|{'---|' * len(sizes)}---|",
    ]
    for row in rows:
        times = [f"{1e6 * row.slowest * size:,.0f} µs" for size in sizes.values()]
        lines.append(
            f"| {row.gpu} | `{row.kernel}` | {row.penalty} | {row.dtype} | {row.exponentials:.0f} | "
            f"{' | '.join(times)} | {row.memory / row.slowest:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--gpu", action="append", choices=list(GPUS), help="only this GPU (repeatable); default: all")
    parser.add_argument(
        "--models", action="store_true", help="times of whole models, instead of shares of each resource"
    )
    parser.add_argument("--steps", action="store_true", help="the optimizers' steps, instead of the penalties' kernels")
    parser.add_argument("--output", type=Path, help="write the predictions there as JSON, too")
    arguments = parser.parse_args()
    gpus = [GPUS[name] for name in arguments.gpu or GPUS]
    if arguments.steps:
        cases = itertools.product(gpus, STEPS, (None, *RANGE_PENALTIES), STEP_DTYPES)
        rows = [row for case in cases for row in predict_step(*case)]
    else:
        rows = [row for case in itertools.product(gpus, STREAMING, RANGE_PENALTIES, DTYPES) for row in predict(*case)]
    print("Predicted from compiled code, measured on nothing.\n")
    print(model_table(rows) if arguments.models else as_table(rows))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([vars(row) | {"bound": row.bound} for row in rows], indent=1))


if __name__ == "__main__":
    main()
