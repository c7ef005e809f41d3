"""The pictures of a study's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.compression.colours import COLOURS, MARKERS
from benchmarks.compression.regularization import TITLES
from benchmarks.compression.summary import Row

PANELS_ACROSS = 4


def draw_accuracies(rows: Sequence[Row], path: Path) -> None:
    """Test accuracy against bits, one panel for each family of compressions, one line for each kind."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        if row.compression is not None:
            families.setdefault(row.compression.family, []).append(row)
    across = min(PANELS_ACROSS, len(families))
    down = math.ceil(len(families) / across)
    figure = Figure(figsize=(3.4 * across + 1, 3.1 * down), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axes in panels[len(families) :]:
        axes.set_visible(False)
    for axes, (family, members) in zip(panels, families.items(), strict=False):
        _draw_family(axes, family, sorted(members, key=lambda row: -row.compression.bits))
    panels[0].legend(frameon=False, fontsize=8)
    figure.supylabel("test accuracy, %", fontsize=10)
    figure.savefig(path, dpi=120)


def _draw_family(axes: Any, family: str, rows: Sequence[Row]) -> None:
    for index, kind in enumerate(rows[0].accuracies):
        # A little to the side, so that error bars do not cover one another.
        side = 0.05 * (index - (len(rows[0].accuracies) - 1) / 2)
        points = [(place + side, row) for place, row in enumerate(rows) if row.accuracies[kind]]
        if not points:
            continue
        errors = [row.spreads()[kind] for _, row in points]
        axes.errorbar(
            [place for place, _ in points],
            [row.means()[kind] for _, row in points],
            yerr=None if any(map(math.isnan, errors)) else errors,
            color=COLOURS[kind],
            marker=MARKERS[kind],
            markersize=4,
            linewidth=1.5,
            capsize=2,
            label=TITLES[kind],
        )
    axes.set_xticks(range(len(rows)), [f"{row.compression.bits}" for row in rows])
    axes.set_xlabel("bits per weight", fontsize=9)
    axes.set_title(family, fontsize=9)
    axes.set_ylim(0, 102)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_histograms(first: Mapping[str | None, dict[str, Any]], path: Path) -> None:
    """The weights of the largest layer after training, on one scale."""
    across = min(3, len(first))
    down = math.ceil(len(first) / across)
    figure = Figure(figsize=(3.6 * across, 2.6 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in panels[len(first) :]:
        axes.set_visible(False)
    for axes, (kind, cell) in zip(panels, first.items(), strict=False):
        histogram = cell["histogram"]
        reach, counts = histogram["reach"], histogram["counts"]
        width = 2 * reach / len(counts)
        # Per unit of weight, since the bins are as wide as the range they are of.
        density = [count / width for count in counts]
        edges = [-reach + index * width for index in range(len(counts) + 1)]
        axes.stairs(density, edges, fill=True, color=COLOURS[kind])
        axes.set_yscale("log")
        axes.set_title(f"{TITLES[kind]}: max |w| = {reach / histogram['deviation']:.1f} std", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    layer = next(iter(first.values()))["histogram"]["layer"]
    figure.supxlabel(f"weight ({layer})", fontsize=9)
    figure.supylabel("weights per unit", fontsize=9)
    figure.savefig(path, dpi=120)


def draw_ranges(first: Mapping[str | None, dict[str, Any]], path: Path) -> None:
    """max|w| / std of every layer over training: a thin line for each layer, a thick one for their median."""
    figure = Figure(figsize=(2.3 * len(first) + 0.8, 3.0), layout="constrained")
    panels = figure.subplots(1, len(first), sharey=True, squeeze=False)[0]
    for axes, (kind, cell) in zip(panels, first.items(), strict=True):
        epochs = [entry["epoch"] for entry in cell["history"]]
        layers = list(cell["history"][0]["max_over_std"])
        curves = [[entry["max_over_std"][layer] for entry in cell["history"]] for layer in layers]
        for curve in curves:
            axes.plot(epochs, curve, color=COLOURS[kind], linewidth=0.5, alpha=0.5)
        medians = [sorted(values)[len(values) // 2] for values in zip(*curves, strict=True)]
        axes.plot(epochs, medians, color=COLOURS[kind], linewidth=2.5)
        axes.set_yscale("log")
        axes.set_title(TITLES[kind], fontsize=9)
        axes.set_xlabel("epoch", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("max |w| / std of a layer", fontsize=9)
    figure.savefig(path, dpi=120)
