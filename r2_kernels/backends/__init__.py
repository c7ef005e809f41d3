"""The backends by name, what each needs, and which one the caller has asked for.

A backend is a module in this package with the operators of ``ops.py`` as functions of the same names and arguments,
``DEVICE_TYPES``, the device types it computes on, and ``why_unavailable()``, None or a sentence that says what is
missing and how to get it. A new backend is one such module and one line in ``BACKENDS``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

ENVIRONMENT_VARIABLE = "R2_KERNELS_BACKEND"
BACKENDS = ("reference", "cpu", "triton")


class _Requested(threading.local):
    """What this thread has asked for. (Not a ContextVar: torch.compile cannot trace one.)"""

    name: str | None = None


_requested = _Requested()


def by_name(name: str) -> ModuleType:
    """The backend's module, available or not; ValueError naming the known ones where there is none of that name."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return import_module(f"{__name__}.{name}")


def load(name: str, device_type: str | None = None) -> ModuleType:
    """The backend's module, ready to compute on ``device_type``.

    Raises:
        RuntimeError: the backend misses something here; the message says what, and how to get it.
        ValueError: an unknown name, or the backend does not compute on that type of device.
    """
    _require(name, device_type)
    return sys.modules[f"{__name__}.{name}"]


def _require(name: str, device_type: str | None) -> None:
    backend = by_name(name)
    reason = backend.why_unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if device_type is not None and backend.DEVICE_TYPES and device_type not in backend.DEVICE_TYPES:
        expected = " or ".join(backend.DEVICE_TYPES)
        raise ValueError(f"backend {name!r}: expected weights on device {expected}, got {device_type}")


# Traced, it is asked once: torch.compile can follow no import. What torch.compiler.assume_constant_result does, which
# would import the compiler with this package: half a second.
_require._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with the named backend inside the ``with`` block, in this thread, whatever the weights' device prefers.

    Without it, the environment variable ``R2_KERNELS_BACKEND`` decides, and where that is not set the weights' device.

    Raises:
        ValueError: an unknown name.
        RuntimeError: that backend misses something here; the message says what, and how to get it.
    """
    load(name)
    before, _requested.name = _requested.name, name
    try:
        yield
    finally:
        _requested.name = before


def requested() -> str | None:
    """The backend that the caller asked for, or None: then the weights' device decides."""
    return _requested.name or _from_environment


def _read_environment() -> str | None:
    name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_from_environment = _read_environment()
