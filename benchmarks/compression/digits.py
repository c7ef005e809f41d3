"""scikit-learn's digits: 1,797 real images of 8 × 8 that come with the package."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.compression.dataset import Dataset
from benchmarks.compression.splits import TensorSplit


def digits() -> Dataset:
    """The same split always, classes in proportion: 1,077 images to train, 360 to choose settings, 360 to report.

    Images are (1, 8, 8) float32, of mean 0 and standard deviation 1.
    """
    images, labels = load_digits(return_X_y=True)
    rest, test, rest_labels, test_labels = train_test_split(
        images, labels, test_size=360, random_state=0, stratify=labels
    )
    train, validation, train_labels, validation_labels = train_test_split(
        rest, rest_labels, test_size=360, random_state=0, stratify=rest_labels
    )
    mean, deviation = train.mean(), train.std()

    def split(images: object, labels: object) -> TensorSplit:
        normalized = (torch.as_tensor(images, dtype=torch.float32) - mean) / deviation
        return TensorSplit(normalized.reshape(-1, 1, 8, 8), torch.as_tensor(labels))

    return Dataset(
        split(train, train_labels),
        split(validation, validation_labels),
        split(test, test_labels),
        classes=10,
        shape=(1, 8, 8),
    )
