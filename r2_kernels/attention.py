"""The attention that entries of a weight pay to centroids, as coremltools' ``DKMPalettizer`` 9.0 has it by default."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_CLUSTERS = 256
# Probabilities below are raised to it, and pass no gradient on.
FLOOR = 1e-7
# Taken off the squared distance to centroid 0.
HEAD_START = 1e-7
# The iterations end when the sum of the least distances changes by no more.
SETTLED = 1e-4


def is_settled(before: float | None, now: float) -> bool:
    """Whether the iterations end, given the sums of the least distances of the last one and of this one."""
    return before is not None and before != 0 and abs(before - now) <= SETTLED


class Attention:
    """Of n entries to all K centroids, with its gradients: n x K numbers, so only ever of a few entries.

    Attributes:
        offsets: (n, K), entry minus centroid.
        least: (n,), the squared distance to the nearest centroid.
        raised: (n, K), softmax of the distances, raised to the floor.
    """

    def __init__(self, entries: Tensor, centroids: Tensor, temperature: float) -> None:
        self.offsets = entries[:, None] - centroids
        distances = self.offsets.square()
        distances[:, 0] -= HEAD_START
        self.least = distances.amin(1)
        self._probabilities = torch.softmax(-distances / temperature, 1)
        self.raised = self._probabilities.clamp(min=FLOOR)
        self._temperature = temperature

    def backward(self, of_raised: Tensor) -> Tensor:
        """From the gradient of ``raised`` to that of each centroid by each entry; the entry's is the same, negated."""
        p = self._probabilities
        of_probabilities = torch.where(p >= FLOOR, of_raised, 0)
        of_exponents = p * (of_probabilities - (p * of_probabilities).sum(1, keepdim=True))
        return of_exponents * self.offsets * (2 / self._temperature)
