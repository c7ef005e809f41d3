"""How often a network is right."""

from __future__ import annotations

import torch
from torch import nn

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
