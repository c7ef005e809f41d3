"""The C++ kernels of ``csrc/cpu``: one shared library on PyTorch's stable ABI, registered for the CPU dispatch key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

DEVICE_TYPES = ("cpu",)

HOW_TO_BUILD = "build it with a C++17 compiler: `pip install -e .` (or `make build`) in a checkout of r2_kernels"


def _load_library() -> str | None:
    """Load the shared library, which registers the kernels; None, or why that failed."""
    libraries = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if not libraries:
        return f"the compiled extension is not there; {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load beside torch {torch.__version__} ({error}); {HOW_TO_BUILD}"
    return None


_failure = _load_library()


def why_unavailable() -> str | None:
    return _failure


def instruction_set() -> str:
    """The instruction set chosen for this processor: ``avx512``, ``avx2`` or ``portable``."""
    return str(torch.ops.r2_kernels.cpu_instruction_set())


def __getattr__(name: str) -> Any:
    """The operators, which are defined after this module: by the modules that hold their schemas."""
    return getattr(torch.ops.r2_kernels, name)
