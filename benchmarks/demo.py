"""``make demo``: train a small network with and without range regularization, quantize it, show what that bought.

On scikit-learn's digits a depthwise-separable network is trained plainly and with each of the three penalties. Each
penalty's settings are chosen on a validation split by a small search; then every network's weights are quantized after
training, per tensor, and tested at 8, 4, 3 and 2 bits. At the end the fused kernels are timed against the same formulas
in eager PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table

from benchmarks import optimizer
from benchmarks.compression.demo_picture import draw
from benchmarks.compression.demo_search import Plan, Study, Trial
from benchmarks.compression.demo_training import BITS, OPTIMIZERS, Result
from benchmarks.compression.quantize import SCHEMES
from benchmarks.compression.regularization import TITLES
from benchmarks.compression.spread import spread
from benchmarks.peers import eager, in_place
from benchmarks.shapes import weights
from r2_kernels.penalties import RANGE_PENALTIES

STEPS = 800
QUICK_STEPS = 40
TIMED_MODEL = "ResNet-18"
TIMED_ROUNDS = 5
OPTIMIZER_ROUNDS = 9


@dataclass(frozen=True)
class Speed:
    """Seconds of one step's penalty and gradients, medians; ``read`` is ``torch.sum`` over the same bytes."""

    penalty: str
    fused: float
    eager: float
    read: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(highlight=False)
    start = time.perf_counter()
    steps = QUICK_STEPS if options.quick else STEPS
    plan = Plan(options.penalty, options.strength, options.seeds, steps, options.optimizer, not options.quick)
    console.print(
        f"[bold]Range regularization (R²) on scikit-learn's digits[/bold]\n{len(plan)} trainings of {steps} steps: "
        f"plain, and with {', '.join(TITLES[penalty] for penalty in options.penalty)}"
    )
    try:
        with _progress(console) as progress:
            task = progress.add_task("training", total=len(plan))
            study = plan.run(lambda: progress.advance(task))
    except KeyboardInterrupt:
        console.print("interrupted: nothing was written")
        return 130
    speeds = [_speed(penalty) for penalty in options.penalty]
    parts = optimizer.RULES if options.quick else optimizer.QUESTIONS
    steps_taken = {part: _steps(part, 1 if options.quick else OPTIMIZER_ROUNDS) for part in parts}
    picture, numbers = options.output / "demo.png", options.output / "demo.json"
    draw(study.results, picture)
    seconds = time.perf_counter() - start
    numbers.write_text(json.dumps(_as_json(study, speeds, steps_taken, steps, seconds), indent=1) + "\n")
    _show(console, study, speeds, steps_taken)
    console.print(f"Picture  [bold]{picture}[/bold]\nNumbers  [bold]{numbers}[/bold]\n{seconds:.0f} s in all")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--penalty",
        action="append",
        choices=[*RANGE_PENALTIES, "all"],
        help="train with this penalty beside the plain network (repeatable; default: all)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="use this strength, and search for the start and learning rate of M or the temperature only",
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="torch",
        help="train with torch.optim's SGD after add_gradients_, or with r2_kernels.optim's, which has the penalty "
        "inside its step (default: torch)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: 3)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for picture and numbers (default: demo-output)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} steps and no search: only to see that it runs"
    )
    options = parser.parse_args(arguments)
    given = options.penalty or ["all"]
    options.penalty = list(RANGE_PENALTIES) if "all" in given else list(dict.fromkeys(given))
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    if options.strength is not None and not (options.strength > 0 and math.isfinite(options.strength)):
        parser.error(f"--strength: expected a positive number, got {options.strength}")
    try:  # Now, not after minutes of training.
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: expected a folder to write to, got {options.output} ({error.strerror})")
    return options


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _speed(penalty: str) -> Speed:
    """On the shapes of a real model, with PyTorch's default number of threads; what is compared takes turns."""
    tensors = weights(TIMED_MODEL)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    works: list[Callable[[], object]] = [in_place(penalty, tensors), eager(penalty, tensors), flat.sum]
    times: list[list[float]] = [[] for _ in works]
    for _ in range(TIMED_ROUNDS + 1):
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return Speed(penalty, *(statistics.median(taken[1:]) for taken in times))  # The first round warms up.


