"""L2 alone, on the same weights as the range penalties: the peer that everyone has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class L2Regularizer:
    """strength / 2 · Σ w² over the weights of two or more dimensions, on top of the training's usual weight decay."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.strength = strength
        self._weights = [parameter for parameter in model.parameters() if parameter.ndim >= 2]

    @torch.no_grad()
    def add_gradients_(self) -> None:
        """strength · w."""
        for weight in self._weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.add_(weight, alpha=self.strength)

    def parameters(self) -> Iterator[nn.Parameter]:
        """None to learn: the weights are the model's."""
        return iter(())
