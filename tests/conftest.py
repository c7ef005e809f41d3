"""The ``backend`` fixture: every test that takes it runs once for each backend, computing with that backend.

The Triton backend takes part where a GPU is, or where ``TRITON_INTERPRET=1`` interprets it on the CPU; that is decided
when triton is imported, so interpreted tests need a run of their own::

    TRITON_INTERPRET=1 pytest tests/test_properties.py --backend triton

A backend that is chosen but not available makes its tests fail, not skip, unless
``R2_KERNELS_TEST_MISSING_BACKENDS=skip`` says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from r2_kernels import backends, use_backend

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SKIP_MISSING = os.environ.get("R2_KERNELS_TEST_MISSING_BACKENDS") == "skip"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=backends.BACKENDS,
        help="test this backend only (repeatable); default: reference and cpu, and triton where it can run",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: too much work for interpreted kernels, which skip it")
    config.addinivalue_line("markers", "slow: takes minutes or many gigabytes; run by `pytest -m slow` alone")


def _chosen(config: pytest.Config) -> list[str]:
    chosen = config.getoption("--backend")
    if chosen:
        return list(dict.fromkeys(chosen))
    can_run_triton = IS_INTERPRETED or torch.cuda.is_available()
    return [name for name in backends.BACKENDS if name != "triton" or can_run_triton]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _chosen(metafunc.config), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--backend`` given, leave out what would test other backends or none; never interpret large tests."""
    chosen = config.getoption("--backend")
    kept, left_out = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        backend = callspec.params.get("backend") if callspec is not None else None
        is_too_large = backend == "triton" and IS_INTERPRETED and item.get_closest_marker("large") is not None
        is_other = bool(chosen) and backend is None and getattr(item.module, "BACKEND", None) not in chosen
        (left_out if is_too_large or is_other else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def require(name: str) -> None:
    """Fail, or skip where the environment allows it, unless the backend is available."""
    reason = backends.by_name(name).why_unavailable()
    if reason is not None:
        (pytest.skip if SKIP_MISSING else pytest.fail)(f"backend {name!r} is not available: {reason}")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that computes everything in the test."""
    require(request.param)
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend's weights live."""
    return torch.device("cuda" if backend == "triton" and not IS_INTERPRETED else "cpu")


@pytest.fixture
def cpu_backend() -> Iterator[None]:
    """The compiled CPU backend, and nothing else."""
    require("cpu")
    with use_backend("cpu"):
        yield


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For tests that change the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20230308)
