"""A convolution or linear layer with weights and inputs quantized while it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r2_kernels import ewgs

BOUND = 3.0  # standard deviations, where the bounds start


class QuantizedLayer(nn.Module):
    """Weights on levels between -1 and 1, times a learnable scale of the output; inputs on levels between two bounds.

    Args:
        layer: what is quantized; its weight stays its own.
        weight_bits, activation_bits: 2^bits levels each.
        delta: of ``ewgs``; zero is the straight-through estimator.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight_bits: int, activation_bits: int, delta: float) -> None:
        super().__init__()
        self.layer = layer
        self.weight_levels, self.activation_levels = 2**weight_bits, 2**activation_bits
        self.delta = delta
        bound = BOUND * layer.weight.detach().std()
        self.weight_lower, self.weight_upper = nn.Parameter(-bound), nn.Parameter(bound.clone())
        self.output_scale = nn.Parameter(bound.clone())
        self.input_lower, self.input_upper = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def start_bounds_(self, inputs: Tensor) -> None:
        """Bounds of the inputs: three standard deviations around the mean, as far as there are values."""
        mean, reach = inputs.mean(), BOUND * inputs.std()
        self.input_lower.copy_(torch.maximum(inputs.min(), mean - reach))
        self.input_upper.copy_(torch.minimum(inputs.max(), mean + reach))

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """All that learns beside the layer's own weight and bias."""
        return [self.weight_lower, self.weight_upper, self.output_scale, self.input_lower, self.input_upper]

    def quantized_weight(self) -> Tensor:
        """Of the layer's shape, on levels between -scale and scale."""
        scale = self.output_scale
        lower, upper = self.weight_lower, self.weight_upper
        return ewgs(self.layer.weight, lower, upper, -scale, scale, self.weight_levels, self.delta)

    def quantized_inputs(self, inputs: Tensor) -> Tensor:
        """Of the same shape, on levels between the bounds."""
        lower, upper = self.input_lower, self.input_upper
        return ewgs(inputs, lower, upper, lower, upper, self.activation_levels, self.delta)

    def forward(self, inputs: Tensor) -> Tensor:
        """As the layer's."""
        inputs, weight = self.quantized_inputs(inputs), self.quantized_weight()
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(inputs, weight, self.layer.bias)
        return self.layer._conv_forward(inputs, weight, self.layer.bias)
