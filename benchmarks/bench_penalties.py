"""One step's penalty, value and gradients, of each model by each peer; run by ``python -m benchmarks.run``."""

from __future__ import annotations

import gc
import statistics
import time

import pytest
import torch
from torch import Tensor

from benchmarks.peers import PEERS, has_penalty
from benchmarks.shapes import MODELS, weights
from r2_kernels.penalties import RANGE_PENALTIES

# Eager PyTorch keeps several float32 copies of all weights: of a billion, more than most machines have. torch.compile
# takes minutes for the hundred and more tensors of MobileNetV2.
TOO_MUCH = {"1B in bfloat16": ("eager PyTorch", "torch.compile"), "MobileNetV2": ("torch.compile",)}
CASES = [
    (model, penalty, peer)
    for model in MODELS
    for penalty in RANGE_PENALTIES
    for peer in PEERS
    if peer not in TOO_MUCH.get(model, ()) and has_penalty(peer, penalty)
]


@pytest.fixture(scope="module")
def model_weights() -> dict[str, list[Tensor]]:
    """The last model's weights: one model at a time is in memory."""
    return {}


@pytest.mark.parametrize(("model", "penalty", "peer"), CASES, ids="|".join)
def test_step(benchmark, model_weights: dict[str, list[Tensor]], model: str, penalty: str, peer: str) -> None:
    if model not in model_weights:
        model_weights.clear()
        gc.collect()
        model_weights[model] = weights(model)
    tensors = model_weights[model]
    floors = []
    flat = torch.cat([tensor.flatten() for tensor in tensors])

    def measure_floor() -> None:
        start = time.perf_counter()
        flat.sum()
        floors.append(time.perf_counter() - start)

    step = PEERS[peer](penalty, tensors)
    step()  # compiles, allocates
    benchmark.pedantic(step, setup=measure_floor, rounds=3 if peer == "eager PyTorch" else 15, iterations=1)
    benchmark.extra_info.update(
        model=model,
        penalty=penalty,
        peer=peer,
        tensors=len(tensors),
        parameters=flat.numel(),
        bytes=flat.numel() * flat.element_size(),
        floor=statistics.median(floors),
    )
