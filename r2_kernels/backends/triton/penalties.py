"""The penalties by name, each a set of functions as ``penalty_functions.py`` has it."""

from __future__ import annotations

from r2_kernels.backends.triton import kurtosis, linf, margin, soft_min_max

FUNCTIONS = {
    "linf": linf.FUNCTIONS,
    "margin": margin.FUNCTIONS,
    "soft_min_max": soft_min_max.FUNCTIONS,
    "kurtosis": kurtosis.FUNCTIONS,
}
