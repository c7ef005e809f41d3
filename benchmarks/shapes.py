"""The parameter shapes of known models, as tables: nothing is downloaded, and the values do not matter for the time."""

from __future__ import annotations

import torch
from torch import Tensor

Shape = tuple[int, ...]


def _resnet18() -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, channels, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and width != channels:
                shapes += [(width, channels, 1, 1), (width,), (width,)]
            channels = width
    return [*shapes, (1000, 512), (1000,)]


def _mobilenet_v2() -> list[Shape]:
    shapes: list[Shape] = [(32, 3, 3, 3), (32,), (32,)]
    channels = 32
    for expansion, width, repeats in (
        (1, 16, 1),
        (6, 24, 2),
        (6, 32, 3),
        (6, 64, 4),
        (6, 96, 3),
        (6, 160, 3),
        (6, 320, 1),
    ):
        for _ in range(repeats):
            hidden = channels * expansion
            if expansion != 1:
                shapes += [(hidden, channels, 1, 1), (hidden,), (hidden,)]
            shapes += [(hidden, 1, 3, 3), (hidden,), (hidden,), (width, hidden, 1, 1), (width,), (width,)]
            channels = width
    return [*shapes, (1280, 320, 1, 1), (1280,), (1280,), (1000, 1280), (1000,)]


def _transformer(vocabulary: int, positions: int, width: int, layers: int) -> list[Shape]:
    """The weight matrices of a GPT-2: embeddings, and per layer attention in and out, MLP in and out."""
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [(vocabulary, width), (positions, width), *block * layers]


MODELS: dict[str, tuple[list[Shape], torch.dtype]] = {
    "ResNet-18": (_resnet18(), torch.float32),
    "MobileNetV2": (_mobilenet_v2(), torch.float32),
    "GPT-2": (_transformer(50257, 1024, 768, 12), torch.float32),
    "1B in bfloat16": (_transformer(50257, 1024, 2048, 18), torch.bfloat16),
}


def weights(model: str) -> list[Tensor]:
    """Normal weights of standard deviation 0.02, one tensor per shape."""
    shapes, dtype = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).to(dtype) for shape in shapes]
