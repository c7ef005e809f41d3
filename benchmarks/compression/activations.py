"""Quantization of what enters each convolution and linear layer, with ranges seen on a few batches of training data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.compression.quantize import SMALLEST_SCALE


class InputQuantizer:
    """A forward pre-hook: first it notes the range of a layer's input, then it rounds the input to levels in it."""

    def __init__(self, bits: int) -> None:
        self.highest = 2**bits - 1
        self.least, self.most = 0.0, 0.0  # zero is always a level: padding and ReLU give it
        self.is_calibrating = True

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (values,) = inputs
        if self.is_calibrating:
            self.least = min(self.least, values.min().item())
            self.most = max(self.most, values.max().item())
            return inputs
        scale = max((self.most - self.least) / self.highest, SMALLEST_SCALE)
        zero_point = round(-self.least / scale)
        return (torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, self.highest),)


@torch.no_grad()
def quantize_activations_(model: nn.Module, bits: int, calibration: Iterable[Tensor]) -> None:
    """From now on the inputs of the model's convolutions and linear layers are quantized, asymmetric, per tensor.

    Args:
        calibration: batches of inputs, whose smallest and largest activations bound the levels.
    """
    quantizers = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            quantizers.append(InputQuantizer(bits))
            module.register_forward_pre_hook(quantizers[-1])
    for inputs in calibration:
        model(inputs)
    for quantizer in quantizers:
        quantizer.is_calibrating = False
