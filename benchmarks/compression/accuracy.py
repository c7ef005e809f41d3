"""How good a network is, in percent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.compression.splits import Split

BATCH = 250


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """The share of labels that are the largest logit, in percent; the model must be in evaluation mode."""
    right, count = 0, 0
    for inputs, labels in split.batches(BATCH):
        right += int((model(inputs).argmax(-1) == labels).sum())
        count += labels.numel()
    return 100 * right / count


@torch.no_grad()
def neighbour_agreement(model: nn.Module, split: Split) -> float:
    """For how many inputs, in percent, the nearest other one is the same by the model's vectors as by the labels."""
    batches = [(model(inputs), labels) for inputs, labels in split.batches(BATCH)]
    found, wanted = (_nearest(torch.cat(vectors)) for vectors in zip(*batches, strict=True))
    return 100 * (found == wanted).float().mean().item()


def _nearest(vectors: Tensor) -> Tensor:
    """The index of each vector's nearest other one by angle, int64 (N,)."""
    unit = nn.functional.normalize(vectors, dim=1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(1)
