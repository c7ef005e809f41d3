"""One training of the demo's network, with or without range regularization, and its accuracy after quantization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compression.accuracy import accuracy
from benchmarks.compression.digits import digits
from benchmarks.compression.mobilenet_v1 import small_mobilenet
from benchmarks.compression.quantize import SCHEMES, quantized
from benchmarks.compression.regularization import Regularization
from benchmarks.compression.splits import Batch, TensorSplit
from benchmarks.compression.training import Stepper, descend, parameter_groups
from r2_kernels import optim

OPTIMIZERS = ("torch", "r2_kernels")
BITS = (8, 4, 3, 2)
# The layer whose weights are shown: the last 1 × 1 convolution, the largest of the network.
SHOWN_LAYER = "blocks.4.3"


@dataclass
class Result:
    """Accuracies by "float" or (scheme, bits), on the validation and the test split, and the shown layer's weights."""

    settings: Regularization
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


def train(settings: Regularization, seed: int, steps: int, optimizer: str) -> Result:
    """Train a network, then measure it at every number of bits."""
    data = digits()
    model = fit(settings, seed, steps, data.train, optimizer)
    result = Result(settings, seed, weights=model.get_submodule(SHOWN_LAYER).weight.detach().flatten())
    models = {"float": model} | {(scheme, bits): quantized(model, bits, scheme) for scheme in SCHEMES for bits in BITS}
    for split, accuracies in ((data.validation, result.validation), (data.test, result.test)):
        accuracies.update({key: accuracy(measured, split) for key, measured in models.items()})
    return result


def fit(settings: Regularization, seed: int, steps: int, split: TensorSplit, optimizer: str) -> nn.Module:
    """The network after ``steps`` batches of 64, with Nesterov momentum and a cosine schedule; in evaluation mode.

    ``optimizer`` is one of ``OPTIMIZERS``: torch's takes the penalty's gradient as ``add_gradients_`` leaves it, the
    project's own has the penalty inside its step.
    """
    torch.manual_seed(seed)
    model = small_mobilenet().to(memory_format=torch.channels_last)  # Its steps take 0.6 of the time.
    regularizer = settings.regularizer(model)
    groups = parameter_groups(model, regularizer, settings, weight_decay=5e-4)
    sgd: torch.optim.Optimizer
    if optimizer == "r2_kernels":
        sgd = optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, regularizer=regularizer)
    else:
        sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    before = regularizer if optimizer == "torch" else None
    descend(model, _random_batches(split, steps), Stepper(sgd, schedule, before))
    return model.eval()


def _random_batches(split: TensorSplit, count: int) -> Iterator[Batch]:
    for _ in range(count):
        chosen = torch.randint(len(split), (64,))
        yield split.inputs[chosen], split.labels[chosen]
