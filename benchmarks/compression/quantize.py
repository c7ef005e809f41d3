"""Uniform quantization of weights with PyTorch's own fake quantization, per tensor or per output channel."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

SCHEMES = ("symmetric", "asymmetric")
QUANTIZED_MODULES = (nn.Conv2d, nn.Linear, nn.Embedding)
SMALLEST_SCALE = 1e-12


def quantize(weight: Tensor, bits: int, scheme: str, is_per_channel: bool = False) -> Tensor:
    """The weight rounded to the levels of a min-max quantizer, one for all or one for each index of the first axis."""
    scale, zero_point, low, high = quantizer(weight, bits, scheme, is_per_channel)
    if is_per_channel:
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, low, high)
    return torch.fake_quantize_per_tensor_affine(weight, scale.float(), zero_point, low, high)


def quantizer(weight: Tensor, bits: int, scheme: str, is_per_channel: bool) -> tuple[Tensor, Tensor, int, int]:
    """Scale, zero point, lowest and highest level of a min-max quantizer; scalars, or one per output channel.

    Symmetric: 2^bits - 1 levels between -max|w| and max|w|. Asymmetric: 2^bits levels from the minimum to the maximum,
    with zero among them.

    Raises:
        ValueError: an unknown scheme.
    """
    flat = weight.detach().flatten(1) if is_per_channel else weight.detach().reshape(1, -1)
    if scheme == "symmetric":
        largest = 2 ** (bits - 1) - 1
        scale = flat.abs().amax(1).double() / largest
        zero_point, low, high = torch.zeros_like(scale), -largest, largest
    elif scheme == "asymmetric":
        low, high = 0, 2**bits - 1
        least, most = flat.amin(1).clamp(max=0).double(), flat.amax(1).clamp(min=0).double()
        scale = (most - least) / high
        zero_point = (-least / scale.clamp(min=SMALLEST_SCALE)).round()
    else:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    scale = scale.clamp(min=SMALLEST_SCALE)
    if is_per_channel:
        return scale.float(), zero_point.int(), low, high
    return scale[0], zero_point[0].int(), low, high


def quantized(model: nn.Module, bits: int, scheme: str, is_per_channel: bool = False) -> nn.Module:
    """A copy of the model whose convolutions, linear layers and embeddings have quantized weights."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, QUANTIZED_MODULES):
                module.weight.copy_(quantize(module.weight, bits, scheme, is_per_channel))
    return copied
