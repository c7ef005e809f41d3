"""What a network is trained and measured on: three splits, a loss and a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.compression.accuracy import accuracy
from benchmarks.compression.splits import Split


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
