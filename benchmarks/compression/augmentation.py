"""Random crops and flips of a batch of images at once."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn


def crop_and_flip(images: Tensor, generator: Generator, padding: int = 4) -> Tensor:
    """Each image (N, C, H, W) moved by up to ``padding`` pixels, zeros coming in, and half of them mirrored."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (padding,) * 4)
    down = torch.randint(2 * padding + 1, (count, 1), generator=generator)
    right = torch.randint(2 * padding + 1, (count, 1), generator=generator)
    is_mirrored = torch.randint(2, (count, 1), generator=generator).bool()
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(is_mirrored, columns.flip(1), columns) + right
    rows = torch.arange(height) + down
    image = torch.arange(count)
    # Indices around a slice put the channels last: in memory, then, as the convolutions want them.
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
