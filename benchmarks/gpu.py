"""``python -m benchmarks.gpu``: time the kernels and their peers on a GPU with CUDA events, and save them as JSON.

A row per model, dtype, penalty and what ran: the operators of the Triton backend one by one, which are the rows of
``benchmarks.roofline``, and a whole step by other means. GB/s counts the bytes that have to move, not those that do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import PEERS, has_penalty, parameter
from benchmarks.shapes import MODELS, weights
from r2_kernels.penalties import RANGE_PENALTIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP, REPEATS = 5, 30
# Reads and writes of a dtype's bytes per element.
STREAMS = {"reduce": 1, "apply": 2, "apply_": 3}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this model (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this dtype (repeatable)")
    parser.add_argument("--output", type=Path, default=Path("benchmark-output/gpu.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use here; `python -m benchmarks.roofline` predicts.", file=sys.stderr)
        return 1
    rows = []
    for model in arguments.model or MODELS:
        for dtype in arguments.dtype or DTYPES:
            for row in measured(model, DTYPES[dtype]):
                row = {"model": model, "dtype": dtype, **row}
                rows.append(row)
                print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "measured": True}
    arguments.output.write_text(json.dumps({**about, "rows": rows}, indent=1))
    return 0


def measured(model: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The rows of one model in one dtype."""
    tensors = [weight.to("cuda", dtype) for weight in weights(model)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    yield {"penalty": None, "what": "torch.sum of one flat tensor"} | _timed(flat.sum, size)
    for penalty in RANGE_PENALTIES:
        for name, work in operators_of(penalty, tensors):
            yield {"penalty": penalty, "what": name} | _timed(work, STREAMS[name] * size)
        with torch.device("cuda"):  # where the peers make their M or temperature
            for name, peer in PEERS.items():
                if has_penalty(name, penalty):
                    yield {"penalty": penalty, "what": name} | _timed(peer(penalty, tensors), 4 * size)


def operators_of(penalty: str, tensors: list[Tensor]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The operators alone, without autograd."""
    from r2_kernels.backends import triton

    count = len(tensors)
    scalars = next((scalar.detach().cuda() for scalar in parameter(penalty, count)), None)
    coefficients = torch.full((count,), 0.01, device="cuda")
    gradients = [torch.zeros_like(tensor) for tensor in tensors]
    _, _, statistics_, partials = triton.reduce(penalty, tensors, scalars)
    shared = (penalty, tensors, scalars, statistics_, partials, coefficients)
    yield "reduce", lambda: triton.reduce(penalty, tensors, scalars)
    yield "apply", lambda: triton.apply(*shared)
    yield "apply_", lambda: triton.apply_(*shared, gradients)


def _timed(work: Callable[[], object], moved: int) -> dict[str, float]:
    """The median of several runs between CUDA events, each after a flush of the L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    median = statistics.median(times)
    return {"seconds": median, "GB/s": round(moved / median * 1e-9, 1)}


if __name__ == "__main__":
    sys.exit(main())
