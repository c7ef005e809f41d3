"""The operators of ``dkm_ops.py`` in plain PyTorch, in float64, with the attention of one chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from r2_kernels.attention import Attention, is_settled
from r2_kernels.layout import empty_dense_like
from r2_kernels.penalties import CHUNK_SIZE
from r2_kernels.validation import value_dtype


def dkm_forward(
    weight: Tensor, centroids: Tensor, temperature: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    history = centroids.to(value_dtype([weight])).repeat(iterations + 1, 1)
    totals = history.new_zeros(iterations, len(centroids), dtype=torch.float64)
    inertia: float | None = None
    step = 0
    for step in range(iterations if weight.numel() else 0):
        moments = torch.zeros_like(totals[step])
        before, inertia = inertia, 0.0
        for chunk in _chunks(weight):
            attention = Attention(chunk, history[step].double(), temperature)
            totals[step] += attention.raised.sum(0)
            moments += (attention.raised * attention.offsets).sum(0)
            inertia += attention.least.sum().item()
        history[step + 1 :] = history[step] + moments / totals[step]
        if is_settled(before, inertia):
            break
    start, end = history[step].double(), history[-1].double()
    outputs = [Attention(chunk, start, temperature).raised @ end for chunk in _chunks(weight)]
    return _as_stored(outputs, weight), history, totals


def dkm_backward(weight: Tensor, history: Tensor, totals: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    centroids = history.double()
    pairs = list(zip(_chunks(weight), _chunks(gradient), strict=True))
    last = int((totals[:, 0] != 0).sum()) - 1
    of_centroids = torch.zeros_like(totals[0])
    for chunk, given in pairs:
        of_centroids += given @ Attention(chunk, centroids[last], temperature).raised
    result = [torch.zeros_like(chunk) for chunk, _ in pairs]
    for step in range(last, -1, -1):
        shares = of_centroids / totals[step]
        of_centroids = torch.zeros_like(of_centroids)
        for (chunk, given), of_chunk in zip(pairs, result, strict=True):
            attention = Attention(chunk, centroids[step], temperature)
            of_attention = shares * (chunk[:, None] - centroids[step + 1])
            if step == last:
                of_attention += given[:, None] * centroids[step + 1]
            slopes = attention.backward(of_attention)
            of_chunk += attention.raised @ shares - slopes.sum(1)
            of_centroids += slopes.sum(0)
    return _as_stored(result, weight)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """In the order of the dimensions, float64."""
    if tensor.numel() == 0:
        return
    for chunk in tensor.detach().reshape(-1).split(CHUNK_SIZE):
        yield chunk.double()


def _as_stored(chunks: list[Tensor], weight: Tensor) -> Tensor:
    """In the weight's shape and dtype and, where it is dense, layout."""
    stored = empty_dense_like(weight)
    return stored.copy_(torch.cat(chunks).reshape(weight.shape)) if chunks else stored
