"""Batch normalization's statistics, seen anew: quantized weights shift and scale what it normalizes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def reestimate_(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace running means and variances by the averages over these inputs; the model ends in evaluation mode."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain average of all batches
        layer.train()
    for inputs in batches:
        model(inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
