"""The operators with the arguments of ``r2_kernels.ops``: whole weights one way, channels and groups another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from r2_kernels.backends.triton import operators, segment_operators
from r2_kernels.granularity import PER_TENSOR


def _with_group_size(name: str, argument_count: int) -> Callable[..., Any]:
    """An operator whose last argument, after ``argument_count`` others, is ``group_size``, or not given."""

    def operator(*arguments: Any) -> Any:
        given, group_size = arguments[:argument_count], arguments[argument_count:]
        if group_size in ((), (PER_TENSOR,)):
            return getattr(operators, name)(*given)
        return getattr(segment_operators, name)(*given, *group_size)

    return operator


reduce = _with_group_size("reduce", 3)
apply = _with_group_size("apply", 6)
apply_ = _with_group_size("apply_", 7)
reduce_apply_ = _with_group_size("reduce_apply_", 5)
