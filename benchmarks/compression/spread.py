"""How far the results of several seeds lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; NaN of one value."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")
