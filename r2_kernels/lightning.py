"""A Lightning callback that trains with range regularization (extra ``lightning``)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from r2_kernels.regularizer import RangeRegularizer


class RangeRegularization(Callback):
    """Adds the penalty's gradients before each step of the optimizer, and logs what the layers look like.

    The regularizer becomes the submodule ``range_regularizer`` of the trained module before ``configure_optimizers``
    runs, so that ``self.parameters()`` has its M or temperature, the trainer moves it, and checkpoints hold it. The
    penalty joins the gradients after a ``GradScaler`` has unscaled them and before they are clipped.

    Args:
        log_every_epochs: how often to log each layer's penalty, range and outliers as scalars, and its weights as a
            histogram where the logger has ``experiment.add_histogram``, as TensorBoard's does.
        settings: what ``RangeRegularizer`` takes besides the model.

    Raises:
        ValueError: as ``RangeRegularizer`` does; ``log_every_epochs`` below 1.
    """

    def __init__(self, *, log_every_epochs: int = 1, **settings: Any) -> None:
        if log_every_epochs < 1:
            raise ValueError(f"log_every_epochs: expected at least 1, got {log_every_epochs}")
        self.log_every_epochs = log_every_epochs
        self.settings = settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "range_regularizer"):
            pl_module.range_regularizer = RangeRegularizer(pl_module, **self.settings)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        pl_module.log("range_loss", _regularizer_of(pl_module).add_gradients_())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.log_every_epochs:
            return
        regularizer = _regularizer_of(pl_module)
        pl_module.log_dict(regularizer.report().scalars())
        for logger in trainer.loggers:
            add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            if add_histogram is not None:
                for name, weight in zip(regularizer.names, regularizer.weights(), strict=True):
                    add_histogram(f"weights/{name}", weight.detach().float(), trainer.global_step)


def _regularizer_of(module: LightningModule) -> RangeRegularizer:
    regularizer = module.range_regularizer
    assert isinstance(regularizer, RangeRegularizer)
    return regularizer
