"""The pieces of the demo, and the demo itself in its shortest form."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import demo
from benchmarks.compression import demo_search as search
from benchmarks.compression.accuracy import accuracy
from benchmarks.compression.demo_training import OPTIMIZERS, Result, fit
from benchmarks.compression.digits import digits
from benchmarks.compression.mobilenet_v1 import small_mobilenet
from benchmarks.compression.quantize import SCHEMES, quantize, quantized
from benchmarks.compression.regularization import Regularization
from benchmarks.compression.splits import TensorSplit


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights_have_the_levels_of_their_scheme(bits: int, scheme: str) -> None:
    weight = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    levels = quantize(weight, bits, scheme)
    reach = weight.abs().max() if scheme == "symmetric" else (weight.max() - weight.min()) / 2
    count = 2**bits - 1 if scheme == "symmetric" else 2**bits
    step = 2 * reach / (count - 1)
    assert len(levels.unique()) <= count
    torch.testing.assert_close(levels, (levels / step).round() * step)
    # The zero point is a whole number, so that an asymmetric range may be off by up to half a step at one end.
    assert (levels - weight).abs().max() <= step * (0.5 if scheme == "symmetric" else 1.0) * 1.001
    assert 0 in levels


def test_quantization_refuses_an_unknown_scheme() -> None:
    with pytest.raises(ValueError, match=r"scheme.*'power'"):
        quantize(torch.ones(3), 4, "power")


def test_quantized_model_is_a_copy() -> None:
    model = small_mobilenet().eval()
    before = [parameter.clone() for parameter in model.parameters()]
    copied = quantized(model, 2, "symmetric")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for module in copied.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert len(module.weight.unique()) <= 3


def test_digits_are_split_without_overlap() -> None:
    data = digits()
    assert [len(split.labels) for split in (data.train, data.validation, data.test)] == [1077, 360, 360]
    seen = {tuple(image.flatten().tolist()) for image in data.train.inputs}
    for split in (data.validation, data.test):
        overlap = sum(tuple(image.flatten().tolist()) in seen for image in split.inputs)
        assert overlap == 0


def test_the_search_decides_by_validation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings are replaced by results where validation and test disagree about what is best."""

    def trained(settings: Regularization, seed: int, steps: int, optimizer: str) -> Result:
        keys = [(scheme, bits) for scheme in SCHEMES for bits in (8, 4, 3, 2)]
        result = Result(settings, seed, weights=torch.ones(1))
        result.validation = dict.fromkeys(keys, 50.0 + settings.strength)
        result.test = dict.fromkeys(keys, 50.0 - settings.strength)
        return result

    monkeypatch.setattr(search, "train", trained)
    monkeypatch.setattr(search, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(2))
    plan = search.Plan(["linf"], None, seeds=search.SEARCH_SEEDS + 1, steps=1)
    calls: list[None] = []
    study = plan.run(lambda: calls.append(None))
    assert len(calls) == len(plan)
    strongest = max(search.CANDIDATES["linf"], key=lambda settings: settings.strength)
    assert [trial.settings for trial in study.trials if trial.is_chosen] == [Regularization(), strongest]
    assert [[run.seed for run in runs] for runs in study.results.values()] == [list(range(search.SEARCH_SEEDS + 1))] * 2
    assert all(run.settings == strongest for run in study.results["linf"])


def test_a_given_strength_leaves_the_starts_to_search() -> None:
    plan = search.Plan(["linf", "soft_min_max"], 0.25, seeds=1, steps=1)
    assert plan.candidates["linf"] == [Regularization("linf", 0.25)]
    tried = plan.candidates["soft_min_max"]
    assert {settings.strength for settings in tried} == {0.25}
    assert len(set(tried)) == len(tried)
    assert len({settings.start for settings in tried}) > 1


@pytest.mark.usefixtures("restored_threads")
def test_training_repeats_and_regularizes() -> None:
    torch.set_num_threads(1)
    data = digits().train

    def parameters(settings: Regularization) -> list[Tensor]:
        return list(fit(settings, 0, 2, data, "torch").parameters())

    plain = parameters(Regularization())
    assert all(map(torch.equal, plain, parameters(Regularization())))
    for candidates in search.CANDIDATES.values():
        regularized = parameters(candidates[0])
        assert not any(map(torch.equal, plain, regularized))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("penalty", [None, *search.CANDIDATES])
def test_either_optimizer_trains_the_same(penalty: str | None) -> None:
    """In float64, where forty steps do not yet blow a rounding up."""
    torch.set_num_threads(1)
    settings = Regularization() if penalty is None else search.CANDIDATES[penalty][0]
    torch.set_default_dtype(torch.float64)
    try:
        train, validation = (TensorSplit(s.inputs.double(), s.labels) for s in (digits().train, digits().validation))
        models = [fit(settings, 0, 40, train, optimizer) for optimizer in OPTIMIZERS]
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(*(model.state_dict().values() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert accuracy(models[0], validation) == accuracy(models[1], validation) > 50


@pytest.mark.usefixtures("restored_threads")
def test_demo_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    assert demo.main(["--quick", "--seeds", "1", "--penalty", "linf", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "L∞" in shown
    assert "asymmetric" in shown
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert [run["settings"]["penalty"] for run in numbers["runs"]] == [None, "linf"]
    assert all(0 <= value <= 100 for run in numbers["runs"] for value in run["test"].values())
    (speed,) = numbers["speed"]["seconds"]
    assert f"{speed['eager'] / speed['fused']:.0f} ×" in shown
    assert {"AdamW", "SGD"} == set(numbers["steps taken"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1"),
        (["--strength", "-1"], "--strength: expected a positive number"),
        (["--strength", "nan"], "--strength: expected a positive number"),
        (["--penalty", "l7"], "--penalty"),
        (["--output", __file__], "--output: expected a folder"),
    ],
)
def test_demo_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err
