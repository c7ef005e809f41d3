"""The report of a study: a Markdown page with tables and pictures, and all runs as JSON, from the finished cells."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.compression.charts import draw_accuracies, draw_histograms, draw_ranges
from benchmarks.compression.regularization import TITLES
from benchmarks.compression.storage import Storage
from benchmarks.compression.study import MOST_LOST, Part, Study
from benchmarks.compression.summary import PartSummary, Row, Verdict, summarize


def write(study: Study, output: Path, results: Path) -> Path:
    """Write ``<study>.md``, ``<study>.json`` and ``images/<study>-*.png`` into ``results``.

    Args:
        output: the folder of the finished cells.

    Returns:
        The page.

    Raises:
        FileNotFoundError: nothing is finished.
    """
    storage = Storage(output)
    summaries = [summarize(part, study.seeds, storage) for part in study.parts]
    finished = [summary for summary in summaries if summary.rows]
    if not finished:
        raise FileNotFoundError(f"--output: expected finished cells of the study {study.name} in {output}, got none")
    images = results / "images"
    images.mkdir(parents=True, exist_ok=True)
    sections = [_head(study, finished)]
    for summary in finished:
        ending = "-finetuned" if summary.part.pretraining is not None else ""
        name = f"{study.name}-{summary.part.data}-{summary.part.model}{ending}"
        draw_accuracies(summary.rows, images / f"{name}-accuracy.png")
        draw_histograms(summary.first, images / f"{name}-weights.png")
        draw_ranges(summary.first, images / f"{name}-ranges.png")
        sections.append(_section(summary, name))
    numbers = [cell for summary in finished for cell in summary.cells]
    rounded = json.loads(json.dumps(numbers), parse_float=lambda text: float(f"{float(text):.6g}"))
    (results / f"{study.name}.json").write_text(json.dumps(rounded, separators=(",", ":")) + "\n")
    page = results / f"{study.name}.md"
    page.write_text("\n\n".join(sections) + "\n")
    return page


def _head(study: Study, summaries: list[PartSummary]) -> str:
    versions = sorted({cell["torch"] for summary in summaries for cell in summary.cells})
    return "\n".join(
        [
            f"# The study `{study.name}`",
            "",
            f"Written by `python -m benchmarks.compression report {study.name}` from the cells that "
            f"`python -m benchmarks.compression run {study.name}` has finished; torch {', '.join(versions)}. "
            f"All runs with their settings: [{study.name}.json]({study.name}.json).",
            "",
            "Accuracies are in percent, mean ± standard deviation over the seeds that are finished (no deviation: one)."
            " Settings are chosen by accuracy on a validation split; the test set has no part in it. Every kind is "
            "trained on the same data with the same seeds, schedule and number of epochs, with the usual weight decay; "
            "L2 is more of it, on the weights that the penalties watch.",
        ]
    )


def _section(summary: PartSummary, name: str) -> str:
    part = summary.part
    training = part.training
    precision = "bfloat16 autocast" if training.is_bfloat16 else "float32"
    subset = f", {part.subset:,} training inputs" if part.subset is not None else ""
    return "\n\n".join(
        [
            f"## {part.model}, width {part.width:g}, on {part.data}{_origin(part)}",
            f"{training.epochs} epochs in batches of {training.batch}{subset}, {training.optimizer}, learning rate "
            f"{training.learning_rate:g}, weight decay {training.weight_decay:g}, {precision}.",
            *[_sentence(verdict) for verdict in summary.verdicts()],
            _accuracy_table(summary),
            f"![Test accuracy against bits](images/{name}-accuracy.png)",
            "The settings that were searched, with seed 0, by validation accuracy: the best mean after compression "
            f"({'; '.join(_title(criterion) for criterion in part.criteria)}) among those that cost the network no "
            f"more than {MOST_LOST:g} points in full precision.",
            _trial_table(summary),
            f"![Weights of the largest layer](images/{name}-weights.png)",
            f"![max|w| / std of each layer over training](images/{name}-ranges.png)",
        ]
    )


def _origin(part: Part) -> str:
    return "" if part.pretraining is None else f", fine-tuned from {part.pretraining.epochs} plain epochs"


def _title(compression: object) -> str:
    return f"{compression.family}, {compression.bits} bit"


def _sentence(verdict: Verdict) -> str:
    """The claim's row in words, whichever way it went."""
    margin = "no spread known from one seed" if math.isnan(verdict.spread) else f"spread {verdict.spread:.2f}"
    return (
        f"**{_title(verdict.compression)}**: {verdict.plain_mean:.2f} plain, {verdict.best_mean:.2f} with "
        f"{TITLES[verdict.best]}: {verdict.gain:+.2f} points ({margin}); in full precision "
        f"{verdict.full_precision_gain:+.2f}."
    )


def _accuracy_table(summary: PartSummary) -> str:
    kinds = list(summary.kinds)
    lines = [_line(["", *(TITLES[kind] for kind in kinds)]), _line(["---", *["---:"] * len(kinds)])]
    lines.append(_line(["seeds", *(str(len(summary.rows[0].accuracies[kind])) for kind in kinds)]))
    for row in summary.rows:
        name = "full precision" if row.compression is None else _title(row.compression)
        lines.append(_line([name, *_values(row)]))
    return "\n".join(lines)


def _values(row: Row) -> list[str]:
    means, spreads = row.means(), row.spreads()
    best = max(round(mean, 2) for mean in means.values())
    texts = []
    for kind in row.accuracies:
        if kind not in means:
            texts.append("–")
            continue
        text = f"{means[kind]:.2f}" + ("" if math.isnan(spreads[kind]) else f" ± {spreads[kind]:.2f}")
        texts.append(f"**{text}**" if round(means[kind], 2) == best else text)
    return texts


def _trial_table(summary: PartSummary) -> str:
    titles = ["", "strength", "start", "its learning rate", "full precision", "compressed", ""]
    lines = [_line(titles), _line(["---", *["---:"] * 5, "---"])]
    for trial in summary.trials:
        settings = trial.regularization
        unit = " std" if settings.penalty == "margin" else ""
        lines.append(
            _line(
                [
                    TITLES[settings.penalty],
                    f"{settings.strength:g}" if settings.penalty is not None else "",
                    f"{settings.start:g}{unit}" if settings.start is not None else "",
                    f"{settings.learning_rate:g}" if settings.learning_rate is not None else "",
                    "diverged" if trial.full_precision is None else f"{trial.full_precision:.2f}",
                    "" if trial.score is None else f"{trial.score:.2f}",
                    "chosen" if trial.is_chosen and settings.penalty is not None else "",
                ]
            )
        )
    return "\n".join(lines)


def _line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"
