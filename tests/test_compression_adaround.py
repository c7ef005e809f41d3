"""AdaRound: its rounding against every other, and against rounding to nearest in layers and networks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from benchmarks.compression.adaround import AdaptiveRounding, adaptively_rounded, rounded_weight
from benchmarks.compression.dataset import Dataset
from benchmarks.compression.digits import digits
from benchmarks.compression.mobilenet_v1 import small_mobilenet
from benchmarks.compression.quantize import SCHEMES, quantize, quantized, quantizer
from benchmarks.compression.splits import TensorSplit

GRANULARITIES = pytest.mark.parametrize("is_per_channel", [False, True])


def correlated(count: int, width: int) -> Tensor:
    """Inputs whose errors add up, as those of a network do: rounding to nearest minds one weight at a time."""
    return torch.randn(count, 1) + 0.3 * torch.randn(count, width)


def error(layer: nn.Module, weight: Tensor, inputs: Tensor) -> float:
    """The mean square of how far the layer's outputs are off with this weight."""
    with torch.no_grad():
        return (torch.func.functional_call(layer, {"weight": weight}, (inputs,)) - layer(inputs)).square().mean().item()


def learned(layer: nn.Module, settings: AdaptiveRounding, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        outputs = layer(inputs)
    return rounded_weight(layer, settings, inputs, outputs, torch.Generator().manual_seed(0))


def test_it_finds_the_best_of_all_roundings_mostly() -> None:
    settings = AdaptiveRounding(2, "asymmetric", steps=300, learning_rate=0.05)
    ups = torch.tensor(list(product((0.0, 1.0), repeat=8)))[:, None]
    found_best = 0
    for seed in range(8):
        torch.manual_seed(seed)
        layer, inputs = nn.Linear(8, 1), correlated(500, 8)
        scale, zero_point, low, high = quantizer(layer.weight, 2, "asymmetric", False)
        down = (layer.weight.detach() / scale.float()).floor()
        weights = ((down + ups + zero_point).clamp(low, high) - zero_point) * scale.float()
        best = min(error(layer, weight, inputs) for weight in weights)
        found = error(layer, learned(layer, settings, inputs), inputs)
        found_best += found <= 1.001 * best
        assert found <= 1.001 * error(layer, quantize(layer.weight, 2, "asymmetric"), inputs)
    assert found_best >= 6  # of 256 roundings each


@GRANULARITIES
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["linear", "convolution", "depthwise"])
def test_a_layer_keeps_its_outputs_better_than_with_rounding_to_nearest(
    kind: str, scheme: str, is_per_channel: bool
) -> None:
    settings = AdaptiveRounding(3, scheme, is_per_channel, steps=300)
    errors, errors_of_nearest = 0.0, 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        layer, inputs = {
            "linear": lambda: (nn.Linear(32, 16), correlated(1000, 32)),
            "convolution": lambda: (nn.Conv2d(8, 16, 3, padding=1), correlated(200, 8 * 36).reshape(200, 8, 6, 6)),
            "depthwise": lambda: (nn.Conv2d(16, 16, 3, groups=16), correlated(200, 16 * 36).reshape(200, 16, 6, 6)),
        }[kind]()
        weight = learned(layer, settings, inputs)
        scale, *_ = quantizer(layer.weight, 3, scheme, is_per_channel)
        step = scale.float().reshape(-1, *[1] * (weight.ndim - 1))
        levels = weight / step
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
        assert ((weight - layer.weight).abs() <= 1.001 * step).all()  # the level above or the one below
        errors += error(layer, weight, inputs)
        errors_of_nearest += error(layer, quantize(layer.weight, 3, scheme, is_per_channel), inputs)
    assert errors < 0.75 * errors_of_nearest


@pytest.fixture(scope="module")
def few_digits() -> Dataset:
    data = digits()
    train = TensorSplit(data.train.inputs[:300], data.train.labels[:300])
    return Dataset(train, data.validation, data.test, data.classes, data.shape)


@GRANULARITIES
def test_a_network_keeps_its_outputs_better(few_digits: Dataset, is_per_channel: bool) -> None:
    torch.manual_seed(0)
    model = small_mobilenet().eval()
    settings = AdaptiveRounding(3, "asymmetric", is_per_channel, steps=100, learning_rate=0.05)
    inputs, _ = next(few_digits.test.batches(200))
    batches = [batch for batch, _ in few_digits.train.batches(100)]
    rounded = adaptively_rounded(model, settings, batches, torch.Generator().manual_seed(0))
    nearest = quantized(model, 3, "asymmetric", is_per_channel)
    with torch.no_grad():
        logits = model(inputs)
        assert (rounded(inputs) - logits).norm() < 0.9 * (nearest(inputs) - logits).norm()


def test_the_model_stays_and_the_same_seed_gives_the_same(few_digits: Dataset) -> None:
    model = small_mobilenet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressed, repeated = (AdaptiveRounding(2, "asymmetric", steps=5).apply(model, few_digits, 0) for _ in range(2))
    inputs, _ = next(few_digits.test.batches(50))
    with torch.no_grad():
        assert torch.equal(compressed(inputs), repeated(inputs))
    assert model.training
    assert not compressed.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    layers = [module for module in compressed.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert max(len(layer.weight.unique()) for layer in layers) <= 4


def test_embeddings_and_layers_that_are_not_called_are_rounded_to_nearest() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear, self.unused = nn.Embedding(20, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.linear(self.embedding(tokens))

    model, tokens = Model(), torch.randint(20, (50, 6))
    settings = AdaptiveRounding(3, "symmetric", steps=20)
    rounded = adaptively_rounded(model, settings, [tokens], torch.Generator().manual_seed(0))
    assert torch.equal(rounded.embedding.weight, quantize(model.embedding.weight, 3, "symmetric"))
    assert torch.equal(rounded.unused.weight, quantize(model.unused.weight, 3, "symmetric"))
    assert len(rounded.linear.weight.unique()) <= 7


def test_names_are_unique() -> None:
    settings = [
        AdaptiveRounding(bits, scheme, is_per_channel, steps)
        for bits in (2, 3)
        for scheme in SCHEMES
        for is_per_channel in (False, True)
        for steps in (100, 1000)
    ]
    assert len({str(one) for one in settings}) == len(settings)
    assert len({one.family for one in settings}) == 4
