"""What the finished cells of a study say: accuracies by kind of regularization and seed, and the claims' verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.compression.cells import Compression
from benchmarks.compression.regularization import Regularization
from benchmarks.compression.spread import spread
from benchmarks.compression.storage import Storage
from benchmarks.compression.study import Part, Trial, chosen, trials
from r2_kernels.penalties import PENALTIES


@dataclass(frozen=True)
class Row:
    """One compression, None for full precision: test accuracies in percent by kind, one for each finished seed."""

    compression: Compression | None
    accuracies: Mapping[str | None, tuple[float, ...]]

    def means(self) -> dict[str | None, float]:
        """Of the kinds that have any."""
        return {kind: statistics.mean(values) for kind, values in self.accuracies.items() if values}

    def spreads(self) -> dict[str | None, float]:
        """The standard deviation over seeds; NaN where there is one seed."""
        return {kind: spread(values) for kind, values in self.accuracies.items() if values}


@dataclass(frozen=True)
class Verdict:
    """The best range penalty beside plain training, at one compression; differences in points of test accuracy.

    Args:
        spread: the larger of the two kinds' standard deviations over seeds.
        full_precision_gain: what the same penalty does to the network before it is compressed.
    """

    compression: Compression
    best: str
    plain_mean: float
    best_mean: float
    spread: float
    full_precision_gain: float

    @property
    def gain(self) -> float:
        return self.best_mean - self.plain_mean


@dataclass(frozen=True)
class PartSummary:
    """One network of the study.

    Args:
        rows: full precision first.
        cells: all cells of the chosen settings, as stored.
        histories: of each kind's first seed, by kind; and the histograms of its largest layer.
    """

    part: Part
    trials: list[Trial]
    kinds: Mapping[str | None, Regularization]
    rows: list[Row]
    cells: list[dict[str, Any]]
    first: Mapping[str | None, dict[str, Any]]

    def verdicts(self) -> list[Verdict]:
        """For each compression that a claim is about."""
        found = [_verdict(row, self.rows[0]) for row in self.rows if row.compression in self.part.criteria]
        return [verdict for verdict in found if verdict is not None]


def summarize(part: Part, seeds: int, storage: Storage) -> PartSummary:
    """Everything of the part that is finished."""
    kinds = chosen(part, storage)
    rows, cells, first = [], [], {}
    for compression in (None, *part.compressions):
        accuracies: dict[str | None, tuple[float, ...]] = {}
        for kind, settings in kinds.items():
            found = [storage.cell(part.network(settings, seed), compression) for seed in range(seeds)]
            finished = [cell for cell in found if cell is not None and "failure" not in cell]
            accuracies[kind] = tuple(cell["test"] for cell in finished)
            cells += finished
            if compression is None and finished:
                first[kind] = finished[0]
        if any(accuracies.values()):
            rows.append(Row(compression, accuracies))
    return PartSummary(part, trials(part, storage), kinds, rows, cells, first)


def _verdict(row: Row, full: Row) -> Verdict | None:
    means, spreads, before = row.means(), row.spreads(), full.means()
    penalties = [kind for kind in means if kind in PENALTIES]
    if None not in means or not penalties:
        return None
    assert row.compression is not None
    best = max(penalties, key=means.__getitem__)
    return Verdict(
        row.compression,
        best,
        means[None],
        means[best],
        max(spreads[None], spreads[best]),
        before[best] - before[None],
    )
