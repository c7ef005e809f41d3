"""MobileNetV1 (Howard et al., arXiv 1704.04861): depthwise-separable convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

# Output channels and stride of each block.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
# For images of 8 × 8.
SMALL_BLOCKS = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1))


class SeparableBlock(nn.Sequential):
    """A 3 × 3 convolution per channel, then a 1 × 1 across them, each normalized and rectified."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )


class MobileNetV1(nn.Module):
    """MobileNetV1 without the stem's stride where images are small.

    Args:
        channels: of the images.
        stem: output channels of the first convolution.
        blocks: output channels and stride of each block.
        stem_stride: 2 for ImageNet's images, 1 for small ones.
    """

    def __init__(
        self, channels: int, classes: int, stem: int, blocks: Sequence[tuple[int, int]], stem_stride: int = 1
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, stem, 3, stem_stride, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        widths = [stem, *(width for width, _ in blocks)]
        self.blocks = nn.Sequential(
            *(SeparableBlock(before, width, stride) for before, (width, stride) in zip(widths, blocks, strict=False))
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, classes)."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def small_mobilenet() -> MobileNetV1:
    """For 8 × 8 gray images of ten classes: about 30,000 parameters in 12 layers."""
    return MobileNetV1(1, 10, stem=16, blocks=SMALL_BLOCKS)
