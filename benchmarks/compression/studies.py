"""The named studies."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.compression.cells import Compression
from benchmarks.compression.dkm import Palettization
from benchmarks.compression.ptq import PostTrainingQuantization as PTQ
from benchmarks.compression.qat import EWGS_DELTA, QuantizationAwareTraining
from benchmarks.compression.quantize import SCHEMES
from benchmarks.compression.regularization import Regularization
from benchmarks.compression.study import Part, Study
from benchmarks.compression.training import Training

BOUNDS_LEARNING_RATE = 1e-3
WEIGHT_BITS = (8, 6, 4, 3, 2)
CLAIMED_PTQ = (PTQ(2, "asymmetric"), PTQ(3, "symmetric"))
# With momentum the strengths are per unit of learning rate; a temperature must start high in a short training.
CANDIDATES = {
    "linf": [Regularization("linf", strength) for strength in (0.03, 0.1, 0.3)],
    "margin": [
        Regularization("margin", 0.001, 1.5, 1e-4),
        Regularization("margin", 0.003, 1.5, 1e-4),
        Regularization("margin", 0.003, 1.0, 1e-4),
    ],
    "soft_min_max": [
        Regularization("soft_min_max", 0.03, 100.0, 1.0),
        Regularization("soft_min_max", 0.1, 100.0, 1.0),
        Regularization("soft_min_max", 0.3, 100.0, 1.0),
    ],
    "l2": [Regularization("l2", strength) for strength in (0.001, 0.005)],
    "kurtosis": [Regularization("kurtosis", strength) for strength in (0.1, 1.0)],
}
# Strengths of decoupled penalties are lengths of steps.
DECOUPLED_CANDIDATES = {
    "linf": [Regularization("linf", strength) for strength in (0.003, 0.03)],
    "margin": [Regularization("margin", strength, 4.0) for strength in (0.001, 0.01)],
    "soft_min_max": [Regularization("soft_min_max", strength, 100.0) for strength in (0.003, 0.03)],
    "l2": [Regularization("l2", strength) for strength in (1e-4, 1e-3)],
    "kurtosis": [Regularization("kurtosis", strength) for strength in (1e-4, 1e-3)],
}


def _grid() -> tuple[Compression, ...]:
    """Post-training quantization in all ways that are compared."""
    return (
        *(PTQ(bits, scheme) for scheme in SCHEMES for bits in WEIGHT_BITS),
        *(PTQ(bits, scheme, is_per_channel=True) for scheme in SCHEMES for bits in WEIGHT_BITS),
        *(PTQ(bits, scheme, activation_bits=8) for scheme in SCHEMES for bits in WEIGHT_BITS),
        *(PTQ(bits, scheme, has_reestimation=False) for scheme in SCHEMES for bits in WEIGHT_BITS),
    )


def _text_grid() -> tuple[Compression, ...]:
    """The same for networks without batch normalization, as it does not work at 2 bits for them: weights only."""
    return tuple(
        PTQ(bits, scheme, is_per_channel, has_reestimation=False)
        for is_per_channel in (False, True)
        for scheme in SCHEMES
        for bits in (8, 6, 4, 3)
    )


def _qat(training: Training, bits: tuple[int, ...]) -> tuple[Compression, ...]:
    return tuple(
        QuantizationAwareTraining(count, delta, training, BOUNDS_LEARNING_RATE)
        for delta in (EWGS_DELTA, 0.0)
        for count in bits
    )


def _quick() -> Study:
    """The three claims on digits, with fewer settings and compressions."""
    training = Training(epochs=40)
    fine_tuning = Training(epochs=10, optimizer="adamw", learning_rate=3e-3, weight_decay=1e-4)
    few = {penalty: CANDIDATES[penalty][1:] for penalty in ("linf", "margin", "soft_min_max")}
    ewgs, palettes = _qat(fine_tuning, (2,)), (Palettization(1, replace(fine_tuning, epochs=5)),)
    return Study(
        "quick",
        (
            Part("digits", "MobileNetV2", 1.0, training, CANDIDATES, _grid(), CLAIMED_PTQ),
            Part("digits", "MobileNetV1", 1.0, training, few, ewgs, ewgs[:1]),
            Part("digits", "ResNet-18", 0.125, training, few, palettes, palettes),
        ),
        seeds=3,
    )


def _images(name: str, data: str, widths: tuple[float, float, float], trainings: tuple[Training, ...]) -> Study:
    """The three claims: PTQ of MobileNetV2, EWGS of MobileNetV1, DKM of ResNet-18; and MobileNetV2 fine-tuned.

    Args:
        widths: of the three networks.
        trainings: of the three, then the fine-tuning of a quantized or palettized network.
    """
    *full, fine_tuning = trainings
    ewgs, palettes = _qat(fine_tuning, (4, 3, 2)), tuple(Palettization(bits, fine_tuning) for bits in (4, 2, 1))
    networks = (
        ("MobileNetV2", _grid(), CLAIMED_PTQ),
        ("MobileNetV1", ewgs, (QuantizationAwareTraining(2, EWGS_DELTA, fine_tuning, BOUNDS_LEARNING_RATE),)),
        ("ResNet-18", palettes, (Palettization(1, fine_tuning),)),
    )
    parts = tuple(
        Part(data, model, width, training, CANDIDATES, compressions, criteria)
        for (model, compressions, criteria), width, training in zip(networks, widths, full, strict=True)
    )
    return Study(name, (*parts, _fine_tuned(parts[0])), seeds=3)


def _fine_tuned(part: Part) -> Part:
    """The plainly trained network of a part, regularized for an eighth of its epochs more."""
    training = replace(part.training, epochs=max(1, part.training.epochs // 8), learning_rate=0.02)
    return replace(part, training=training, pretraining=part.training)


def _cifar10() -> Study:
    """About ten minutes of one core for each training in full precision."""
    base = Training(epochs=8, batch=128, learning_rate=0.1)
    trainings = (
        base,
        replace(base, epochs=12),
        replace(base, epochs=12, is_bfloat16=True),
        Training(epochs=3, batch=128, optimizer="adamw", learning_rate=1e-3, weight_decay=1e-4),
    )
    return _images("cifar10", "cifar10", (0.5, 0.5, 0.25), trainings)


def _imagenet() -> Study:
    """The same at full size, for a GPU."""
    base = Training(epochs=90, batch=256, learning_rate=0.1, weight_decay=4e-5, is_bfloat16=True)
    fine_tuning = Training(epochs=10, batch=256, optimizer="adamw", learning_rate=1e-3, weight_decay=1e-4)
    return _images("imagenet", "images", (1.0, 1.0, 1.0), (base, base, base, fine_tuning))


def _language() -> Study:
    """Next bytes of Python's standard library, 8 million of them in an epoch."""
    training = Training(epochs=1, batch=32, optimizer="adamw", learning_rate=1e-3, weight_decay=0.01, is_decoupled=True)
    criteria = (PTQ(4, "asymmetric", has_reestimation=False), PTQ(3, "symmetric", has_reestimation=False))
    part = Part("text", "transformer", 1.0, training, DECOUPLED_CANDIDATES, _text_grid(), criteria, subset=32_000)
    return Study("language", (part,), seeds=3)


def _sentences() -> Study:
    """A pretrained network with extreme outliers, distilled from itself."""
    training = Training(
        epochs=1,
        batch=32,
        optimizer="adamw",
        learning_rate=1e-4,
        weight_decay=0.0,
        is_bfloat16=True,
        is_decoupled=True,
    )
    criteria = (PTQ(6, "symmetric", has_reestimation=False), PTQ(4, "asymmetric", has_reestimation=False))
    part = Part("sentences", "MiniLM", 1.0, training, DECOUPLED_CANDIDATES, _text_grid(), criteria, subset=9_600)
    return Study("sentences", (part,), seeds=1)


STUDIES = {study.name: study for study in (_quick(), _cifar10(), _imagenet(), _language(), _sentences())}
