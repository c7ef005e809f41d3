"""Text that every machine has: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.compression.dataset import Dataset
from benchmarks.compression.splits import TensorSplit

VOCABULARY = 256
LENGTH = 128  # bytes of a sequence
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
MEASURED = 500  # sequences of the validation split, and as many of the test split
MEASURED_EVERY = 20  # of the files, one in so many is validation, another is test


def standard_library() -> Path:
    """Where the sources are."""
    return Path(sysconfig.get_paths()["stdlib"])


def text(folder: Path, subset: int | None = None) -> Dataset:
    """Next-byte prediction on a folder's Python files; whole files are training, validation or test.

    Args:
        subset: train with so many sequences only, the same always.

    Raises:
        FileNotFoundError: no folder, or no Python files in it.
    """
    most = {"train": subset, "validation": MEASURED, "test": MEASURED}
    sequences = {name: _some(_sequences(paths), most[name]) for name, paths in python_files(folder).items()}
    splits = {name: TensorSplit(tokens[:, :-1], tokens[:, 1:]) for name, tokens in sequences.items()}
    return Dataset(**splits, classes=VOCABULARY, shape=(LENGTH,))


def python_files(folder: Path) -> dict[str, list[Path]]:
    """A folder's Python files by split.

    Raises:
        FileNotFoundError: fewer than make splits.
    """
    files = sorted(path for path in folder.rglob("*.py") if not LEFT_OUT.intersection(path.relative_to(folder).parts))
    if len(files) < 2 * MEASURED_EVERY:
        raise FileNotFoundError(
            f"--data: expected a folder of at least {2 * MEASURED_EVERY} Python files, got {folder}"
        )
    parts: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    for index, path in enumerate(files):
        name = {0: "validation", 1: "test"}.get(index % MEASURED_EVERY, "train")
        parts[name].append(path)
    return parts


def _some(sequences: Tensor, count: int | None) -> Tensor:
    """So many of them, always the same; all if None."""
    return sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))[:count]]


def _sequences(paths: list[Path]) -> Tensor:
    """The files end to end, cut into int64 (N, LENGTH + 1), each beginning with the byte that the last ended with."""
    joined = b"".join(path.read_bytes() for path in paths)
    tokens = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    return tokens.unfold(0, LENGTH + 1, LENGTH).long()
