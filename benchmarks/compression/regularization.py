"""What a network is regularized with while it trains: one of the range penalties, one of their peers, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from benchmarks.compression.l2 import L2Regularizer
from r2_kernels import RangeRegularizer
from r2_kernels.penalties import PENALTIES

PEERS = ("l2",)
KINDS = (None, *PEERS, *PENALTIES)
TITLES = {
    None: "plain",
    "l2": "L2",
    "kurtosis": "KURE",
    "linf": "L∞",
    "margin": "margin",
    "soft_min_max": "soft-min-max",
}
LEARNABLE = {"soft_min_max": "temperature", "margin": "margin"}


class Regularizer(Protocol):
    """Adds its gradients to the task's, between backward and the optimizer's step."""

    def add_gradients_(self) -> object: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Regularization:
    """Settings of one training.

    Args:
        penalty: one of ``KINDS``; None trains plainly.
        start: the temperature, or M in standard deviations, where the penalty has one.
        learning_rate: of the temperature or M.
    """

    penalty: str | None = None
    strength: float = 0.0
    start: float | None = None
    learning_rate: float | None = None

    def __str__(self) -> str:
        """A short name that is unique among settings."""
        if self.penalty is None:
            return "plain"
        numbers = (self.strength, self.start, self.learning_rate)
        return "-".join([self.penalty, *(f"{number:g}" for number in numbers if number is not None)])

    def regularizer(self, model: nn.Module) -> Regularizer | None:
        """For this model's weights of two or more dimensions.

        Raises:
            ValueError: an unknown penalty.
        """
        if self.penalty is None:
            return None
        if self.penalty == "l2":
            return L2Regularizer(model, self.strength)
        name = LEARNABLE.get(self.penalty)
        start = {} if name is None else {name: self.start}
        strength = self.strength
        if self.penalty == "kurtosis":  # KURE is the mean over the layers, not the sum.
            strength /= sum(parameter.ndim >= 2 for parameter in model.parameters())
        return RangeRegularizer(model, self.penalty, strength=strength, **start)
