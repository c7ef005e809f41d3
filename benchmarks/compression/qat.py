"""Quantization-aware training: weights and activations quantized while the trained network is fine-tuned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.compression.dataset import Dataset
from benchmarks.compression.quantized_layer import QuantizedLayer
from benchmarks.compression.training import Stepper, Training, descend, warm_up_and_cosine

CALIBRATION_BATCH = 250
EWGS_DELTA = 1e-3


@dataclass(frozen=True)
class QuantizationAwareTraining:
    """All convolutions and linear layers but the first and the last, as the EWGS paper does.

    Args:
        bits: of weights and of activations.
        delta: of EWGS; zero is the straight-through estimator.
        training: of the quantized network, from the trained one's weights.
        bounds_learning_rate: of bounds and output scales.
    """

    bits: int
    delta: float
    training: Training
    bounds_learning_rate: float

    @property
    def family(self) -> str:
        """All settings but the bits, in words."""
        return f"QAT, {'EWGS' if self.delta else 'STE'}, weights and activations"

    def __str__(self) -> str:
        """A short name that is unique among compressions."""
        return f"qat-{'ewgs' if self.delta else 'ste'}-{self.bits}bit-{self.training.epochs}epochs"

    def apply(self, model: nn.Module, dataset: Dataset, seed: int) -> nn.Module:
        """A quantized and trained copy, in evaluation mode."""
        compressed = copy.deepcopy(model).eval()
        layers = quantize_layers_(compressed, self.bits, self.delta)
        inputs, _ = next(dataset.train.batches(CALIBRATION_BATCH))
        start_bounds_(compressed, inputs)
        of_quantizers = [parameter for layer in layers for parameter in layer.quantizer_parameters()]
        chosen = {id(parameter) for parameter in of_quantizers}
        rest = [parameter for parameter in compressed.parameters() if id(parameter) not in chosen]
        optimizer = self.training.make_optimizer(
            [
                {"params": rest, "weight_decay": self.training.weight_decay},
                {"params": of_quantizers, "lr": self.bounds_learning_rate, "weight_decay": 0.0},
            ]
        )
        steps = self.training.epochs * (len(dataset.train) // self.training.batch)
        stepper = Stepper(optimizer, warm_up_and_cosine(optimizer, steps))
        generator = torch.Generator().manual_seed(seed)
        compressed.train()
        for _ in range(self.training.epochs):
            batches = dataset.train.batches(self.training.batch, generator)
            descend(compressed, batches, stepper, dataset.loss, self.training.is_bfloat16)
        return compressed.eval()


def quantize_layers_(model: nn.Module, bits: int, delta: float) -> list[QuantizedLayer]:
    """Exchange the model's convolutions and linear layers, but the first and the last, for quantized ones."""
    places = list(_places(model))
    quantized = []
    for parent, name, layer in places[1:-1]:
        quantized.append(QuantizedLayer(layer, bits, bits, delta))
        setattr(parent, name, quantized[-1])
    return quantized


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.Conv2d, nn.Linear)):
                yield parent, name, child


@torch.no_grad()
def start_bounds_(model: nn.Module, inputs: Tensor) -> None:
    """Start each quantized layer's input bounds from what reaches it, the layers before it being quantized already."""

    def start(module: nn.Module, given: tuple[Tensor]) -> None:
        module.start_bounds_(given[0])

    hooks = [
        module.register_forward_pre_hook(start) for module in model.modules() if isinstance(module, QuantizedLayer)
    ]
    model(inputs)
    for hook in hooks:
        hook.remove()
