"""Post-training quantization of the weights, per tensor, with PyTorch's own fake quantization."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

SCHEMES = ("symmetric", "asymmetric")


def quantize(weight: Tensor, bits: int, scheme: str) -> Tensor:
    """The weight rounded to the levels of a min-max quantizer.

    Symmetric: 2^bits - 1 levels between -max|w| and max|w|. Asymmetric: 2^bits levels from the minimum to the maximum,
    with zero among them.
    """
    if scheme == "symmetric":
        largest = 2 ** (bits - 1) - 1
        scale = weight.abs().max().item() / largest
        return torch.fake_quantize_per_tensor_affine(weight, max(scale, 1e-12), 0, -largest, largest)
    if scheme == "asymmetric":
        low, high = min(weight.min().item(), 0.0), max(weight.max().item(), 0.0)
        scale = max((high - low) / (2**bits - 1), 1e-12)
        return torch.fake_quantize_per_tensor_affine(weight, scale, round(-low / scale), 0, 2**bits - 1)
    raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")


def quantized(model: nn.Module, bits: int, scheme: str) -> nn.Module:
    """A copy of the model whose convolutions and linear layers have quantized weights."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.copy_(quantize(module.weight, bits, scheme))
    return copied
