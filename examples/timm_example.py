"""A MobileNetV3 of `timm` trained in a plain loop with the penalty inside the optimizer's step.

    pip install r2_kernels timm
    python examples/timm_example.py

The images are made on the spot: stripes of one of four directions under noise. With your own data and
`pretrained=True` the loop is the same.
"""

from __future__ import annotations

import argparse
import math

import timm
import torch
from torch import Tensor
from torch.nn import functional

from r2_kernels import RangeRegularizer, optim
from r2_kernels.report import Report

CLASSES, SIZE = 4, 64


def batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angles = labels * math.pi / CLASSES
    place = torch.arange(SIZE) / SIZE * 2 * math.pi * 8
    phase = torch.rand(count, 1, 1, generator=generator) * 2 * math.pi
    along = place[:, None] * angles.sin()[:, None, None] + place * angles.cos()[:, None, None]
    images = (along + phase).sin()[:, None] + torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return images, labels


def train(strength: float, steps: int) -> tuple[float, Report]:
    """The accuracy on fresh images, and the layers' report."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=CLASSES)
    reg = RangeRegularizer(model, "linf", strength=strength)
    # Decoupled, so that Adam's second moment does not divide the penalty of an outlier by its own size.
    optimizer = optim.AdamW(model.parameters(), lr=2e-3, regularizer=reg, decoupled=True)
    for _ in range(steps):
        images, labels = batch(32, generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    images, labels = batch(256, generator)
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    return accuracy, reg.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--strength", type=float, default=2.0)
    arguments = parser.parse_args()
    for strength in (0.0, arguments.strength):
        accuracy, report = train(strength, arguments.steps)
        print(f"\nstrength {strength}: accuracy {accuracy:.3f}\n{report}")


if __name__ == "__main__":
    main()
