"""The Lightning callback in real trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from r2_kernels import RangeRegularizer
from r2_kernels.lightning import RangeRegularization


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.0)


def batches() -> Any:
    data = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=8)


def fit(path: Path, epochs: int, callback: Any, checkpoint: Path | None = None, **settings: Any) -> pl.Trainer:
    settings = {"logger": False, "enable_checkpointing": False} | settings
    trainer = pl.Trainer(
        default_root_dir=path,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(Module(), batches(), ckpt_path=checkpoint, weights_only=None)
    return trainer


def callback(**settings: Any) -> RangeRegularization:
    return RangeRegularization(penalty="soft_min_max", strength=lambda step: 0.01 * (step + 1), **settings)


def by_hand(epochs: int, every: int = 1) -> list[Tensor]:
    module = Module()
    reg = RangeRegularizer(module, "soft_min_max", strength=lambda step: 0.01 * (step + 1))
    optimizer = torch.optim.AdamW([*module.parameters(), *reg.parameters()], lr=0.01, weight_decay=0.0)
    for _ in range(epochs):
        for index, batch in enumerate(batches()):
            (module.training_step(batch, 0) / every).backward()
            if (index + 1) % every == 0:
                reg.add_gradients_()
                optimizer.step()
                optimizer.zero_grad()
    return [parameter.detach() for parameter in [*module.parameters(), *reg.parameters()]]


@pytest.mark.parametrize("every", [1, 2])
def test_a_training_is_the_one_by_hand(tmp_path: Path, every: int) -> None:
    trainer = fit(tmp_path, 2, callback(), accumulate_grad_batches=every)
    parameters = list(trainer.model.parameters())
    assert all(map(torch.equal, parameters, by_hand(2, every)))
    assert trainer.model.range_regularizer.step == 8 // every
    assert trainer.callback_metrics["range_loss"] > 0


def test_resumed_from_a_checkpoint(tmp_path: Path) -> None:
    first = fit(tmp_path, 1, callback())
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = fit(tmp_path, 3, callback(), tmp_path / "last.ckpt")
    assert all(map(torch.equal, resumed.model.parameters(), by_hand(3)))
    assert resumed.model.range_regularizer.step == 12


def test_what_is_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, 2, callback(log_every_epochs=2), logger=TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert set(tags["histograms"]) == {"weights/network.0.weight", "weights/network.2.weight"}
    assert len(events.Histograms("weights/network.0.weight")) == 1
    assert len(events.Scalars("range_loss")) == 8
    assert {"penalty/network.0.weight", "max_over_std/network.2.weight"} <= set(tags["scalars"])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="log_every_epochs: expected at least 1, got 0"):
        RangeRegularization(log_every_epochs=0)
