"""The callback of Hugging Face's trainer in real trainings of a model that is built from a config."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from r2_kernels import RangeRegularizer
from r2_kernels.transformers import RangeRegularizationCallback


def build(penalty: str) -> tuple[Any, RangeRegularizer]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    return model, RangeRegularizer(model, penalty, strength=lambda step: 0.01 * (step + 1), exclude="*embeddings*")


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (24, 8), generator=generator)
    return [{"input_ids": row, "labels": (row.sum() % 2).long()} for row in tokens]


def train(path: Path, penalty: str, steps: int, resume: bool = False, **settings: Any) -> list[Tensor]:
    model, reg = build(penalty)
    arguments = TrainingArguments(
        str(path), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_steps=3,
        lr_scheduler_type="constant", learning_rate=1e-2, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data(), callbacks=[RangeRegularizationCallback(reg)])
    trainer.train(resume_from_checkpoint=resume)
    assert reg.step == steps
    return [parameter.detach().clone() for parameter in [*model.parameters(), *reg.parameters()]]


@pytest.mark.parametrize("penalty", ["linf", "soft_min_max"])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, penalty: str) -> None:
    whole = train(tmp_path / "whole", penalty, 6)
    train(tmp_path / "parts", penalty, 3)
    resumed = train(tmp_path / "parts", penalty, 6, resume=True)
    assert all(map(torch.equal, resumed, whole))


def test_the_range_shrinks(tmp_path: Path) -> None:
    model, reg = build("linf")
    before = sum(reg.losses().values()).item()
    arguments = TrainingArguments(str(tmp_path), max_steps=20, use_cpu=True, report_to=[], disable_tqdm=True)
    Trainer(model, arguments, train_dataset=data(), callbacks=[RangeRegularizationCallback(reg)]).train()
    with_penalty = sum(reg.losses().values()).item()
    plain, plain_reg = build("linf")
    Trainer(plain, arguments, train_dataset=data()).train()
    assert with_penalty < before
    assert with_penalty < sum(plain_reg.losses().values()).item()


def test_scaled_gradients_are_refused() -> None:
    callback = RangeRegularizationCallback(build("linf")[1])
    arguments = TrainingArguments(max_grad_norm=0.0, report_to=[])
    arguments.fp16 = True
    with pytest.raises(ValueError, match="max_grad_norm: expected a positive one with fp16"):
        callback.on_train_begin(arguments, None, None)


def test_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    losses = importlib.import_module("transformers_trainer").main(["--steps", "3"])
    assert list(losses) == ["plain", "with R²"]
    assert all(0 < loss < 10 for pair in losses.values() for loss in pair)
    assert losses["plain"] != losses["with R²"]
