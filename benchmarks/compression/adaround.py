"""AdaRound (Nagel et al., arXiv 2004.10568): each weight goes up or down, whichever keeps the outputs of its layer.

Short and of its own: brevitas 0.13 has the rounding, but its training in examples only, and asks for a setuptools older
than what builds this project; torchao 0.18 has no AdaRound.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from benchmarks.compression.batch_norm import reestimate_
from benchmarks.compression.dataset import Dataset
from benchmarks.compression.quantize import quantize, quantizer

CALIBRATION_BATCH = 100
CALIBRATION_BATCHES = 10
STEP_BATCH = 32  # inputs of the layer in one step
LOW, HIGH = -0.1, 1.1  # what the sigmoid is stretched to, before it is cut off at zero and one
WARM_UP = 0.2  # of the steps, in which nothing pulls towards zero and one
FIRST_EXPONENT, LAST_EXPONENT = 20.0, 2.0  # of the pull: first on what is nearly decided, last on everything
PULL = 0.01
SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True)
class AdaptiveRounding:
    """Post-training quantization of all convolutions and linear layers with learned rounding, one after the other.

    Args:
        steps: of Adam, for each layer.
        learning_rate: of what decides the rounding.
    """

    bits: int
    scheme: str
    is_per_channel: bool = False
    steps: int = 1000
    learning_rate: float = 0.02

    def __str__(self) -> str:
        """A short name that is unique among compressions."""
        return (
            f"adaround-{self.bits}bit-{self.scheme}-{'channel' if self.is_per_channel else 'tensor'}-{self.steps}steps"
        )

    @property
    def family(self) -> str:
        """All settings but the bits, in words."""
        return f"AdaRound, {self.scheme}, {'per channel' if self.is_per_channel else 'per tensor'}"

    def apply(self, model: nn.Module, dataset: Dataset, seed: int) -> nn.Module:
        """A quantized copy, in evaluation mode, batch normalization's statistics seen anew."""
        generator = torch.Generator().manual_seed(seed)
        batches = (inputs for inputs, _ in dataset.train.batches(CALIBRATION_BATCH, generator))
        inputs = list(islice(batches, CALIBRATION_BATCHES))
        compressed = adaptively_rounded(model, self, inputs, generator)
        reestimate_(compressed, inputs)
        return compressed


def adaptively_rounded(
    model: nn.Module, settings: AdaptiveRounding, batches: Sequence[Tensor], generator: Generator
) -> nn.Module:
    """A copy of the model, in evaluation mode, with quantized convolutions, linear layers and embeddings.

    Each layer learns to give the original's outputs for the original's inputs from what the layers that are quantized
    already give it. An embedding's output is its weight, which rounding to nearest keeps best; so it is rounded.
    """
    original, compressed = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    called = _in_order_of_call(original, batches[0])
    for name, layer in compressed.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding)) and name not in called:
            _set_weight(layer, quantize(layer.weight, settings.bits, settings.scheme, settings.is_per_channel))
    for name in called:
        layer = compressed.get_submodule(name)
        outputs = _outputs(original.get_submodule(name), _inputs(original, name, batches))
        _set_weight(layer, rounded_weight(layer, settings, _inputs(compressed, name, batches), outputs, generator))
    return compressed


def rounded_weight(
    layer: nn.Conv2d | nn.Linear, settings: AdaptiveRounding, inputs: Tensor, outputs: Tensor, generator: Generator
) -> Tensor:
    """The layer's weight on the levels of its min-max quantizer, each entry on one of the two next to it.

    Args:
        inputs: as the layer takes them, (N, ...).
        outputs: what it shall give for them, (N, channels, ...) of a convolution, (N, channels) of a linear layer.
    """
    rounding = _Rounding(layer.weight, settings)
    rounding.to(layer.weight.device)
    optimizer = torch.optim.Adam(rounding.parameters(), lr=settings.learning_rate)
    # Errors in units of each channel's deviation, which is what a batch normalization makes of them.
    variance = outputs.transpose(0, 1).flatten(1).var(1).clamp(min=SMALLEST_VARIANCE)
    warm_up = round(WARM_UP * settings.steps)
    for step in range(settings.steps):
        chosen = torch.randint(len(inputs), (STEP_BATCH,), generator=generator).to(inputs.device)
        given = functional_call(layer, {"weight": rounding.weight(rounding.share_of_up())}, (inputs[chosen],))
        errors = (given - outputs[chosen]).square().transpose(0, 1).flatten(1).mean(1)
        loss = (errors / variance).sum()
        if step >= warm_up:
            progress = (step - warm_up) / (settings.steps - warm_up)
            loss = loss + PULL * rounding.indecision(_exponent(progress))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return rounding.weight((rounding.share_of_up() >= 0.5).float())


def _exponent(progress: float) -> float:
    return FIRST_EXPONENT + (LAST_EXPONENT - FIRST_EXPONENT) * progress


class _Rounding(nn.Module):
    """For each weight a share between zero, which is rounding down, and one, which is rounding up."""

    def __init__(self, weight: Tensor, settings: AdaptiveRounding) -> None:
        super().__init__()
        scale, zero_point, self.lowest, self.highest = quantizer(
            weight, settings.bits, settings.scheme, settings.is_per_channel
        )
        per_channel = (-1, *[1] * (weight.ndim - 1)) if settings.is_per_channel else ()
        self.scale, self.zero_point = scale.float().reshape(per_channel), zero_point.reshape(per_channel)
        levels = weight.detach() / self.scale
        self.down = levels.floor()
        # So that the share starts as what was left of the weight: as if nothing were quantized.
        start = (levels - self.down - LOW) / (HIGH - LOW)
        self.logits = nn.Parameter(start.logit())

    def share_of_up(self) -> Tensor:
        """Of the weight's shape, in [0, 1]."""
        return (self.logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def weight(self, share_of_up: Tensor) -> Tensor:
        """The weight for these shares."""
        levels = (self.down + share_of_up + self.zero_point).clamp(self.lowest, self.highest)
        return (levels - self.zero_point) * self.scale

    def indecision(self, exponent: float) -> Tensor:
        """The sum of 1 - |2 share - 1|^exponent: how many weights are neither up nor down."""
        return (1 - (2 * self.share_of_up() - 1).abs().pow(exponent)).sum()


@torch.no_grad()
def _in_order_of_call(model: nn.Module, inputs: Tensor) -> list[str]:
    """The names of the convolutions and linear layers that a forward pass calls."""
    called: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, given, name=name: called.setdefault(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    model(inputs)
    for hook in hooks:
        hook.remove()
    return list(called)


@torch.no_grad()
def _inputs(model: nn.Module, name: str, batches: Sequence[Tensor]) -> Tensor:
    """All that reaches the layer: (N, C, H, W) of a convolution, (N, C) of a linear layer."""
    layer, seen = model.get_submodule(name), []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0] if isinstance(layer, nn.Conv2d) else given[0].flatten(0, -2))

    hook = layer.register_forward_pre_hook(keep)
    for batch in batches:
        model(batch)
    hook.remove()
    return torch.cat(seen)


@torch.no_grad()
def _outputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([layer(part) for part in inputs.split(CALIBRATION_BATCH)])


@torch.no_grad()
def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    layer.weight.copy_(weight)
