"""The datasets by name."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from benchmarks.compression.cifar10 import cifar10
from benchmarks.compression.dataset import Dataset
from benchmarks.compression.digits import digits
from benchmarks.compression.image_folder import image_folder
from benchmarks.compression.sentence_transformer import distillation
from benchmarks.compression.text import standard_library, text

DATASETS = ("digits", "cifar10", "images", "text", "sentences")
PIXELS = 224  # of image folders


@lru_cache(maxsize=1)
def load(name: str, folder: Path | None, cache: Path, subset: int | None) -> Dataset:
    """The dataset, read once in each process.

    Args:
        folder: where it is; digits need none, text and sentences are the standard library's
            unless a folder is given.
        cache: a folder where what is decoded may be kept.
        subset: train with so many inputs only (CIFAR-10, text and sentences).

    Raises:
        ValueError: an unknown name, a folder that is missing or one that is not used, a subset that cannot be had.
        FileNotFoundError: nothing there.
    """
    if name not in DATASETS:
        raise ValueError(f"data: expected one of {', '.join(DATASETS)}, got {name!r}")
    if name == "digits" and folder is not None:
        raise ValueError("--data: expected none, since digits come with scikit-learn")
    if name in ("digits", "images") and subset is not None:
        raise ValueError(f"subset: expected none for {name}")
    if name in ("cifar10", "images") and folder is None:
        raise ValueError(f"--data: expected a folder with {name}, got none")
    if name == "digits":
        return digits()
    if name == "text":
        return text(folder or standard_library(), subset)
    if name == "sentences":
        return distillation(folder or standard_library(), cache, subset)
    assert folder is not None
    if not folder.is_dir():
        raise FileNotFoundError(f"--data: expected a folder, but there is none at {folder}")
    return cifar10(folder, cache, subset) if name == "cifar10" else image_folder(folder, PIXELS)
