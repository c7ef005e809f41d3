"""ResNet-18 (He et al., arXiv 1512.03385)."""

from __future__ import annotations

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions, added to the input or to a 1 × 1 projection of it."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        is_same = stride == 1 and channels == width
        self.shortcut = (
            nn.Identity()
            if is_same
            else nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, H / stride, W / stride)."""
        return nn.functional.relu(self.layers(images) + self.shortcut(images))


class ResNet18(nn.Module):
    """Four stages of two blocks each, of 1, 2, 4 and 8 times ``width`` channels.

    Args:
        channels: of the images.
        is_small: a 3 × 3 stem without stride for small images, instead of 7 × 7, stride 2 and pooling.
    """

    def __init__(self, channels: int, classes: int, width: int, is_small: bool = True) -> None:
        super().__init__()
        stem = (
            [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
            if is_small
            else [nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)]
        )
        self.stem = nn.Sequential(
            *stem, nn.BatchNorm2d(width), nn.ReLU(), *([] if is_small else [nn.MaxPool2d(3, 2, padding=1)])
        )
        blocks = []
        before = width
        for stage in range(4):
            for repeat in range(2):
                blocks.append(BasicBlock(before, width << stage, 2 if stage > 0 and repeat == 0 else 1))
                before = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, classes)."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))
