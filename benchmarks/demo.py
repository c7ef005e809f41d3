"""``make demo``: train a small network with and without range regularization, quantize it, show what that bought.

On scikit-learn's digits a depthwise-separable network is trained plainly and with each of the three penalties. Each
penalty's settings are chosen on a validation split by a small search with two seeds; then every network is
quantized after training, per tensor, and tested at 8, 4, 3 and 2 bits. At the end the fused kernels are timed against
the same formulas in eager PyTorch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.compression.quantize import SCHEMES
from benchmarks.compression.train import BITS, SHOWN_LAYER, Result, Settings, train
from benchmarks.peers import eager, in_place
from benchmarks.shapes import weights
from r2_kernels.penalties import PENALTIES

TITLES = {None: "plain", "linf": "L∞", "margin": "margin", "soft_min_max": "soft-min-max"}
COLOURS = {None: "#5c677d", "linf": "#e09f3e", "margin": "#2a9d8f", "soft_min_max": "#9e2a2b"}

# What the search tries. In so short a training M starts near where it shall end, and the temperature high.
CANDIDATES = {
    "linf": [Settings("linf", strength) for strength in (0.001, 0.003, 0.01, 0.03)],
    "margin": [
        Settings("margin", strength, start, 0.001)
        for strength, start in ((0.003, 1.5), (0.01, 1.5), (0.03, 1.5), (0.01, 1.0))
    ],
    "soft_min_max": [
        Settings("soft_min_max", strength, start, 1.0)
        for strength, start in ((0.01, 30.0), (0.03, 30.0), (0.01, 100.0), (0.03, 100.0))
    ],
}
SEARCH_SEEDS = 2
STEPS = 700
TIMED_MODEL = "ResNet-18"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console()
    start = time.perf_counter()
    penalties = list(PENALTIES) if "all" in options.penalty else list(dict.fromkeys(options.penalty))
    candidates = {
        penalty: _with_strength(CANDIDATES[penalty], options.strength)[: 1 if options.quick else None]
        for penalty in penalties
    }
    console.print(
        f"Training a small depthwise-separable network on scikit-learn's digits: plain, and with "
        f"{', '.join(TITLES[penalty] for penalty in penalties)}; {options.seeds} seed(s)."
    )
    chosen, results = _train_all(candidates, options.seeds, 40 if options.quick else STEPS, console)
    options.output.mkdir(parents=True, exist_ok=True)
    picture, numbers = options.output / "demo.png", options.output / "demo.json"
    draw(results, picture)
    numbers.write_text(json.dumps([result.as_json() for runs in results.values() for result in runs], indent=1))
    console.print()
    console.print(_accuracy_table(results))
    for penalty, settings in chosen.items():
        console.print(f"{TITLES[penalty]}: {settings}, the best of {len(candidates[penalty])} on the validation split")
    console.print()
    console.print(_speed_table(penalties))
    console.print(
        f"\nPicture in [bold]{picture}[/bold], numbers in [bold]{numbers}[/bold]; "
        f"{time.perf_counter() - start:.0f} s in all.",
        highlight=False,
    )
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--penalty",
        action="append",
        choices=[*PENALTIES, "all"],
        help="train with this penalty beside the plain network (repeatable; default: all)",
    )
    parser.add_argument("--strength", type=float, help="use this strength instead of searching for one")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: 3)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for picture and numbers (default: demo-output)"
    )
    parser.add_argument("--quick", action="store_true", help="40 steps and no search: only to see that it runs")
    options = parser.parse_args(arguments)
    options.penalty = options.penalty or ["all"]
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    if options.strength is not None and not options.strength > 0:
        parser.error(f"--strength: expected a positive number, got {options.strength}")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output: expected a folder, got the file {options.output}")
    return options


def _with_strength(candidates: list[Settings], strength: float | None) -> list[Settings]:
    if strength is None:
        return candidates
    given = [Settings(c.penalty, strength, c.start, c.learning_rate) for c in candidates]
    return list(dict.fromkeys(given))


def _train_all(
    candidates: dict[str, list[Settings]], seeds: int, steps: int, console: Console
) -> tuple[dict[str, Settings], dict[str | None, list[Result]]]:
    """The settings that did best on the validation split, and for each kind of training one result per seed."""
    first = [Settings(), *(settings for choices in candidates.values() for settings in choices)]
    search_seeds = min(SEARCH_SEEDS, seeds)
    total = search_seeds * len(first) + (seeds - search_seeds) * (1 + len(candidates))
    workers = min(os.cpu_count() or 1, 8, total)
    with (
        _progress(console) as progress,
        ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        task = progress.add_task("trainings", total=total)

        def run(jobs: list[tuple[Settings, int]]) -> dict[tuple[Settings, int], Result]:
            futures = {pool.submit(train, settings, seed, steps): (settings, seed) for settings, seed in jobs}
            for _ in as_completed(futures):
                progress.advance(task)
            return {job: future.result() for future, job in futures.items()}

        done = run([(settings, seed) for settings in first for seed in range(search_seeds)])
        chosen = {
            penalty: max(choices, key=lambda settings: sum(done[settings, k].score() for k in range(search_seeds)))
            for penalty, choices in candidates.items()
        }
        kinds: dict[str | None, Settings] = {None: Settings(), **chosen}
        done |= run([(settings, seed) for settings in kinds.values() for seed in range(search_seeds, seeds)])
    return chosen, {kind: [done[settings, seed] for seed in range(seeds)] for kind, settings in kinds.items()}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _accuracy_table(results: dict[str | None, list[Result]]) -> Table:
    seeds = len(next(iter(results.values())))
    table = Table(title=f"Test accuracy in % after per-tensor weight quantization, mean ± deviation of {seeds} seed(s)")
    table.add_column("bits")
    for kind in results:
        table.add_column(TITLES[kind], justify="right")
    keys = ["float", *((scheme, bits) for scheme in SCHEMES for bits in BITS)]
    for key in keys:
        means = {kind: statistics.mean(run.test[key] for run in runs) for kind, runs in results.items()}
        cells = []
        for kind, runs in results.items():
            spread = statistics.stdev(run.test[key] for run in runs) if seeds > 1 else 0.0
            text = f"{means[kind]:.1f} ± {spread:.1f}"
            is_best = key != "float" and means[kind] == max(means.values())
            cells.append(f"[bold]{text}[/bold]" if is_best else text)
        name = "32, floating" if key == "float" else f"{key[1]}, {key[0]}"
        table.add_row(name, *cells, end_section=key == "float" or key[1] == BITS[-1])
    return table


def _speed_table(penalties: Sequence[str]) -> Table:
    """A step's penalty and gradients on the shapes of a real model: the fused kernels, and eager PyTorch."""
    tensors = weights(TIMED_MODEL)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    table = Table(
        title=f"A step's penalty and gradients for {TIMED_MODEL}, {flat.numel() / 1e6:.1f} M weights in "
        f"{len(tensors)} tensors, {torch.get_num_threads()} thread(s)"
    )
    for title in ("", "fused", "eager PyTorch", "ratio", "fused, in reads of the weights"):
        table.add_column(title, justify="right" if title else "left")
    floor = _median_time(flat.sum, 20)
    for penalty in penalties:
        fused = _median_time(in_place(penalty, tensors), 20)
        slow = _median_time(eager(penalty, tensors), 3)
        table.add_row(
            TITLES[penalty],
            f"{fused * 1e3:.1f} ms",
            f"{slow * 1e3:.0f} ms",
            f"{slow / fused:.0f} ×",
            f"{fused / floor:.1f}",
        )
    return table


