"""``python -m benchmarks.run``: time the penalties against their peers; a table, a JSON file and a chart.

Every time is a median, given as a ratio to ``torch.sum`` of one flat tensor of the same bytes, timed in between: the
time it takes to read the weights once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes import MODELS
from r2_kernels.penalties import RANGE_PENALTIES

TITLES = {"linf": "L∞", "margin": "margin", "soft_min_max": "soft-min-max"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this model (repeatable)")
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"), help="folder for JSON and chart")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "penalties.json"
    status = pytest.main(
        [
            str(Path(__file__).with_name("bench_penalties.py")),
            "-o",
            "python_files=bench_*.py",
            "-q",
            *(f"--model={model}" for model in arguments.model or ()),
            "--benchmark-disable-gc",
            f"--benchmark-json={path}",
            "--benchmark-columns=median",
        ]
    )
    if status != 0:
        return int(status)
    rows = read(path)
    print(as_table(rows))
    chart = arguments.output / "penalties.png"
    draw(rows, chart)
    print(f"\nTimes in {path}, chart in {chart}")
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """One row per case: what ran, its median in seconds, and the ratio to the floor."""
    rows = []
    for entry in json.loads(path.read_text())["benchmarks"]:
        median = entry["stats"]["median"]
        rows.append({**entry["extra_info"], "median": median, "ratio": median / entry["extra_info"]["floor"]})
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per model and penalty, a column per peer, each as a ratio to torch.sum."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = [
        f"| model | penalty | torch.sum | {' | '.join(peers)} |",
        f"|---|---|---|{'---|' * len(peers)}",
    ]
    ratios = {(row["model"], row["penalty"], row["peer"]): row["ratio"] for row in rows}
    floors = {(row["model"], row["penalty"]): row["floor"] for row in rows}
    for (model, penalty), floor in floors.items():
        cells = [ratios.get((model, penalty, peer)) for peer in peers]
        texts = ["–" if ratio is None else f"{ratio:.1f}" for ratio in cells]
        lines.append(f"| {model} | {TITLES[penalty]} | {floor * 1e3:.2f} ms | {' | '.join(texts)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of GPT-2's ratios, or of the last model that was timed; logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    model = "GPT-2" if "GPT-2" in models else models[-1]
    rows = [row for row in rows if row["model"] == model]
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    colours = dict(zip(peers, ("#0b6e4f", "#6bbf59", "#8d99ae", "#2b2d42", "#bcb8b1"), strict=False))
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    position, ticks = 0.0, []
    for penalty in RANGE_PENALTIES:
        cases = [row for row in rows if row["penalty"] == penalty]
        start = position
        for row in cases:
            label = row["peer"] if penalty == "linf" else None
            axes.barh(position, row["ratio"], color=colours[row["peer"]], label=label)
            axes.text(row["ratio"] * 1.05, position, f"{row['ratio']:.1f}", va="center", fontsize=8)
            position += 1
        ticks.append(((start + position - 1) / 2, TITLES[penalty]))
        position += 0.8
    axes.axvline(1, color="#d62828", linewidth=1)
    axes.text(1.03, -1.0, "torch.sum", color="#d62828", fontsize=8)
    axes.set_yticks([tick for tick, _ in ticks], [title for _, title in ticks])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.8, max(row["ratio"] for row in rows) * 2)
    axes.set_xlabel(f"time of a step's penalty, value and gradients, in reads of the weights ({model})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
