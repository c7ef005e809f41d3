"""The example with a network of ``timm`` trains, and the range of the layers shrinks by it."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest


def test_the_range_shrinks() -> None:
    pytest.importorskip("timm")
    spec = spec_from_file_location("timm_example", Path(__file__).parent.parent / "examples" / "timm_example.py")
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    _, plain = example.train(0.0, 8)
    accuracy, regularized = example.train(10.0, 8)
    assert 0 < accuracy <= 1
    largest = [sum(max(abs(row["min"]), abs(row["max"])) for row in report) for report in (plain, regularized)]
    assert largest[1] < 0.95 * largest[0]
