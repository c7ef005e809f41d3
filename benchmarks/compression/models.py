"""The networks that are trained and compressed."""

from __future__ import annotations

from torch import Tensor, nn


class SeparableBlock(nn.Sequential):
    """MobileNet's block: a 3 × 3 convolution per channel, then a 1 × 1 across them, each normalized and rectified."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )


class SmallMobileNet(nn.Module):
    """A MobileNetV1 for 8 × 8 gray images: about 30,000 parameters in 12 layers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(
            SeparableBlock(16, 32, 1),
            SeparableBlock(32, 64, 2),
            SeparableBlock(64, 64, 1),
            SeparableBlock(64, 128, 2),
            SeparableBlock(128, 128, 1),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 8, 8) to logits (N, classes)."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))
