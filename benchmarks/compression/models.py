"""The networks by name, in the size that suits the data."""

from __future__ import annotations

from torch import nn

from benchmarks.compression import mobilenet_v1, mobilenet_v2
from benchmarks.compression.mobilenet_v1 import MobileNetV1
from benchmarks.compression.mobilenet_v2 import MobileNetV2
from benchmarks.compression.resnet18 import ResNet18
from benchmarks.compression.sentence_transformer import SentenceTransformer
from benchmarks.compression.transformer import ByteTransformer

IMAGE_MODELS = ("MobileNetV1", "MobileNetV2", "ResNet-18")
TEXT_MODELS = ("transformer", "MiniLM")
MODELS = (*IMAGE_MODELS, *TEXT_MODELS)
SMALLEST_FOR_FULL_DEPTH = 32  # pixels: MobileNets shrink 8 × 8 images with fewer blocks, or nothing would be left
SMALLEST_FOR_STRIDE = 64  # pixels: from here on the stem has ImageNet's stride


def build(name: str, shape: tuple[int, ...], classes: int, width: float) -> nn.Module:
    """The network for inputs of this shape; ``width`` multiplies the channels that its paper gives (not MiniLM's).

    Raises:
        ValueError: an unknown name, a width that leaves no channels, or inputs of another kind.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    if not width > 0:
        raise ValueError(f"width: expected a positive number, got {width}")
    expected = 1 if name in TEXT_MODELS else 3
    if len(shape) != expected:
        raise ValueError(f"model: {name} is for inputs of {expected} dimensions, not of shape {shape}")
    if name == "MiniLM":
        return SentenceTransformer()
    if name == "transformer":
        return ByteTransformer(classes, length=shape[0], width=_channels(256, width), layers=4)
    channels, pixels = shape[0], shape[1]
    is_deep, stride = pixels >= SMALLEST_FOR_FULL_DEPTH, 2 if pixels >= SMALLEST_FOR_STRIDE else 1
    if name == "MobileNetV1":
        blocks = mobilenet_v1.BLOCKS if is_deep else mobilenet_v1.SMALL_BLOCKS
        scaled = tuple((_channels(count, width), step) for count, step in blocks)
        return MobileNetV1(channels, classes, _channels(32 if is_deep else 16, width), scaled, stride)
    if name == "MobileNetV2":
        stages = mobilenet_v2.STAGES if is_deep else mobilenet_v2.SMALL_STAGES
        widened = tuple((expansion, _channels(count, width), *rest) for expansion, count, *rest in stages)
        last = 1280 if is_deep else 128
        return MobileNetV2(channels, classes, _channels(32 if is_deep else 16, width), widened, last, stride)
    return ResNet18(channels, classes, _channels(64, width), is_small=stride == 1)


def _channels(count: int, width: float) -> int:
    """A multiple of 8, at least 8: what vectors and matrix units take whole."""
    return max(8, round(count * width / 8) * 8)
