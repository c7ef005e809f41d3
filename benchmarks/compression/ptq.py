"""Post-training quantization: weights, then batch normalization's statistics, then activations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from benchmarks.compression.activations import quantize_activations_
from benchmarks.compression.batch_norm import reestimate_
from benchmarks.compression.dataset import Dataset
from benchmarks.compression.quantize import quantized

CALIBRATION_BATCH = 100
CALIBRATION_BATCHES = 20


@dataclass(frozen=True)
class PostTrainingQuantization:
    """Min-max quantization of all convolutions, linear layers and embeddings, with nothing trained.

    Args:
        activation_bits: None leaves activations as they are.
        has_reestimation: see batch normalization's statistics anew, on 2,000 training inputs.
    """

    bits: int
    scheme: str
    is_per_channel: bool = False
    activation_bits: int | None = None
    has_reestimation: bool = True

    def __str__(self) -> str:
        """A short name that is unique among compressions."""
        return "-".join(
            [
                f"ptq-{self.bits}bit-{self.scheme}",
                "channel" if self.is_per_channel else "tensor",
                *([f"a{self.activation_bits}"] if self.activation_bits is not None else []),
                *([] if self.has_reestimation else ["stale"]),
            ]
        )

    @property
    def family(self) -> str:
        """All settings but the bits of weights, in words."""
        words = ["PTQ", self.scheme, "per channel" if self.is_per_channel else "per tensor"]
        words += [f"{self.activation_bits}-bit activations"] if self.activation_bits is not None else []
        words += [] if self.has_reestimation else ["no re-estimation"]
        return ", ".join(words)

    def apply(self, model: nn.Module, dataset: Dataset, seed: int) -> nn.Module:
        """A quantized copy, in evaluation mode."""
        compressed = quantized(model, self.bits, self.scheme, self.is_per_channel).eval()
        generator = torch.Generator().manual_seed(seed)
        batches = (inputs for inputs, _ in dataset.train.batches(CALIBRATION_BATCH, generator))
        inputs = list(islice(batches, CALIBRATION_BATCHES))
        if self.has_reestimation:
            reestimate_(compressed, inputs)
        if self.activation_bits is not None:
            quantize_activations_(compressed, self.activation_bits, inputs)
        return compressed
