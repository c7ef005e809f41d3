"""CIFAR-10 from a folder with ``cifar10_train.npz`` and ``cifar10_test.npz``.

Either file holds ``jpeg``, the bytes of all images end to end, ``offset``, where ``jpeg[offset[i]:offset[i + 1]]`` is
image i, and ``label``.
"""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from benchmarks.compression.augmentation import crop_and_flip
from benchmarks.compression.dataset import Dataset
from benchmarks.compression.splits import TensorSplit

CLASSES = 10
VALIDATION_PER_CLASS = 500
FILES = {"train": "cifar10_train.npz", "test": "cifar10_test.npz"}
ARRAYS = ("jpeg", "offset", "label")


def cifar10(folder: Path, cache: Path, subset: int | None = None) -> Dataset:
    """45,000 images to train, 5,000 of the training set to choose settings, the 10,000 of the test set.

    Args:
        folder: where the two files are.
        cache: a folder that keeps the decoded images for the next time.
        subset: train with so many only, classes in proportion, always the same.

    Raises:
        FileNotFoundError, ValueError: the folder or a file is not what was expected.
    """
    images, labels = _decoded(folder, cache, "train")
    test_images, test_labels = _decoded(folder, cache, "test")
    validation, train = _parts(labels, subset)
    pixels = images[train].float()
    mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    return Dataset(
        TensorSplit(images[train], labels[train], mean, deviation, crop_and_flip),
        TensorSplit(images[validation], labels[validation], mean, deviation),
        TensorSplit(test_images, test_labels, mean, deviation),
        classes=CLASSES,
        shape=(3, 32, 32),
    )


def _parts(labels: Tensor, subset: int | None) -> tuple[Tensor, Tensor]:
    """Indices of validation and training images, drawn once and for all."""
    generator = torch.Generator().manual_seed(0)
    validation, train = [], []
    available = len(labels) - CLASSES * VALIDATION_PER_CLASS
    if subset is not None and not 0 < subset <= available:
        raise ValueError(f"subset: expected 1 to {available} training images, got {subset}")
    for label in range(CLASSES):
        of_class = (labels == label).nonzero()[:, 0]
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        validation.append(of_class[:VALIDATION_PER_CLASS])
        rest = of_class[VALIDATION_PER_CLASS:]
        train.append(rest if subset is None else rest[: subset // CLASSES])
    return torch.cat(validation), torch.cat(train)


def _decoded(folder: Path, cache: Path, part: str) -> tuple[Tensor, Tensor]:
    """All images of a file, uint8 (N, 3, 32, 32), and their labels, int64 (N,)."""
    source = folder / FILES[part]
    if not source.is_file():
        raise FileNotFoundError(
            f"--data: expected a folder with {' and '.join(FILES.values())}, got {folder} without {source.name}"
        )
    kept = cache / f"cifar10-{part}-{source.stat().st_size}.pt"
    if kept.is_file():
        decoded = torch.load(kept)
        return decoded["images"], decoded["labels"]
    with numpy.load(source) as arrays:
        missing = [name for name in ARRAYS if name not in arrays]
        if missing:
            raise ValueError(
                f"--data: expected the arrays {', '.join(ARRAYS)} in {source}, but {missing[0]} is missing"
            )
        jpeg, offset, label = (arrays[name] for name in ARRAYS)
    if len(offset) != len(label) + 1 or offset[-1] != len(jpeg):
        raise ValueError(f"--data: expected one more offset than labels in {source}, the last at the end of the bytes")
    images = numpy.stack(
        [
            numpy.asarray(Image.open(io.BytesIO(jpeg[start:end].tobytes())).convert("RGB"))
            for start, end in pairwise(offset)
        ]
    )
    decoded = {
        "images": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        "labels": torch.from_numpy(label).long(),
    }
    cache.mkdir(parents=True, exist_ok=True)
    part_written = kept.with_suffix(".part")
    torch.save(decoded, part_written)
    part_written.replace(kept)
    return decoded["images"], decoded["labels"]
