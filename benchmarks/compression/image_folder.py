"""Images in a folder per class, ``train/<class>/*`` and ``val/<class>/*``, as ImageNet is kept: decoded when needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from benchmarks.compression.dataset import Dataset
from benchmarks.compression.splits import Batch

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
# ImageNet's, in units of 0 to 1, which every pretrained network of it uses.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALIDATION_EVERY = 20  # of the training images, one in so many chooses settings
RESIZED_TO_CROPPED = 256 / 224
LEAST_AREA = 0.25  # of an image that a random crop shows


def image_folder(folder: Path, pixels: int) -> Dataset:
    """``val`` is the test split; every twentieth image of ``train`` is the validation split.

    Args:
        folder: holds ``train`` and ``val`` with the same folders in them, one for each class.
        pixels: height and width that images are cropped to.

    Raises:
        FileNotFoundError, ValueError: the folder is not what was expected.
    """
    classes = _classes(folder / "train")
    if _classes(folder / "val") != classes:
        raise ValueError(f"--data: expected the same classes in {folder / 'train'} and {folder / 'val'}")
    files, test = _files(folder / "train", classes), _files(folder / "val", classes)
    train = [file for index, file in enumerate(files) if index % VALIDATION_EVERY != 0]
    return Dataset(
        FileSplit(train, pixels),
        FileSplit(files[::VALIDATION_EVERY], pixels),
        FileSplit(test, pixels),
        classes=len(classes),
        shape=(3, pixels, pixels),
    )


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"--data: expected a folder with train/ and val/, but there is no folder {folder}")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"--data: expected one folder for each class in {folder}, got none")
    return classes


def _files(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise ValueError(f"--data: expected images ({', '.join(sorted(SUFFIXES))}) in {folder}, got none")
    return found


@dataclass(frozen=True)
class FileSplit:
    """A split whose images are read from files, by as many processes as there are cores.

    Args:
        files: paths with their labels.
        pixels: height and width after the crop: random with a flip for training, else the middle.
    """

    files: Sequence[tuple[Path, int]]
    pixels: int

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int, generator: Generator | None = None) -> Iterator[Batch]:
        is_training = generator is not None
        loader = DataLoader(
            _Images(self.files, self.pixels, is_training),
            size,
            shuffle=is_training,
            drop_last=is_training and len(self) >= size,
            generator=generator,
            num_workers=os.cpu_count() or 1,
        )
        yield from map(tuple, loader)


class _Images(torch.utils.data.Dataset):
    def __init__(self, files: Sequence[tuple[Path, int]], pixels: int, is_training: bool) -> None:
        self.files, self.pixels, self.is_training = files, pixels, is_training

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        cropped = _random_crop(image, self.pixels) if self.is_training else _middle_crop(image, self.pixels)
        values = (numpy.asarray(cropped, dtype=numpy.float32) / 255 - MEAN) / DEVIATION
        return torch.from_numpy(values.astype(numpy.float32)).permute(2, 0, 1), label


def _random_crop(image: Image.Image, pixels: int) -> Image.Image:
    """A part of the image of random size, proportions and place, mirrored half the time."""
    area, stretch, across, down, mirror = torch.rand(5).tolist()
    side = ((LEAST_AREA + (1 - LEAST_AREA) * area) * image.width * image.height) ** 0.5
    ratio = (3 / 4) ** (1 - 2 * stretch)
    width = max(1, min(image.width, round(side * ratio**0.5)))
    height = max(1, min(image.height, round(side / ratio**0.5)))
    left, top = round(across * (image.width - width)), round(down * (image.height - height))
    resized = image.resize((pixels, pixels), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else resized


def _middle_crop(image: Image.Image, pixels: int) -> Image.Image:
    side = min(image.width, image.height) / RESIZED_TO_CROPPED
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((pixels, pixels), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
