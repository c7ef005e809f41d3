"""KURE (Shkolnik et al., arXiv 2002.07686): the kurtosis of each weight tensor pushed to that of a uniform one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

UNIFORM = 1.8  # the kurtosis of a uniform distribution, and KURE's target


def kurtosis(weight: Tensor) -> Tensor:
    """The mean of ((w - mean) / deviation)^4, a scalar; 3 for normal weights."""
    centered = weight - weight.mean()
    return centered.pow(4).mean() / centered.pow(2).mean().pow(2)


class KurtosisRegularizer:
    """strength · the mean over the weights of two or more dimensions of (kurtosis - 1.8)²."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.strength = strength
        self._weights = [parameter for parameter in model.parameters() if parameter.ndim >= 2]

    def add_gradients_(self) -> None:
        """Through autograd."""
        with torch.enable_grad():
            values = torch.stack([kurtosis(weight) for weight in self._weights])
            loss = self.strength * (values - UNIFORM).square().mean()
        for weight, gradient in zip(self._weights, torch.autograd.grad(loss, self._weights), strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    def parameters(self) -> Iterator[nn.Parameter]:
        """None to learn: the weights are the model's."""
        return iter(())
