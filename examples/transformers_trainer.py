"""``python examples/transformers_trainer.py``: a GPT-2 built from a config, trained with R² by Hugging Face's trainer.

It learns the next byte of Python's own standard library, once plainly and once with range regularization, and shows the
loss with weights rounded to 3 bits. Needs `pip install "r2_kernels[transformers]"`, and no download.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import tempfile

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from r2_kernels import RangeRegularizer
from r2_kernels.transformers import RangeRegularizationCallback

LENGTH = 64


def windows(count: int) -> list[dict[str, Tensor]]:
    """Byte sequences of the standard library, the same on every call."""
    sources = sorted(pathlib.Path(tempfile.__file__).parent.glob("*.py"))
    text = b"".join(path.read_bytes() for path in sources)
    starts = torch.randint(0, len(text) - LENGTH, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [torch.tensor(list(text[start : start + LENGTH])) for start in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def train(steps: int, strength: float | None) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4))
    callbacks = []
    if strength is not None:
        callbacks.append(RangeRegularizationCallback(RangeRegularizer(model, "linf", strength=strength)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=windows(16 * steps), callbacks=callbacks).train()
    return model.eval()


@torch.no_grad()
def loss(model: GPT2LMHeadModel, bits: int | None = None) -> float:
    """In nats a byte, on windows that are not trained on; with ``bits``, of symmetric per-tensor quantized weights."""
    model = copy.deepcopy(model)
    for weight in model.parameters():
        if bits is not None and weight.ndim >= 2:
            step = weight.abs().max() / (2 ** (bits - 1) - 1)
            weight.copy_((weight / step).round() * step)
    held_out = torch.stack([row["input_ids"] for row in windows(4096)[-64:]]).to(model.device)
    return float(model(input_ids=held_out, labels=held_out).loss)


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """The losses in full precision and at 3 bits, plain and regularized."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="of training, at most 250 (default: 150)")
    parser.add_argument("--strength", type=float, default=0.03, help="of the penalty (default: 0.03)")
    options = parser.parse_args(arguments)
    losses = {}
    for name, strength in (("plain", None), ("with R²", options.strength)):
        model = train(options.steps, strength)
        losses[name] = loss(model), loss(model, bits=3)
        print(f"{name:8} loss {losses[name][0]:.3f}, with 3-bit weights {losses[name][1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
