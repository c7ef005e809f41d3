"""The penalties by name: which statistics of a segment suffice, and how they merge, finalize and give the gradient.

A *segment* is what one penalty value is computed over, here a whole weight tensor. Its statistics are a row of S
float64 numbers; the rows of two halves of a segment merge into the row of the whole, so chunks, threads, blocks and
ranks are one and the same merge. Given the row, the gradient is elementwise. ``docs/derivation.md`` derives every
closed form below from the definitions in ``reference.py``; the tests hold each to float64 autograd.

This module is the contract that all backends share: the names and the order of the statistics are the layout of the
tensors that the operators in ``ops.py`` exchange.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Elements per chunk: the unit that one thread or block reduces at a time, fixed so that results do not depend on how
# many of them there are. 64 KiB of float32, so that a chunk stays in a core's L2 cache between two looks at it.
CHUNK_SIZE = 16384
# Of a uniform distribution: what KURE pushes the kurtosis of weights to.
UNIFORM_KURTOSIS = 1.8


class Penalty(ABC):
    """One penalty in closed form. All tensors are float64; ``parameter``, (N,), is ignored where there is none."""

    name: str
    statistics: tuple[str, ...]
    parameter: str | None = None
    # The gradient is nonzero only in chunks whose own maximum is the segment's: backends keep the chunks' maxima.
    is_sparse: bool = False
    # Columns of which the whole has the parts' largest and smallest; where these agree, all other columns add.
    maxima: tuple[int, ...] = ()
    minima: tuple[int, ...] = ()

    @abstractmethod
    def reduce(self, weight: Tensor, parameter: Tensor) -> Tensor:
        """The statistics, shape (S,), of a flat weight of any length, zero included."""

    @abstractmethod
    def merge(self, parts: Tensor, parameter: Tensor) -> Tensor:
        """The statistics (N, S) of segments from those of their parts, (parts, N, S)."""

    @abstractmethod
    def finalize(self, statistics: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """The values (N,) and their gradients with respect to the parameter, (N,), or (0,) where there is none."""

    @abstractmethod
    def gradient(self, weight: Tensor, statistics: Tensor, parameter: Tensor) -> Tensor:
        """The gradient of one segment's value, in the shape of ``weight``, from its row of statistics, (S,)."""


