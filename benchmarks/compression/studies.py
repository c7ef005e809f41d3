"""The named studies."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.compression.adaround import AdaptiveRounding
from benchmarks.compression.cells import Compression
from benchmarks.compression.dkm import Palettization
from benchmarks.compression.ptq import PostTrainingQuantization as PTQ
from benchmarks.compression.qat import EWGS_DELTA, QuantizationAwareTraining
from benchmarks.compression.quantize import SCHEMES
from benchmarks.compression.regularization import Regularization
from benchmarks.compression.study import Part, Study
from benchmarks.compression.training import Training
from r2_kernels.penalties import PENALTIES

BOUNDS_LEARNING_RATE = 1e-3
WEIGHT_BITS = (8, 6, 4, 3, 2)
CLAIMED_PTQ = (PTQ(2, "asymmetric"), PTQ(3, "symmetric"))
# The likeliest first, since an interrupted search has tried those.
# With momentum the strengths are per unit of learning rate; a temperature must start high in a short training.
CANDIDATES = {
    "linf": [Regularization("linf", strength) for strength in (0.1, 0.3, 0.03)],
    "margin": [
        Regularization("margin", 0.003, 1.5, 1e-4),
        Regularization("margin", 0.003, 1.0, 1e-4),
        Regularization("margin", 0.001, 1.5, 1e-4),
    ],
    "soft_min_max": [Regularization("soft_min_max", strength, 100.0, 1.0) for strength in (0.1, 0.3, 0.03)],
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
# An outlier of 8 that shall become 0.3 in 300 steps takes steps of 0.05 on the average of the schedule.
DISTILLED_CANDIDATES = {
    "linf": [Regularization("linf", strength) for strength in (0.1, 0.5)],
    "margin": [Regularization("margin", strength, 4.0) for strength in (0.05, 0.01)],
    "soft_min_max": [Regularization("soft_min_max", strength, 10.0) for strength in (0.1, 0.5)],
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


def _learned_roundings() -> tuple[Compression, ...]:
    """The same weights with learned rounding, at the bits where it matters."""
    return tuple(
        AdaptiveRounding(bits, scheme, is_per_channel)
        for is_per_channel in (False, True)
        for scheme in SCHEMES
        for bits in (4, 3, 2)
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
    few = {penalty: CANDIDATES[penalty][:2] for penalty in PENALTIES}
    learned = tuple(AdaptiveRounding(2, scheme, steps=200, learning_rate=0.05) for scheme in SCHEMES)
    ewgs, palettes = _qat(fine_tuning, (2,)), (Palettization(1, replace(fine_tuning, epochs=5)),)
    return Study(
        "quick",
        (
            Part("digits", "MobileNetV2", 1.0, training, CANDIDATES, (*_grid(), *learned), CLAIMED_PTQ),
            Part("digits", "MobileNetV1", 1.0, training, few, ewgs, ewgs[:1]),
            Part("digits", "ResNet-18", 0.125, training, few, palettes, palettes),
        ),
        seeds=3,
    )


def _images(
    name: str,
    data: str,
    widths: tuple[float, float, float],
    trainings: tuple[Training, Training, Training],
    fine_tuning: Training,
    is_whole: bool,
) -> Study:
    """The three claims: PTQ of MobileNetV2, EWGS of MobileNetV1, DKM of ResNet-18; and MobileNetV2 fine-tuned.

    Args:
        widths, trainings: of the three networks.
        fine_tuning: of a quantized or palettized network.
        is_whole: with all bits, settings and peers, not only with what is claimed. Cells are the same.
    """
    ewgs = _qat(fine_tuning, (4, 3, 2) if is_whole else (2,))
    palettes = tuple(Palettization(bits, fine_tuning) for bits in ((4, 2, 1) if is_whole else (1,)))
    candidates = CANDIDATES if is_whole else {penalty: CANDIDATES[penalty][:2] for penalty in PENALTIES}
    claimed_ewgs = QuantizationAwareTraining(2, EWGS_DELTA, fine_tuning, BOUNDS_LEARNING_RATE)
    networks = (
        ("MobileNetV2", candidates, (*_grid(), *(_learned_roundings() if is_whole else ())), CLAIMED_PTQ),
        ("MobileNetV1", candidates, ewgs, (claimed_ewgs,)),
        ("ResNet-18", candidates, palettes, (Palettization(1, fine_tuning),)),
    )
    parts = tuple(
        Part(data, model, width, training, searched, compressions, criteria)
        for (model, searched, compressions, criteria), width, training in zip(networks, widths, trainings, strict=True)
    )
    return Study(name, (*parts, _fine_tuned(parts[0])), seeds=3)


def _fine_tuned(part: Part) -> Part:
    """The plainly trained network of a part, regularized for an eighth of its epochs more."""
    training = replace(part.training, epochs=max(1, part.training.epochs // 8), learning_rate=0.02)
    return replace(part, training=training, pretraining=part.training)


def _cifar10(name: str, is_whole: bool) -> Study:
    """About ten minutes of one core for each training in full precision, five to eight for each fine-tuning."""
    base = Training(epochs=8, batch=128, learning_rate=0.1)
    trainings = (base, replace(base, epochs=12), replace(base, epochs=12, is_bfloat16=True))
    fine_tuning = Training(epochs=2, batch=128, optimizer="adamw", learning_rate=1e-3, weight_decay=1e-4)
    return _images(name, "cifar10", (0.5, 0.5, 0.25), trainings, fine_tuning, is_whole)


def _imagenet() -> Study:
    """The same at full size, for a GPU."""
    base = Training(epochs=90, batch=256, learning_rate=0.1, weight_decay=4e-5, is_bfloat16=True)
    fine_tuning = Training(epochs=10, batch=256, optimizer="adamw", learning_rate=1e-3, weight_decay=1e-4)
    return _images("imagenet", "images", (1.0, 1.0, 1.0), (base, base, base), fine_tuning, is_whole=True)


def _language() -> Study:
    """Next bytes of Python's standard library, 2 million of them in an epoch."""
    training = Training(epochs=1, batch=32, optimizer="adamw", learning_rate=1e-3, weight_decay=0.01, is_decoupled=True)
    criteria = (PTQ(4, "asymmetric", has_reestimation=False), PTQ(3, "symmetric", has_reestimation=False))
    part = Part("text", "transformer", 1.0, training, DECOUPLED_CANDIDATES, _text_grid(), criteria, subset=16_000)
    return Study("language", (part,), seeds=3)


def _sentences() -> Study:
    """A pretrained network with extreme outliers, distilled from itself."""
    training = Training(
        epochs=1,
        batch=32,
        optimizer="adamw",
        learning_rate=5e-5,
        weight_decay=0.0,
        is_bfloat16=True,
        is_decoupled=True,
    )
    criteria = (PTQ(6, "symmetric", has_reestimation=False), PTQ(4, "asymmetric", has_reestimation=False))
    part = Part("sentences", "MiniLM", 1.0, training, DISTILLED_CANDIDATES, _text_grid(), criteria, subset=9_600)
    return Study("sentences", (part,), seeds=1)


STUDIES = {
    study.name: study
    for study in (
        _quick(),
        _cifar10("cifar10", is_whole=False),
        _cifar10("cifar10-whole", is_whole=True),
        _imagenet(),
        _language(),
        _sentences(),
    )
}
