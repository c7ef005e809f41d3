"""The picture of a study: a layer's weights with and without range regularization, and accuracy against bits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.compression.colours import COLOURS, MARKERS
from benchmarks.compression.demo_training import BITS, SHOWN_LAYER, Result
from benchmarks.compression.quantize import SCHEMES
from benchmarks.compression.regularization import TITLES
from benchmarks.compression.spread import spread

CHANCE = 10.0  # Ten classes of about equal size.


def draw(results: Mapping[str | None, Sequence[Result]], path: Path) -> None:
    """Write the picture as PNG; the histograms show each kind's first seed."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(0.85, 1), hspace=0.04)
    _draw_histograms(above, results)
    _draw_accuracies(below, results)
    figure.savefig(path, dpi=140)


def _draw_histograms(figure: Figure, results: Mapping[str | None, Sequence[Result]]) -> None:
    figure.suptitle(f"Weights of one layer after training ({SHOWN_LAYER}, a 1 × 1 convolution)", fontsize=12)
    reach = 1.08 * max(runs[0].weights.abs().max().item() for runs in results.values())
    panels = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (kind, runs) in zip(panels, results.items(), strict=True):
        weights = runs[0].weights
        axes.hist(weights.numpy(), bins=81, range=(-reach, reach), color=COLOURS[kind], log=True)
        for end in (weights.min().item(), weights.max().item()):
            axes.axvline(end, color="#111827", linewidth=1, linestyle=(0, (3, 2)))
        axes.set_title(TITLES[kind], fontsize=11, color=COLOURS[kind], fontweight="bold")
        ratio = weights.abs().max() / weights.std()
        axes.set_xlabel(f"weight (range dashed)\nmax |w| = {ratio:.1f} std", fontsize=9)
        axes.yaxis.set_major_locator(LogLocator(10))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    panels[0].set_ylim(bottom=0.7)
    panels[0].set_ylabel("weights per bin", fontsize=10)


def _draw_accuracies(figure: Figure, results: Mapping[str | None, Sequence[Result]]) -> None:
    seeds = len(next(iter(results.values())))
    of_seeds = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(f"Test accuracy after per-tensor weight quantization ({of_seeds})", fontsize=12)
    panels = figure.subplots(1, len(SCHEMES), sharey=True)
    for axes, scheme in zip(panels, SCHEMES, strict=True):
        for index, (kind, runs) in enumerate(results.items()):
            # A little to the side, so that error bars do not cover one another.
            places = [place + 0.05 * (index - (len(results) - 1) / 2) for place in range(len(BITS))]
            accuracies = [[run.test[scheme, bits] for run in runs] for bits in BITS]
            axes.errorbar(
                places,
                [statistics.mean(values) for values in accuracies],
                yerr=[spread(values) for values in accuracies] if seeds > 1 else None,
                color=COLOURS[kind],
                marker=MARKERS[kind],
                markersize=5,
                linewidth=1.8,
                capsize=2.5,
                elinewidth=1.2,
                label=TITLES[kind],
            )
        axes.axhline(CHANCE, color="#9ca3af", linewidth=1, linestyle=":")
        axes.text(-0.1, CHANCE + 1.5, "chance", fontsize=8, color="#6b7280")
        axes.set_xticks(range(len(BITS)), [f"{bits}" for bits in BITS])
        axes.set_xlabel("bits per weight", fontsize=10)
        axes.set_title(scheme, fontsize=11)
        axes.set_ylim(0, 104)
        axes.set_yticks(range(0, 101, 20))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    panels[0].set_ylabel("test accuracy, %", fontsize=10)
    panels[0].legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(0.02, 0.4))
