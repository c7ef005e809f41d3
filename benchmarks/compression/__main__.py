"""``python -m benchmarks.compression``: run a named study of compressed networks, and write its report.

``run`` trains what is not trained yet, compresses it and keeps every finished cell, so that an interrupted study goes
on where it was when the same command is given again. ``report`` writes tables, pictures and JSON of what is finished.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.compression.report import write
from benchmarks.compression.runner import Runner
from benchmarks.compression.studies import STUDIES
from benchmarks.compression.study import Study
from benchmarks.compression.workers import cores

RESULTS = Path("docs/results")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    study = _selected(options)
    if options.command == "run":
        torch.set_num_threads(1)
        start = time.perf_counter()
        try:
            study.run(Runner(options.data, options.output, options.workers, options.device), _log)
        except KeyboardInterrupt:
            _log("interrupted: finished cells are kept; the same command goes on")
            return 130
        except (FileNotFoundError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        _log(f"finished, {time.perf_counter() - start:.0f} s")
    page = write(study, options.output, options.results)
    print(f"Report  {page}")
    return 0


def _log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _selected(options: argparse.Namespace) -> Study:
    """The study, or what was asked for of it."""
    study = STUDIES[options.study]
    parts = study.parts
    if options.model:
        parts = tuple(part for part in parts if part.model in options.model)
    if options.penalty:
        parts = tuple(
            replace(
                part, candidates={kind: part.candidates[kind] for kind in part.candidates if kind in options.penalty}
            )
            for part in parts
        )
    return replace(study, parts=parts, seeds=options.seeds or study.seeds)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, explanation in (("run", "run what is not finished, then report"), ("report", "report what is finished")):
        command = commands.add_parser(name, help=explanation)
        command.add_argument("study", choices=list(STUDIES))
        command.add_argument(
            "--output",
            type=Path,
            default=Path("compression-output"),
            help="folder of finished cells (default: compression-output)",
        )
        command.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the report (default: {RESULTS})")
        command.add_argument("--model", action="append", help="only this network of the study (repeatable)")
        command.add_argument("--penalty", action="append", help="only plain training and this penalty (repeatable)")
        command.add_argument("--seeds", type=int, help="seeds 0 up to this (default: the study's)")
        if name == "run":
            command.add_argument("--data", type=Path, help="folder of the dataset; digits need none")
            command.add_argument(
                "--device",
                choices=("cpu", "cuda"),
                default="cuda" if torch.cuda.is_available() else "cpu",
                help="what to compute on (default: a GPU if there is one)",
            )
            command.add_argument(
                "--workers", type=int, default=cores(), help="processes of one thread each (default: one for each core)"
            )
    options = parser.parse_args(arguments)
    study = STUDIES[options.study]
    for option, given, known in (
        ("--model", options.model, {part.model for part in study.parts}),
        ("--penalty", options.penalty, {kind for part in study.parts for kind in part.candidates}),
    ):
        for value in given or ():
            if value not in known:
                parser.error(f"{option}: expected one of {', '.join(sorted(known))}, got {value!r}")
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    if options.command == "run" and options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    return options


if __name__ == "__main__":
    sys.exit(main())
