"""DKM (Cho et al., arXiv 2108.12659): differentiable k-means, by coremltools."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.compression.dataset import Dataset
from benchmarks.compression.training import Stepper, Training, descend, warm_up_and_cosine

if TYPE_CHECKING:
    from coremltools.optimize.torch.palettization import DKMPalettizer


@dataclass(frozen=True)
class Palettization:
    """Each layer's weights come from a palette of 2^bits values that is learned while the network is fine-tuned.

    Args:
        training: of the palettized network, from the trained one's weights.
    """

    bits: int
    training: Training

    @property
    def family(self) -> str:
        """All settings but the bits, in words."""
        return "DKM palettes"

    def __str__(self) -> str:
        """A short name that is unique among compressions."""
        return f"dkm-{self.bits}bit-{self.training.epochs}epochs"

    def apply(self, model: nn.Module, dataset: Dataset, seed: int) -> nn.Module:
        """A palettized and trained copy, in evaluation mode."""
        palettizer = self._palettizer(copy.deepcopy(model))
        compressed = palettizer.prepare()
        optimizer = self.training.make_optimizer(
            [{"params": list(compressed.parameters()), "weight_decay": self.training.weight_decay}]
        )
        steps = self.training.epochs * (len(dataset.train) // self.training.batch)
        stepper = Stepper(optimizer, warm_up_and_cosine(optimizer, steps))
        generator = torch.Generator().manual_seed(seed)
        compressed.train()
        for _ in range(self.training.epochs):
            for batch in dataset.train.batches(self.training.batch, generator):
                descend(compressed, [batch], stepper, dataset.loss, self.training.is_bfloat16)
                palettizer.step()
        return palettizer.finalize().eval()

    def _palettizer(self, model: nn.Module) -> DKMPalettizer:
        """For all layers, from the first step on."""
        # Imported here: it takes seconds, and no other compression needs it.
        from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig

        config = {"n_bits": self.bits, "weight_threshold": 0, "milestone": 0}
        return DKMPalettizer(model, DKMPalettizerConfig.from_dict({"global_config": config}))