class LInf(Penalty):
    """``max|w|``; entries that tie for it share the gradient."""

    name = "linf"
    statistics = ("maximum", "count")
    maxima = (0,)
    is_sparse = True

    def reduce(self, weight: Tensor, parameter: Tensor) -> Tensor:
        if weight.numel() == 0:
            return weight.new_zeros(2)
        magnitude = weight.abs()
        maximum = magnitude.amax()
        return torch.stack([maximum, (magnitude == maximum).sum().to(weight.dtype)])

    def merge(self, parts: Tensor, parameter: Tensor) -> Tensor:
        maximum = parts[..., 0].amax(0)
        return torch.stack([maximum, (parts[..., 1] * (parts[..., 0] == maximum)).sum(0)], -1)

    def finalize(self, statistics: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
        return statistics[:, 0], statistics.new_empty(0)

    def gradient(self, weight: Tensor, statistics: Tensor, parameter: Tensor) -> Tensor:
        maximum, count = statistics
        # 0 / 0 is intended: a segment with a NaN has no entry that reaches its maximum, and a NaN gradient.
        return weight.sign() * (weight.abs() == maximum) / count


class Margin(Penalty):
    """``|M| + sum(max(|w| - |M|, 0))``."""

    name = "margin"
    statistics = ("excess", "exceeding")
    parameter = "margin"

    def reduce(self, weight: Tensor, parameter: Tensor) -> Tensor:
        excess = weight.abs() - parameter.abs()
        return torch.stack([torch.relu(excess).sum(), (excess > 0).sum().to(weight.dtype)])

    def merge(self, parts: Tensor, parameter: Tensor) -> Tensor:
        return parts.sum(0)

    def finalize(self, statistics: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
        excess, exceeding = statistics.unbind(-1)
        return parameter.abs() + excess, parameter.sign() * (1 - exceeding)

    def gradient(self, weight: Tensor, statistics: Tensor, parameter: Tensor) -> Tensor:
        return weight.sign() * (weight.abs() > parameter.abs())


class SoftMinMax(Penalty):
    """``s_max - s_min + exp(-a)``, the means of w under softmax(a·w) and softmax(-a·w).

    Both ends are kept as distances to the hard maximum and minimum, so nothing overflows and no variance cancels:
    with u = w - maximum and e = exp(|a|·u), ``z, s, q`` of the upper end are the sums of e, u·e and u²·e; with
    u = w - minimum and e = exp(-|a|·u) they are those of the lower end. A negative temperature swaps the two ends.
    """

    name = "soft_min_max"
    statistics = (
        "maximum",
        "minimum",
        "z_upper",
        "s_upper",
        "q_upper",
        "z_lower",
        "s_lower",
        "q_lower",
    )
    parameter = "temperature"
    maxima = (0,)
    minima = (1,)

    def reduce(self, weight: Tensor, parameter: Tensor) -> Tensor:
        if weight.numel() == 0:
            return weight.new_tensor([-torch.inf, torch.inf, 0, 0, 0, 0, 0, 0])
        ends = torch.stack([weight.amax(), weight.amin()])
        distance = weight - ends[:, None]
        weighting = torch.exp(parameter.abs() * torch.stack([distance[0], -distance[1]]))
        moments = torch.stack([(distance**power * weighting).sum(-1) for power in range(3)], -1)
        return torch.cat([ends, moments.flatten()])

    def merge(self, parts: Tensor, parameter: Tensor) -> Tensor:
        maximum, minimum = parts[..., 0].amax(0), parts[..., 1].amin(0)
        upper = _shift_moments(parts[..., 2:5], parts[..., 0] - maximum, parameter.abs())
        lower = _shift_moments(parts[..., 5:8], parts[..., 1] - minimum, -parameter.abs())
        return torch.cat([torch.stack([maximum, minimum], -1), upper.sum(0), lower.sum(0)], -1)

    def finalize(self, statistics: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
        maximum, minimum, z_upper, s_upper, q_upper, z_lower, s_lower, q_lower = statistics.unbind(-1)
        means = torch.stack([s_upper / z_upper, s_lower / z_lower])
        variances = torch.stack([q_upper / z_upper, q_lower / z_lower]) - means**2
        soft_range = (maximum - minimum) + (means[0] - means[1])
        is_empty = z_upper == 0
        soft_range = torch.where(is_empty, 0, soft_range) * _direction(parameter)
        variance = torch.where(is_empty, 0, variances.sum(0))
        return soft_range + torch.exp(-parameter), variance - torch.exp(-parameter)

    def gradient(self, weight: Tensor, statistics: Tensor, parameter: Tensor) -> Tensor:
        maximum, minimum, z_upper, s_upper, _, z_lower, s_lower, _ = statistics
        a = parameter.abs()
        upper, lower = weight - maximum, weight - minimum
        p = torch.exp(a * upper) / z_upper
        q = torch.exp(-a * lower) / z_lower
        slope = p * (1 + a * (upper - s_upper / z_upper)) - q * (1 - a * (lower - s_lower / z_lower))
        return slope * _direction(parameter)


class Kurtosis(Penalty):
    """``(K - 1.8)^2``, K the kurtosis: KURE. 0 where all entries are equal, which have none.

    With c the middle of the hard maximum and minimum and r the distance from there to either, the sums are of x^k,
    x = (w - c) / r: within [-1, 1] whatever the weights' magnitude, and never near zero, since both ends are in them.
    """

    name = "kurtosis"
    statistics = ("maximum", "minimum", "count", "first", "second", "third", "fourth")
    maxima = (0,)
    minima = (1,)

    def reduce(self, weight: Tensor, parameter: Tensor) -> Tensor:
        if weight.numel() == 0:
            return weight.new_tensor([-torch.inf, torch.inf, 0, 0, 0, 0, 0])
        ends = torch.stack([weight.amax(), weight.amin()])
        center, inverse = _frame(ends[0], ends[1])
        x = (weight - center).flatten() * inverse
        return torch.cat([ends, torch.stack([(x**power).sum() for power in range(5)])])

    def merge(self, parts: Tensor, parameter: Tensor) -> Tensor:
        maximum, minimum = parts[..., 0].amax(0), parts[..., 1].amin(0)
        centers, _ = _frame(parts[..., 0], parts[..., 1])
        center, inverse = _frame(maximum, minimum)
        powers = parts[..., 2:].unbind(-1)
        count = powers[0]
        # An empty part has no center of its own. The powers of shift + scale·x are then the binomial sums.
        shift = torch.where(count == 0, 0, (centers - center) * inverse)
        scale = torch.where(count == 0, 0, (parts[..., 0] / 2 - parts[..., 1] / 2) * inverse)
        moved = []
        for k in range(5):
            terms = [math.comb(k, j) * shift ** (k - j) * scale**j * powers[j] for j in range(k + 1)]
            moved.append(torch.stack(terms).sum((0, 1)))
        return torch.stack([maximum, minimum, *moved], -1)

    def finalize(self, statistics: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
        *_, kurtosis, is_flat = self._moments(statistics)
        return torch.where(is_flat, 0, (kurtosis - UNIFORM_KURTOSIS) ** 2), statistics.new_empty(0)

    def gradient(self, weight: Tensor, statistics: Tensor, parameter: Tensor) -> Tensor:
        mean, deviation, third, kurtosis, is_flat = self._moments(statistics)
        center, inverse = _frame(statistics[0], statistics[1])
        z = ((weight - center) * inverse - mean) / deviation
        skewness = third / deviation**3
        scale = 8 * (kurtosis - UNIFORM_KURTOSIS) / (statistics[2] * deviation) * inverse
        return torch.where(is_flat, 0, scale * (z**3 - skewness - kurtosis * z))

    @staticmethod
    def _moments(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of x: mean, standard deviation, third central moment and kurtosis; whether all entries are equal."""
        count, first, second, third, fourth = statistics[..., 2:].unbind(-1)
        is_flat = second == 0
        count = torch.where(is_flat, 1, count)
        mean, second, third, fourth = first / count, second / count, third / count, fourth / count
        variance = torch.where(is_flat, 1, second - mean**2)
        central = third - 3 * mean * second + 2 * mean**3
        fourth = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        return mean, variance.sqrt(), central, fourth / variance**2, is_flat


def _frame(maximum: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of the ends, and one over the distance from there to either, 0 where they are equal."""
    reach = maximum / 2 - minimum / 2
    return maximum / 2 + minimum / 2, torch.where(reach >= torch.finfo(reach.dtype).tiny, 1 / reach, 0)


def _shift_moments(moments: Tensor, shift: Tensor, temperature: Tensor) -> Tensor:
    """Sums of u^k·exp(temperature·u), k = 0, 1, 2, last dimension, after every distance u has grown by ``shift``."""
    z, s, q = moments.unbind(-1)
    shift = torch.where(z == 0, 0, shift)  # An empty part has no end of its own: its distance is infinite.
    shifted = torch.stack([z, s + shift * z, q + 2 * shift * s + shift**2 * z], -1)
    return shifted * torch.exp(temperature * shift)[..., None]


def _direction(temperature: Tensor) -> Tensor:
    """1, or -1 where a negative temperature makes the soft maximum the mean near the minimum, and vice versa."""
    return torch.where(temperature < 0, -1.0, 1.0).to(temperature.dtype)


# Those of R², on the range of weights; the others are their peers.
RANGE_PENALTIES = ("linf", "margin", "soft_min_max")
PENALTIES: dict[str, Penalty] = {penalty.name: penalty for penalty in (LInf(), Margin(), SoftMinMax(), Kurtosis())}


def by_name(name: str) -> Penalty:
    """The penalty of that name; ValueError naming the known ones where there is none."""
    try:
        return PENALTIES[name]
    except (KeyError, TypeError):
        raise ValueError(f"penalty: expected one of {', '.join(map(repr, PENALTIES))}, got {name!r}") from None