def _steps(part: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of an optimizer's step, or of a whole training step, without the penalty and with it in several ways."""
    if part == "training step":
        return optimizer.take_turns(optimizer.training_steps(), min(rounds, 5))
    return optimizer.take_turns(optimizer.optimizer_steps(part, TIMED_MODEL), rounds)


def _show(
    console: Console, study: Study, speeds: Sequence[Speed], steps_taken: Mapping[str, Mapping[str, list[float]]]
) -> None:
    """The final screen."""
    console.print()
    console.print(Rule("1. Settings, chosen on the validation split", align="left"))
    console.print(
        "Tried: the strength, the start of M (in standard deviations of the layer) or of\n"
        "the temperature, and its learning rate. The best mean validation accuracy over\n"
        "4, 3 and 2 bits, symmetric and asymmetric, is taken; the test set has no part."
    )
    console.print(_trial_table(study.trials))
    console.print()
    console.print(Rule("2. Accuracy on the test set after quantization", align="left"))
    console.print(
        "Weights of all convolutions and linear layers, quantized per tensor after\n"
        f"training; in %, {_of_seeds(study.results)}. Bold: the best of the row."
    )
    console.print(_accuracy_table(study.results))
    for scheme in SCHEMES:
        console.print(_verdict(study.results, scheme))
    if _has_lost(study.results, "linf", "asymmetric"):
        console.print(
            "L∞ makes ranges symmetric. Asymmetric levels are even in number with zero among\n"
            "them, so they miss one end of such a range: L∞ is for symmetric quantizers."
        )
    console.print()
    console.print(Rule("3. What it costs", align="left"))
    count = sum(tensor.numel() for tensor in weights(TIMED_MODEL)) / 1e6
    console.print(
        f"Penalty and gradients of one step for {TIMED_MODEL}, {count:.1f} M weights, "
        f"{torch.get_num_threads()} thread(s);\n"
        "in brackets, as a multiple of torch.sum over the same bytes: reading them once."
    )
    console.print(_speed_table(speeds))
    console.print()
    console.print(Rule("4. What it adds to a step", align="left"))
    console.print(
        f"Steps of AdamW and of SGD with momentum for {TIMED_MODEL} with soft-min-max, and a whole\n"
        "training step with GPT-2's shapes on 128 tokens; as multiples of the same without\n"
        "a penalty, by torch's fused optimizer."
    )
    console.print(_step_table(steps_taken))
    console.print()


def _of_seeds(results: Mapping[str | None, Sequence[Result]]) -> str:
    seeds = len(next(iter(results.values())))
    return f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"


def _trial_table(trials: Sequence[Trial]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("penalty")
    for title in ("strength", "start", "learning rate", "validation, %"):
        table.add_column(title, justify="right")
    table.add_column()
    for trial in trials:
        settings = trial.settings
        unit = " std" if settings.penalty == "margin" else ""
        is_marked = trial.is_chosen and settings.penalty is not None
        table.add_row(
            TITLES[settings.penalty],
            f"{settings.strength:g}" if settings.penalty is not None else "",
            f"{settings.start:g}{unit}" if settings.start is not None else "",
            f"{settings.learning_rate:g}" if settings.learning_rate is not None else "",
            f"{trial.score:.1f}",
            "← chosen" if is_marked else "",
            style="bold" if is_marked else None,
        )
    return table


def _accuracy_table(results: Mapping[str | None, Sequence[Result]]) -> Table:
    table = Table()
    table.add_column("weights")
    for kind in results:
        table.add_column(TITLES[kind], justify="right")
    for key in ("float", *((scheme, bits) for scheme in SCHEMES for bits in BITS)):
        accuracies = {kind: [run.test[key] for run in runs] for kind, runs in results.items()}
        means = {kind: round(statistics.mean(values), 1) for kind, values in accuracies.items()}
        cells = []
        for kind, values in accuracies.items():
            text = f"{means[kind]:.1f}" + (f" ± {spread(values):.1f}" if len(values) > 1 else "")
            cells.append(f"[bold]{text}[/bold]" if means[kind] == max(means.values()) else text)
        name = "float32" if key == "float" else f"{key[1]} bit, {key[0]}"
        table.add_row(name, *cells, end_section=key == "float" or key[1] == BITS[-1])
    return table


def _verdict(results: Mapping[str | None, Sequence[Result]], scheme: str) -> str:
    """The row of the fewest bits in words, whichever way it went."""
    bits = BITS[-1]
    means = {kind: statistics.mean(run.test[scheme, bits] for run in runs) for kind, runs in results.items()}
    best = max((kind for kind in means if kind is not None), key=means.__getitem__)
    return f"{bits} bit, {scheme}: {means[None]:.1f} % after plain training, {means[best]:.1f} % with {TITLES[best]}."


def _has_lost(results: Mapping[str | None, Sequence[Result]], penalty: str, scheme: str) -> bool:
    """Whether the penalty did worse than plain training at the fewest bits."""
    if penalty not in results:
        return False
    plain, regularized = (
        statistics.mean(run.test[scheme, BITS[-1]] for run in results[kind]) for kind in (None, penalty)
    )
    return regularized < plain


def _speed_table(speeds: Sequence[Speed]) -> Table:
    table = Table()
    table.add_column("penalty")
    for title in ("add_gradients_, fused", "eager PyTorch", "fused is faster by"):
        table.add_column(title, justify="right")
    for speed in speeds:
        table.add_row(
            TITLES[speed.penalty],
            f"{speed.fused * 1e3:.2f} ms ({speed.fused / speed.read:.1f})",
            f"{speed.eager * 1e3:.0f} ms ({speed.eager / speed.read:.0f})",
            f"[bold]{speed.eager / speed.fused:.0f} ×[/bold]",
        )
    return table


def _step_table(steps_taken: Mapping[str, Mapping[str, list[float]]]) -> Table:
    table = Table()
    table.add_column("step")
    for title in ("without", "eager penalty", "add_gradients_", "inside the step"):
        table.add_column(title, justify="right")
    for part, times in steps_taken.items():
        base = next(iter(times))  # without, by torch
        name = base.split("(")[0].replace("torch ", "")
        ways = (f"eager penalty, torch {name}", f"add_gradients_, torch {name}", f"r2 {name}, soft_min_max")
        table.add_row(
            "training" if part == "training step" else name,
            f"{statistics.median(times[base]) * 1e3:.1f} ms",
            *(f"{optimizer.ratio(times, way, base):.2f}" for way in ways),
        )
    return table


def _as_json(
    study: Study,
    speeds: Sequence[Speed],
    steps_taken: Mapping[str, Mapping[str, list[float]]],
    steps: int,
    seconds: float,
) -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "seconds": seconds,
        "search": [
            {**asdict(trial.settings), "validation": trial.score, "is_chosen": trial.is_chosen}
            for trial in study.trials
        ],
        "runs": [run.as_json() for runs in study.results.values() for run in runs],
        "steps taken": steps_taken,
        "speed": {"model": TIMED_MODEL, "seconds": [asdict(speed) for speed in speeds]},
    }


if __name__ == "__main__":
    sys.exit(main())
