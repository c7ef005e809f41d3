"""One training of the small network, with or without range regularization, and its accuracy after quantization."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compression.data import Split, digits
from benchmarks.compression.models import SmallMobileNet
from benchmarks.compression.quantize import SCHEMES, quantized
from r2_kernels import RangeRegularizer

BITS = (8, 4, 3, 2)
# The layer whose weights are shown: the last 1 × 1 convolution, the largest of the network.
SHOWN_LAYER = "blocks.4.3"


@dataclass(frozen=True)
class Settings:
    """What one training is regularized with; ``start`` is the temperature, or M in standard deviations."""

    penalty: str | None = None
    strength: float = 0.0
    start: float | None = None
    learning_rate: float | None = None  # of the temperature or M

    def regularizer(self, model: nn.Module) -> RangeRegularizer | None:
        if self.penalty is None:
            return None
        parameter = {"soft_min_max": "temperature", "margin": "margin"}.get(self.penalty)
        start = {} if parameter is None else {parameter: self.start}
        return RangeRegularizer(model, self.penalty, strength=self.strength, **start)


@dataclass
class Result:
    """Accuracies by "float" or (scheme, bits), on the validation and the test split, and the shown layer's weights."""

    settings: Settings
    seed: int
    validation: dict[Any, float] = field(default_factory=dict)
    test: dict[Any, float] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.empty(0))

    def score(self) -> float:
        """What settings are chosen by: the mean validation accuracy at 4, 3 and 2 bits, both schemes."""
        low = [self.validation[scheme, bits] for scheme in SCHEMES for bits in BITS if bits <= 4]
        return sum(low) / len(low)

    def as_json(self) -> dict[str, Any]:
        def named(accuracies: dict[Any, float]) -> dict[str, float]:
            return {
                key if isinstance(key, str) else f"{key[0]} {key[1]} bit": value for key, value in accuracies.items()
            }

        return {
            "settings": asdict(self.settings),
            "seed": self.seed,
            "validation": named(self.validation),
            "test": named(self.test),
        }


def train(settings: Settings, seed: int, steps: int) -> Result:
    """Train a network, then measure it at every number of bits."""
    data = digits()
    model = fit(settings, seed, steps, data.train)
    result = Result(settings, seed, weights=model.get_submodule(SHOWN_LAYER).weight.detach().flatten())
    models = {"float": model} | {(scheme, bits): quantized(model, bits, scheme) for scheme in SCHEMES for bits in BITS}
    for split, accuracies in ((data.validation, result.validation), (data.test, result.test)):
        accuracies.update({key: accuracy(measured, split) for key, measured in models.items()})
    return result


def fit(settings: Settings, seed: int, steps: int, data: Split) -> SmallMobileNet:
    """The network after ``steps`` batches of 64, with Nesterov momentum and a cosine schedule; in evaluation mode."""
    torch.manual_seed(seed)
    model = SmallMobileNet().to(memory_format=torch.channels_last)  # Its steps take 0.6 of the time.
    regularizer = settings.regularizer(model)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "weight_decay": 5e-4}]
    if regularizer is not None and settings.learning_rate is not None:
        groups.append({"params": list(regularizer.parameters()), "lr": settings.learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(data.labels), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.images[batch]), data.labels[batch]).backward()
        if regularizer is not None:
            regularizer.add_gradients_()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """In percent."""
    return (model(split.images).argmax(1) == split.labels).float().mean().item() * 100
