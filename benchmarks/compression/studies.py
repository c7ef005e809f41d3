"""The named studies."""

from __future__ import annotations

from benchmarks.compression.cells import Compression
from benchmarks.compression.ptq import PostTrainingQuantization as PTQ
from benchmarks.compression.quantize import SCHEMES
from benchmarks.compression.regularization import Regularization
from benchmarks.compression.study import Part, Study
from benchmarks.compression.training import Training

WEIGHT_BITS = (8, 6, 4, 3, 2)


def _grid() -> tuple[Compression, ...]:
    """Post-training quantization in all ways that are compared."""
    per_tensor = [PTQ(bits, scheme) for scheme in SCHEMES for bits in WEIGHT_BITS]
    per_channel = [PTQ(bits, scheme, is_per_channel=True) for scheme in SCHEMES for bits in WEIGHT_BITS]
    with_activations = [PTQ(bits, scheme, activation_bits=8) for scheme in SCHEMES for bits in WEIGHT_BITS]
    stale = [PTQ(bits, scheme, has_reestimation=False) for scheme in SCHEMES for bits in WEIGHT_BITS]
    return (*per_tensor, *per_channel, *with_activations, *stale)


CLAIMED_PTQ = (PTQ(2, "asymmetric"), PTQ(3, "symmetric"))


def _quick() -> Study:
    candidates = {
        "l2": [Regularization("l2", strength) for strength in (0.001, 0.005)],
        "kurtosis": [Regularization("kurtosis", strength) for strength in (0.1, 1.0)],
        "linf": [Regularization("linf", strength) for strength in (0.01, 0.1, 0.3)],
        "margin": [
            Regularization("margin", 0.001, 1.5, 1e-3),
            Regularization("margin", 0.003, 1.5, 1e-4),
            Regularization("margin", 0.003, 1.0, 1e-4),
        ],
        "soft_min_max": [
            Regularization("soft_min_max", 0.03, 100.0, 1.0),
            Regularization("soft_min_max", 0.1, 100.0, 1.0),
            Regularization("soft_min_max", 0.3, 100.0, 10.0),
        ],
    }
    part = Part("digits", "MobileNetV2", 1.0, Training(epochs=40), candidates, _grid(), CLAIMED_PTQ)
    return Study("quick", (part,), seeds=3)


def _cifar10() -> Study:
    candidates = {
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
    training = Training(epochs=8, batch=128, learning_rate=0.1)
    part = Part("cifar10", "MobileNetV2", 0.5, training, candidates, _grid(), CLAIMED_PTQ)
    return Study("cifar10", (part,), seeds=3)


STUDIES = {study.name: study for study in (_quick(), _cifar10())}
