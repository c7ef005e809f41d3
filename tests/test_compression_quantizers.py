"""The study's quantizers against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks.compression.activations import quantize_activations_
from benchmarks.compression.batch_norm import reestimate_
from benchmarks.compression.dataset import Dataset
from benchmarks.compression.digits import digits
from benchmarks.compression.dkm import Palettization
from benchmarks.compression.mobilenet_v1 import small_mobilenet
from benchmarks.compression.ptq import PostTrainingQuantization
from benchmarks.compression.qat import QuantizationAwareTraining, quantize_layers_, start_bounds_
from benchmarks.compression.quantize import quantize, quantized
from benchmarks.compression.quantized_layer import QuantizedLayer
from benchmarks.compression.splits import TensorSplit
from benchmarks.compression.training import Training


def test_symmetric_levels_by_hand() -> None:
    weight = torch.tensor([-0.8, -0.3, 0.1, 0.45, 1.2])
    assert torch.equal(quantize(weight, 2, "symmetric"), torch.tensor([-1.2, 0.0, 0.0, 0.0, 1.2]))
    # Three bits: levels are multiples of 0.4.
    torch.testing.assert_close(quantize(weight, 3, "symmetric"), torch.tensor([-0.8, -0.4, 0.0, 0.4, 1.2]))


def test_asymmetric_levels_by_hand() -> None:
    # Two bits from -1 to 2: the scale is 1 and the zero point 1, so levels are -1, 0, 1, 2.
    weight = torch.tensor([-1.0, -0.6, 0.4, 0.7, 2.0])
    assert torch.equal(quantize(weight, 2, "asymmetric"), torch.tensor([-1.0, -1.0, 0.0, 1.0, 2.0]))
    # All positive: levels begin at zero.
    assert torch.equal(quantize(torch.tensor([1.0, 3.0]), 2, "asymmetric"), torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_a_channel_is_quantized_as_if_alone(scheme: str) -> None:
    weight = torch.randn(5, 3, 2, 2) * torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0])[:, None, None, None]
    together = quantize(weight, 3, scheme, is_per_channel=True)
    apart = torch.stack([quantize(channel, 3, scheme) for channel in weight])
    torch.testing.assert_close(together, apart)
    assert (together - weight).abs().amax() < (quantize(weight, 3, scheme) - weight).abs().amax() + 1e-6


@pytest.mark.parametrize("is_per_channel", [False, True])
def test_zeros_stay_zeros(is_per_channel: bool) -> None:
    for scheme in ("symmetric", "asymmetric"):
        assert torch.equal(quantize(torch.zeros(3, 4), 2, scheme, is_per_channel), torch.zeros(3, 4))


def test_embeddings_are_quantized_too() -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    copied = quantized(model, 2, "asymmetric")
    assert len(copied[0].weight.unique()) <= 4
    assert torch.equal(copied[1].weight, model[1].weight)


def test_activations_get_the_levels_of_their_calibration() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(1.0)
    # Two bits for inputs from -1 to 2: levels -1, 0, 1, 2, and what lies beyond is clipped.
    quantize_activations_(model, 2, [torch.tensor([[-1.0], [0.5]]), torch.tensor([[2.0]])])
    given = torch.tensor([[-5.0], [-0.4], [0.6], [1.4], [9.0]])
    assert torch.equal(model(given), torch.tensor([[-1.0], [0.0], [1.0], [1.0], [2.0]]))


def test_batch_normalization_sees_the_new_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    model[0].weight.data.fill_(3.0)
    batches = [torch.randn(64, 1, 4, 4) + 2 for _ in range(3)]
    reestimate_(model, batches)
    means = torch.stack([3 * batch.mean() for batch in batches])
    variances = torch.stack([9 * batch.var() for batch in batches])
    torch.testing.assert_close(model[1].running_mean[0], means.mean())
    torch.testing.assert_close(model[1].running_var[0], variances.mean())
    assert not model[1].training
    assert model[1].momentum == 0.1


def test_a_quantized_layer_starts_at_three_deviations() -> None:
    layer = nn.Conv2d(16, 32, 3)
    nn.init.normal_(layer.weight)
    wrapped = QuantizedLayer(layer, 2, 2, 0.0)
    bound = 3 * layer.weight.std().item()
    assert math.isclose(wrapped.weight_upper.item(), bound, rel_tol=1e-6)
    assert math.isclose(wrapped.weight_lower.item(), -bound, rel_tol=1e-6)
    levels = wrapped.quantized_weight().unique()
    torch.testing.assert_close(levels, bound * torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))


def test_many_bits_change_a_network_little_and_few_bits_much() -> None:
    data = digits()
    inputs, _ = next(data.test.batches(100))
    model = small_mobilenet().eval()

    def distance(bits: int) -> float:
        changed = small_mobilenet().eval()
        changed.load_state_dict(model.state_dict())
        layers = quantize_layers_(changed, bits, 0.0)
        assert len(layers) == 10  # all but the stem and the classifier
        start_bounds_(changed, inputs)
        with torch.no_grad():
            return ((changed(inputs) - model(inputs)).norm() / model(inputs).norm()).item()

    assert distance(12) < 0.1
    assert distance(2) > distance(12)


@pytest.fixture
def few_digits() -> Dataset:
    """Sixty-four images to train with."""
    data = digits()
    train = TensorSplit(data.train.inputs[:64], data.train.labels[:64])
    return Dataset(train, data.validation, data.test, data.classes, data.shape)


def test_compressions_leave_the_model_alone_and_differ_from_it(few_digits: Dataset) -> None:
    model = small_mobilenet().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = Training(epochs=1, batch=16, optimizer="adamw", learning_rate=1e-3)
    inputs, _ = next(few_digits.test.batches(50))
    for compression in (
        PostTrainingQuantization(2, "asymmetric", activation_bits=8),
        QuantizationAwareTraining(2, 1e-3, training, 1e-3),
    ):
        compressed, repeated = (compression.apply(model, few_digits, 0) for _ in range(2))
        with torch.no_grad():
            logits, again = compressed(inputs), repeated(inputs)
            assert not torch.allclose(logits, model(inputs))
        assert torch.equal(logits, again)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_palette_has_as_many_values_as_its_bits_allow(few_digits: Dataset) -> None:
    training = Training(epochs=1, batch=32, optimizer="adamw", learning_rate=1e-3)
    model = small_mobilenet().eval()
    compressed = Palettization(1, training).apply(model, few_digits, 0)
    counts = [
        len(module.weight.unique()) for module in compressed.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    assert len(counts) == 12
    assert max(counts) == 2
