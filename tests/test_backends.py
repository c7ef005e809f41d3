"""Which backend computes: the context manager, the environment variable, the fallback, the report of what there is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import r2_kernels
from r2_kernels import backends, dkm, linf, ops, use_backend

BACKEND = "cpu"
PACKAGE = Path(r2_kernels.__file__).parent


def run(code: str, directory: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that imports the package from ``directory``, or from where this one did."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != backends.ENVIRONMENT_VARIABLE},
        "PYTHONPATH": str(directory or PACKAGE.parent),
        "PYTHONWARNINGS": "default",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=directory or "/", capture_output=True, text=True, timeout=120
    )


def which(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Appends the name of every backend that reduces from here on."""
    seen: list[str] = []
    for name in ("reference", "cpu"):
        module = backends.by_name(name)
        original = module.reduce

        def spy(*args: Any, name: str = name, original: Any = original) -> Any:
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(module, "reduce", spy)
    dispatched = ops._dispatched["reduce"]

    def default(*args: Any) -> Any:
        seen.append("dispatcher")
        return dispatched(*args)

    monkeypatch.setitem(ops._dispatched, "reduce", default)
    return seen


def test_every_backend_is_a_module_of_the_registry() -> None:
    for name in backends.BACKENDS:
        module = backends.by_name(name)
        assert module.why_unavailable() is None or isinstance(module.why_unavailable(), str)
        assert isinstance(module.DEVICE_TYPES, tuple)
        for operator in ops.SCHEMAS:
            assert callable(getattr(module, operator)), f"{name} lacks {operator}"


@pytest.mark.usefixtures("cpu_backend")
def test_the_compiled_backend_is_here() -> None:
    """Whatever else is skipped, this one says so."""
    assert backends.by_name("cpu").why_unavailable() is None
    assert backends.by_name("cpu").instruction_set() in ("avx512", "avx2", "portable")


@pytest.mark.usefixtures("cpu_backend")
def test_use_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = which(monkeypatch)
    weights = [torch.ones(3)]
    with use_backend("reference"):
        linf(weights)
        with use_backend("cpu"):
            linf(weights)
        linf(weights)
    assert seen == ["reference", "cpu", "reference"]


def test_the_device_decides_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.requested() is not None:
        pytest.skip("the environment decides")
    seen = which(monkeypatch)
    linf([torch.ones(3)])
    assert seen == ["dispatcher"]


def test_the_backend_is_restored_after_an_error() -> None:
    before = backends.requested()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends.requested() == before


def test_use_backend_is_for_this_thread() -> None:
    found: list[str | None] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(backends.requested()))
        thread.start()
        thread.join()
        assert backends.requested() == "reference"
    assert found == [backends.requested()]


@pytest.mark.parametrize("name", ["cuda", "", "CPU", None, 3])
def test_unknown_backends(name: Any) -> None:
    known = ", ".join(map(repr, backends.BACKENDS))
    with pytest.raises(ValueError, match=f"backend: expected one of {known}, got {name!r}"):
        use_backend(name).__enter__()


def test_an_operator_that_a_backend_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(backends.load("reference"), "dkm_forward")
    with (
        use_backend("reference"),
        pytest.raises(NotImplementedError, match="dkm_forward: the backend 'reference' does"),
    ):
        dkm(torch.randn(5), torch.tensor([0.0, 1.0]))


