"""The choice of models: ``pytest benchmarks --model GPT-2``."""

import pytest

from benchmarks.shapes import MODELS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", action="append", choices=list(MODELS), help="time this model only (repeatable)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    models = config.getoption("--model")
    if models:
        items[:] = [item for item in items if item.callspec.params["model"] in models]
