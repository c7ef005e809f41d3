"""``python -m r2_kernels``: what is available here, and why not the rest."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import r2_kernels
from r2_kernels import backends


def report() -> str:
    """One line per version, backend and setting."""
    lines = [
        f"r2_kernels      {r2_kernels.__version__}",
        f"torch           {torch.__version__}",
        f"triton          {_version('triton')}",
        f"python          {platform.python_version()} on {platform.machine()}",
        f"threads         {torch.get_num_threads()}",
        f"GPU             {_gpus()}",
    ]
    for name in backends.BACKENDS:
        reason = backends.by_name(name).why_unavailable()
        lines.append(
            f"backend {name:<9} {'available' if reason is None else 'not available: ' + reason}{_detail(name)}"
        )
    requested = backends.requested()
    lines.append(f"in use          {'by the device of the weights' if requested is None else requested}")
    return "\n".join(lines)


def _detail(name: str) -> str:
    backend = backends.by_name(name)
    if name != "cpu" or backend.why_unavailable() is not None:
        return ""
    chosen = "R2_KERNELS_INSTRUCTION_SET" if os.environ.get("R2_KERNELS_INSTRUCTION_SET") else "this processor"
    return f", instruction set {backend.instruction_set()} (chosen by {chosen})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or "none"


if __name__ == "__main__":
    print(report())
