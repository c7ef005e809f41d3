"""Range regularization (R², arXiv 2303.08253) for all weights of a model in one fused pass."""

from r2_kernels import optim, reference
from r2_kernels.backends import use_backend
from r2_kernels.functional import kurtosis, linf, margin, soft_min_max
from r2_kernels.granularity import segment_counts
from r2_kernels.palettization import dkm
from r2_kernels.quantizers import ewgs
from r2_kernels.regularizer import RangeRegularizer

__all__ = [
    "RangeRegularizer",
    "dkm",
    "ewgs",
    "kurtosis",
    "linf",
    "margin",
    "optim",
    "reference",
    "segment_counts",
    "soft_min_max",
    "use_backend",
]
__version__ = "0.1.0"
