"""The pieces of the demo, and the demo itself in its shortest form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import demo
from benchmarks.compression.data import digits
from benchmarks.compression.models import SmallMobileNet
from benchmarks.compression.quantize import SCHEMES, quantize, quantized


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights_have_the_levels_of_their_scheme(bits: int, scheme: str) -> None:
    weight = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    levels = quantize(weight, bits, scheme)
    expected = 2**bits - 1 if scheme == "symmetric" else 2**bits
    assert len(levels.unique()) <= expected
    step = levels.unique().diff().min()
    assert (levels - weight).abs().max() <= step / 2 * (1 + 1e-3) + (0 if scheme == "symmetric" else step / 2)
    assert 0 in levels or bits == 2


def test_quantization_refuses_an_unknown_scheme() -> None:
    with pytest.raises(ValueError, match=r"scheme.*'power'"):
        quantize(torch.ones(3), 4, "power")


def test_quantized_model_is_a_copy() -> None:
    model = SmallMobileNet().eval()
    before = [parameter.clone() for parameter in model.parameters()]
    copied = quantized(model, 2, "symmetric")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for module in copied.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert len(module.weight.unique()) <= 3


def test_digits_are_split_without_overlap() -> None:
    data = digits()
    assert [len(split.labels) for split in data] == [1077, 360, 360]
    seen = {tuple(image.flatten().tolist()) for image in data.train.images}
    for split in (data.validation, data.test):
        overlap = sum(tuple(image.flatten().tolist()) in seen for image in split.images)
        assert overlap == 0


def test_demo_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--seeds", "1", "--penalty", "linf", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "L∞" in shown
    assert "asymmetric" in shown
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    runs = json.loads((tmp_path / "demo.json").read_text())
    assert [run["settings"]["penalty"] for run in runs] == [None, "linf"]
    assert all(0 <= value <= 100 for run in runs for value in run["test"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1"),
        (["--strength", "-1"], "--strength: expected a positive number"),
        (["--penalty", "l7"], "--penalty"),
        (["--output", __file__], "--output: expected a folder"),
    ],
)
def test_demo_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err
