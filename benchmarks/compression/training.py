"""The training of a network, whatever it is regularized with: the same data, schedule and budget for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from benchmarks.compression.dataset import Dataset, cross_entropy
from benchmarks.compression.regularization import Regularization, Regularizer
from benchmarks.compression.splits import Batch
from r2_kernels import RangeRegularizer, optim

WARM_UP = 0.1  # of all steps: the learning rate rises from zero
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Training:
    """How long and how a network is trained.

    Args:
        optimizer: "sgd" (with Nesterov momentum 0.9) or "adamw".
        learning_rate: the highest, after a tenth of the steps; then it falls as a cosine, to zero.
        is_bfloat16: compute under bfloat16 autocast; weights stay float32.
        is_decoupled: the penalties take a step of plain gradient descent of their own, of length strength times
            gradient where the learning rate is highest, as AdamW's weight decay does. (In Adam's step an outlier would
            move as fast as any other weight, whatever the strength.)
    """

    epochs: int
    batch: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    is_bfloat16: bool = False
    is_decoupled: bool = False

    def make_optimizer(self, groups: list[dict[str, Any]], regularizer: RangeRegularizer | None = None) -> Optimizer:
        """The optimizer, which takes the penalty of ``regularizer`` into its step."""
        if self.optimizer == "sgd":
            return optim.SGD(groups, lr=self.learning_rate, momentum=0.9, nesterov=True, regularizer=regularizer)
        if self.optimizer == "adamw":
            return optim.AdamW(groups, lr=self.learning_rate, regularizer=regularizer)
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")


def parameter_groups(
    model: nn.Module, regularizer: Regularizer | None, regularization: Regularization, weight_decay: float
) -> list[dict[str, Any]]:
    """The model's parameters, and the temperature or M, which no weight decay pulls to zero."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    if regularizer is not None and regularization.learning_rate is not None:
        groups.append(
            {"params": list(regularizer.parameters()), "lr": regularization.learning_rate, "weight_decay": 0.0}
        )
    return groups


def train(
    model: nn.Module, dataset: Dataset, training: Training, regularization: Regularization, seed: int
) -> list[dict[str, Any]]:
    """Train the model in place and leave it in evaluation mode.

    Returns:
        Before the first epoch and after each: the epoch, its mean loss, and max|w| / std of each regularized layer.
    """
    generator = torch.Generator().manual_seed(seed)
    regularizer = regularization.regularizer(model)
    stepper = _stepper(model, training, regularizer, regularization, len(dataset.train) // training.batch)
    history = [{"epoch": 0, "loss": None, "max_over_std": max_over_std(model)}]
    model.train()
    for epoch in range(1, training.epochs + 1):
        batches = dataset.train.batches(training.batch, generator)
        loss = descend(model, batches, stepper, dataset.loss, training.is_bfloat16)
        history.append({"epoch": epoch, "loss": loss, "max_over_std": max_over_std(model)})
    model.eval()
    return history


def _stepper(
    model: nn.Module,
    training: Training,
    regularizer: Regularizer | None,
    regularization: Regularization,
    steps_per_epoch: int,
) -> Stepper:
    steps = training.epochs * steps_per_epoch
    if regularizer is None or not training.is_decoupled:
        groups = parameter_groups(model, regularizer, regularization, training.weight_decay)
        inside, before = (regularizer, None) if isinstance(regularizer, RangeRegularizer) else (None, regularizer)
        optimizer = training.make_optimizer(groups, inside)
        return Stepper(optimizer, warm_up_and_cosine(optimizer, steps), before)
    optimizer = training.make_optimizer(parameter_groups(model, None, regularization, training.weight_decay))
    own = torch.optim.SGD(parameter_groups(model, regularizer, regularization, weight_decay=0.0), lr=1.0)
    return DecoupledStepper(
        optimizer,
        warm_up_and_cosine(optimizer, steps),
        regularizer,
        own_optimizer=own,
        own_schedule=warm_up_and_cosine(own, steps),
    )


@dataclass
class Stepper:
    """What happens between backward and the next batch; ``regularizer`` is one that the optimizer does not carry."""

    optimizer: Optimizer
    schedule: LRScheduler
    regularizer: Regularizer | None = None

    def step(self) -> None:
        """One step along the gradients of the task and of the penalty."""
        if self.regularizer is not None:
            self.regularizer.add_gradients_()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


@dataclass
class DecoupledStepper(Stepper):
    """First a step along the task's gradients, then one along the penalty's."""

    own_optimizer: Optimizer = field(kw_only=True)
    own_schedule: LRScheduler = field(kw_only=True)

    def step(self) -> None:
        """Two steps."""
        self.optimizer.step()
        self.schedule.step()
        self.own_optimizer.zero_grad()
        self.regularizer.add_gradients_()
        self.own_optimizer.step()
        self.own_schedule.step()
        self.own_optimizer.zero_grad()


def descend(
    model: nn.Module,
    batches: Iterable[Batch],
    stepper: Stepper,
    loss_of: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    is_bfloat16: bool = False,
) -> float:
    """One step for each batch; the mean of the losses.

    Raises:
        FloatingPointError: if that is not finite: the training has diverged.
    """
    losses = []
    for inputs, labels in batches:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=is_bfloat16):
            outputs = model(inputs)
        loss = loss_of(outputs, labels)
        loss.backward()
        stepper.step()
        losses.append(loss.detach())
    mean = torch.stack(losses).mean().item()
    if not math.isfinite(mean):
        raise FloatingPointError(f"the training's loss is {mean}: it has diverged")
    return mean


def warm_up_and_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Each group's learning rate times a factor that rises to one and falls to zero."""
    rising = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return LambdaLR(optimizer, factor)


def max_over_std(model: nn.Module) -> dict[str, float]:
    """How far the largest weight of each layer stands out, by name."""

    def ratio(weight: Tensor) -> float:
        return (weight.abs().max() / weight.std()).item()

    return {name: ratio(weight.detach()) for name, weight in model.named_parameters() if weight.ndim >= 2}
