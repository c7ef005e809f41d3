"""What a network is trained and measured on: three splits, a loss and a score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from benchmarks.compression.accuracy import accuracy
from benchmarks.compression.splits import Batch, Split


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over labels of any shape; the classes are the logits' last axis."""
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


@dataclass(frozen=True)
class Dataset:
    """Networks are trained on ``train``, settings chosen by ``validation``; ``test`` is only reported.

    Args:
        classes: how many labels there are (of tokens: the vocabulary).
        shape: of one input, (C, H, W) or (T,).
        loss: of a model's outputs and the labels, a scalar that training lowers.
        score: of a model in evaluation mode on a split, in percent, more is better.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    shape: tuple[int, ...]
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    score: Callable[[nn.Module, Split], float] = accuracy

    def on(self, device: torch.device) -> Dataset:
        """The same with all batches on this device."""
        if device.type == "cpu":
            return self
        train, validation, test = (OnDevice(split, device) for split in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)


@dataclass(frozen=True)
class OnDevice:
    """A split whose batches are moved as they come."""

    split: Split
    device: torch.device

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, size: int, generator: Generator | None = None) -> Iterator[Batch]:
        for inputs, labels in self.split.batches(size, generator):
            yield inputs.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