def test_an_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the call that needs it, not at import."""
    monkeypatch.setattr(backends.by_name("cpu"), "why_unavailable", lambda: "the moon is wrong")
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: the moon is wrong"), use_backend("cpu"):
        pass


@pytest.mark.usefixtures("cpu_backend")
def test_a_backend_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match="backend 'cpu': expected weights on device cpu, got meta"):
        linf([torch.ones(3, device="meta")])


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_environment_variable(name: str) -> None:
    done = run(
        "import torch, r2_kernels; from r2_kernels import backends; print(backends.requested());"
        "print(r2_kernels.linf([torch.tensor([-3.0, 2.0])]).item())",
        R2_KERNELS_BACKEND=name,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name, "3.0"]


def test_the_context_manager_wins_over_the_environment() -> None:
    code = (
        "from r2_kernels import backends, use_backend\n"
        "with use_backend('reference'): print(backends.requested())\n"
        "print(backends.requested())\n"
    )
    assert run(code, R2_KERNELS_BACKEND="cpu").stdout.split() == ["reference", "cpu"]


def test_an_unknown_name_in_the_environment() -> None:
    done = run("import r2_kernels", R2_KERNELS_BACKEND="gpu")
    assert done.returncode != 0
    known = ", ".join(map(repr, backends.BACKENDS))
    assert f"R2_KERNELS_BACKEND: expected one of {known}, got 'gpu'" in done.stderr


def test_an_empty_environment_variable_is_none() -> None:
    done = run("from r2_kernels import backends; print(backends.requested())", R2_KERNELS_BACKEND="")
    assert done.stdout.split() == ["None"], done.stderr


@pytest.fixture
def without_extension(tmp_path: Path) -> Path:
    """A copy of the package as a checkout has it before anything is built."""
    shutil.copytree(PACKAGE, tmp_path / "r2_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_without_the_extension_the_reference_computes(without_extension: Path) -> None:
    """Said once, with how to build it, and not at import."""
    code = (
        "import sys, torch, r2_kernels\n"
        "from r2_kernels import RangeRegularizer\n"
        "assert r2_kernels.__file__.startswith(sys.argv[1] if len(sys.argv) > 1 else '/')\n"
        "print('imported', file=sys.stderr)\n"
        "w = torch.tensor([-3.0, 2.0], requires_grad=True)\n"
        "for _ in range(3):\n"
        "    r2_kernels.linf([w]).sum().backward()\n"
        "print(w.grad.tolist())\n"
        "print(RangeRegularizer(torch.nn.Linear(3, 3)).add_gradients_().isfinite().item())\n"
    )
    done = run(code, without_extension)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[-3.0, 0.0]", "True"]
    before, after = done.stderr.split("imported")
    assert "RuntimeWarning" not in before
    assert after.count("RuntimeWarning") == 1
    assert "pip install" in after or "make build" in after


def test_without_the_extension_asking_for_it_is_an_error(without_extension: Path) -> None:
    done = run("from r2_kernels import use_backend\nwith use_backend('cpu'): pass", without_extension)
    assert done.returncode != 0
    assert "backend 'cpu' is not available: the compiled extension is not there; build it" in done.stderr


def test_the_environment_asks_for_what_is_missing(without_extension: Path) -> None:
    """No silent fallback."""
    code = "import torch, r2_kernels; print('imported'); r2_kernels.linf([torch.ones(3)])"
    done = run(code, without_extension, R2_KERNELS_BACKEND="cpu")
    assert done.stdout.split() == ["imported"]
    assert "backend 'cpu' is not available" in done.stderr


def test_a_broken_extension_says_so(without_extension: Path) -> None:
    (without_extension / "r2_kernels" / "_C.abi3.so").write_bytes(b"not a shared library")
    done = run("from r2_kernels import use_backend\nwith use_backend('cpu'): pass", without_extension)
    assert done.returncode != 0
    assert "does not load beside torch" in done.stderr


def test_the_report_of_what_there_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "r2_kernels"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert r2_kernels.__version__ in done.stdout
    assert torch.__version__ in done.stdout
    for name in backends.BACKENDS:
        assert name in done.stdout
    if backends.by_name("cpu").why_unavailable() is None:
        assert backends.by_name("cpu").instruction_set() in done.stdout


def test_the_report_says_why_one_is_missing(without_extension: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "r2_kernels"],
        env={**os.environ, "PYTHONPATH": str(without_extension)},
        cwd=without_extension,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "the compiled extension is not there" in done.stdout
