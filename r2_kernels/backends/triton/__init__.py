"""The Triton kernels: all tensors of a list in a constant number of launches, on NVIDIA and AMD GPUs.

``chunk_table.py`` cuts a list of tensors into chunks, ``reduce_kernels.py`` and ``apply_kernel.py`` are the skeletons
over these, ``penalties.py`` what they compute, ``operators.py`` launches them; for channels and groups these are
``segment_table.py``, ``segment_kernels.py`` and ``segment_operators.py``. An optimizer's step is one more skeleton,
``step_kernel.py``, with ``update_rules.py``, ``step_table.py`` and ``step_operators.py``. The quantizer is
``ewgs_kernels.py`` and ``ewgs_operators.py``. With ``TRITON_INTERPRET=1``, set before triton is imported, the same
kernels are interpreted on tensors of the CPU: slowly, for tests.
"""

from __future__ import annotations

from functools import cache

import torch

try:
    import triton
except ImportError:
    triton = None

DEVICE_TYPES: tuple[str, ...] = ("cuda",)

if triton is not None:
    from r2_kernels.backends.triton.any_granularity import apply, apply_, reduce, reduce_apply_
    from r2_kernels.backends.triton.ewgs_operators import ewgs_backward, ewgs_forward
    from r2_kernels.backends.triton.operators import finalize
    from r2_kernels.backends.triton.step_operators import adamw_step_, sgd_step_

    __all__ = [
        "DEVICE_TYPES",
        "adamw_step_",
        "apply",
        "apply_",
        "ewgs_backward",
        "ewgs_forward",
        "finalize",
        "reduce",
        "reduce_apply_",
        "sgd_step_",
        "why_unavailable",
    ]
    if triton.knobs.runtime.interpret:
        DEVICE_TYPES = ("cuda", "cpu")

# The first NVIDIA generation with bfloat16 arithmetic, which the compiled kernels are tested for.
OLDEST_CAPABILITY = (8, 0)


@cache
def why_unavailable() -> str | None:
    if triton is None:
        return "triton is not installed; `pip install triton` (PyTorch's builds for GPUs bring it along)"
    if "cpu" in DEVICE_TYPES:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use; for tests, TRITON_INTERPRET=1 interprets the kernels on the CPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; 8.0 or newer is needed"
    return None
