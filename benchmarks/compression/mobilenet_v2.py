"""MobileNetV2 (Sandler et al., arXiv 1801.04381): inverted residuals with linear bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

# Expansion, output channels, repeats and the first one's stride of each stage.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# For images of 8 × 8.
SMALL_STAGES = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 2, 2))


def _normalized(channels: int, width: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, size, stride, padding=size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width)]


class InvertedResidual(nn.Module):
    """1 × 1 to more channels, 3 × 3 per channel, 1 × 1 to fewer, not rectified; added to the input where it fits."""

    def __init__(self, channels: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = channels * expansion
        expand = [*_normalized(channels, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        self.layers = nn.Sequential(
            *expand,
            *_normalized(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *_normalized(hidden, width, 1),
        )
        self.is_residual = stride == 1 and channels == width

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, H / stride, W / stride)."""
        return images + self.layers(images) if self.is_residual else self.layers(images)


class MobileNetV2(nn.Module):
    """MobileNetV2 without the stem's stride where images are small.

    Args:
        channels: of the images.
        stem: output channels of the first convolution.
        stages: expansion, output channels, repeats and stride of each stage.
        last: channels before the classifier.
        stem_stride: 2 for ImageNet's images, 1 for small ones.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        stem: int,
        stages: Sequence[tuple[int, int, int, int]],
        last: int,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_normalized(channels, stem, 3, stem_stride), nn.ReLU6())
        blocks = []
        before = stem
        for expansion, width, repeats, stride in stages:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(before, width, expansion, stride if repeat == 0 else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(*_normalized(before, last, 1), nn.ReLU6())
        self.head = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, classes)."""
        return self.head(self.last(self.blocks(self.stem(images))).mean((2, 3)))
