"""A callback for Hugging Face's ``Trainer`` that trains with range regularization (extra ``transformers``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from r2_kernels.regularizer import RangeRegularizer

FILE = "range_regularizer.pt"


class RangeRegularizationCallback(TrainerCallback):
    """Adds the penalty's gradients before each step of the trainer's optimizer, after its clipping.

    M or the temperature has an optimizer of its own, since the trainer builds its from the model. Both are saved with
    each checkpoint, as ``range_regularizer.pt``, and loaded where ``trainer.train`` resumes from one in its
    ``output_dir``.

    Args:
        regularizer: of the model that is trained.
        learning_rate: AdamW's, for M or the temperature.

    Raises:
        ValueError: at the start of a training with ``fp16`` and without ``max_grad_norm``, which leaves the gradients
            scaled.
        FileNotFoundError: a training resumes, and its checkpoint has no state of a regularizer.
    """

    def __init__(self, regularizer: RangeRegularizer, *, learning_rate: float = 0.1) -> None:
        self.regularizer = regularizer
        own = list(regularizer.parameters())
        self.optimizer = torch.optim.AdamW(own, lr=learning_rate, weight_decay=0.0) if own else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16 and not args.max_grad_norm:
            raise ValueError("max_grad_norm: expected a positive one with fp16, since the trainer then unscales")
        self.regularizer.to(self.regularizer.weights()[0].device)
        if state.global_step:
            saved = torch.load(_checkpoint(args, state) / FILE, weights_only=True)
            self.regularizer.load_state_dict(saved["regularizer"])
            if self.optimizer is not None:
                self.optimizer.load_state_dict(saved["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.regularizer.zero_grad()
        self.regularizer.add_gradients_()
        if self.optimizer is not None:
            self.optimizer.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            saved = {
                "regularizer": self.regularizer.state_dict(),
                "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            }
            torch.save(saved, _checkpoint(args, state) / FILE)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
