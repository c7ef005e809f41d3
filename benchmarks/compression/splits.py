"""Inputs with labels, which come in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

Batch = tuple[Tensor, Tensor]
Augmentation = Callable[[Tensor, Generator], Tensor]


class Split(Protocol):
    """Inputs with their labels."""

    def __len__(self) -> int:
        """How many there are."""

    def batches(self, size: int, generator: Generator | None = None) -> Iterator[Batch]:
        """All of them once: with a generator shuffled and augmented, for training; without one in order, as they are.

        Inputs are float32 (N, C, H, W) or int64 (N, T); labels int64 (N,) or (N, T). The last batch may be smaller, but
        a shuffled one is left out, so that batch normalization never sees a handful of images.
        """


@dataclass(frozen=True)
class TensorSplit:
    """A split that is held in memory.

    Args:
        inputs: (N, ...): images as float32, ready to use, or as uint8, to be normalized; or tokens as int64.
        labels: int64, (N,), or the shape of the tokens.
        mean, deviation: per channel, what uint8 images are normalized with (in units of 0 to 255).
        augmentation: what a shuffled batch goes through, before it is normalized.
    """

    inputs: Tensor
    labels: Tensor
    mean: Tensor | None = None
    deviation: Tensor | None = None
    augmentation: Augmentation | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, generator: Generator | None = None) -> Iterator[Batch]:
        count = len(self)
        if generator is None:
            for start in range(0, count, size):
                yield self._ready(self.inputs[start : start + size]), self.labels[start : start + size]
            return
        order = torch.randperm(count, generator=generator)
        for start in range(0, max(count - size, 0) + 1, size):
            chosen = order[start : start + size]
            inputs = self.inputs[chosen]
            if self.augmentation is not None:
                inputs = self.augmentation(inputs, generator)
            yield self._ready(inputs), self.labels[chosen]

    def _ready(self, inputs: Tensor) -> Tensor:
        if inputs.dtype != torch.uint8:
            return inputs
        assert self.mean is not None
        assert self.deviation is not None
        return (inputs.float() - self.mean[:, None, None]) / self.deviation[:, None, None]
