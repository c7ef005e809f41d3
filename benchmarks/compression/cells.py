"""What one cell of a study is: a network trained in one way, and one compression of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from benchmarks.compression.dataset import Dataset
from benchmarks.compression.regularization import Regularization
from benchmarks.compression.training import Training


class Compression(Protocol):
    """A dataclass of settings; its ``str`` is unique among compressions and names the cell's file.

    Args:
        bits: of a weight.
        family: what it has in common with compressions to other numbers of bits: one line of a picture.
    """

    bits: int

    @property
    def family(self) -> str: ...

    def __str__(self) -> str: ...

    def apply(self, model: nn.Module, dataset: Dataset, seed: int) -> nn.Module:
        """A compressed copy of the model, in evaluation mode."""


@dataclass(frozen=True)
class Network:
    """One training in full precision.

    Args:
        data: a name of ``datasets.DATASETS``; subset: how many training inputs, None for all.
        model: a name of ``models.MODELS``; width: multiplies its channels.
        seed: of the initial weights, the order of the data and the augmentation.
        finetuned_from: where given, training starts from the weights of this network instead.
    """

    data: str
    subset: int | None
    model: str
    width: float
    training: Training
    regularization: Regularization
    seed: int
    finetuned_from: Network | None = None

    def folder(self) -> Path:
        """Where its cells are kept, relative to the results' folder; unique among a study's networks."""
        size = f"{self.model}-{self.width:g}" + (f"-{self.subset}" if self.subset is not None else "")
        length = f"{self.training.epochs}epochs" + ("-finetuned" if self.finetuned_from is not None else "")
        return Path(self.data, size, length, f"{self.regularization}-seed{self.seed}")

    def settings(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compression_settings(compression: Compression) -> dict[str, Any]:
    """For JSON: the kind and its settings."""
    return {"kind": type(compression).__name__, **asdict(compression)}