def _median_time(work: object, rounds: int) -> float:
    assert callable(work)
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def draw(results: dict[str | None, list[Result]], path: Path) -> None:
    """Above, a layer's weights with and without regularization; below, accuracy against bits, one panel a scheme."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(0.8, 1))
    reach = max(result[0].weights.abs().max().item() for result in results.values())
    for axes, (kind, runs) in zip(
        above.subplots(1, len(results), sharex=True, sharey=True), results.items(), strict=True
    ):
        shown = runs[0].weights
        axes.hist(shown.numpy(), bins=81, range=(-reach, reach), color=COLOURS[kind], log=True)
        ratio = shown.abs().max() / shown.std()
        axes.set_title(f"{TITLES[kind]}   max/std {ratio:.1f}", fontsize=10, color=COLOURS[kind])
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    above.supxlabel(f"weights of the last 1 × 1 convolution, {SHOWN_LAYER}", fontsize=9)
    above.supylabel("how many", fontsize=9)
    panels = below.subplots(1, len(SCHEMES), sharey=True)
    for axes, scheme in zip(panels, SCHEMES, strict=True):
        for kind, runs in results.items():
            means = [statistics.mean(run.test[scheme, bits] for run in runs) for bits in BITS]
            low = [min(run.test[scheme, bits] for run in runs) for bits in BITS]
            high = [max(run.test[scheme, bits] for run in runs) for bits in BITS]
            positions = range(len(BITS))
            axes.plot(positions, means, marker="o", markersize=4, color=COLOURS[kind], label=TITLES[kind])
            axes.fill_between(positions, low, high, color=COLOURS[kind], alpha=0.15, linewidth=0)
        axes.set_xticks(range(len(BITS)), [f"{bits} bit" for bits in BITS])
        axes.set_title(f"{scheme}, per tensor", fontsize=10)
        axes.set_ylim(0, 102)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    raise SystemExit(main())
