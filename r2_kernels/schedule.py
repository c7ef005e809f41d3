"""A strength that is a function of the step, also inside a compiled graph.

torch.compile would trace the function into the graph with the step as a constant, and compile anew at every step. So
the step is a tensor, and a graph calls the function through an operator, which finds it by its number. No branch of
the function, and no library that it uses, has to be traced.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Function = Callable[[int], float | Tensor]

_library = torch.library.Library("r2_kernels", "FRAGMENT")
_library.define("scheduled_strength(Tensor step, int schedule) -> Tensor")


class Schedule:
    """A function of the step that returns a number or a tensor of one."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.number = next(_numbers)
        _schedules[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Schedule, (self.function,)  # A copy is found by a number of its own.

    def at(self, step: Tensor) -> float | Tensor:
        """The strength at ``step``, a tensor of one integer on the CPU.

        Raises:
            TypeError: the function returns something else than a number.
        """
        if torch.compiler.is_compiling():
            return torch.ops.r2_kernels.scheduled_strength(step, self.number)
        strength = self.function(int(step))
        if isinstance(strength, (int, float)) or (isinstance(strength, Tensor) and strength.numel() == 1):
            return strength
        raise TypeError(f"strength: expected a function that returns a number, got {strength!r} from it")


_numbers = count()
_schedules: WeakValueDictionary[int, Schedule] = WeakValueDictionary()


def _scheduled_strength(step: Tensor, schedule: int) -> Tensor:
    strength = _schedules[schedule].at(step)
    return torch.as_tensor(strength, dtype=torch.float64, device="cpu").detach().reshape(()).clone()


_library.impl("scheduled_strength", _scheduled_strength, "CPU")


@torch.library.register_fake("r2_kernels::scheduled_strength", lib=_library)
def _(step: Tensor, schedule: int) -> Tensor:
    return step.new_empty((), dtype=torch.float64)
