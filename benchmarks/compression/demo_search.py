"""Which settings suit each penalty: a small search by validation accuracy, its trainings spread over the cores."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.compression.demo_training import Result, train
from benchmarks.compression.regularization import Regularization
from benchmarks.compression.workers import cores, start_worker

# In so short a training M must start near where it shall end, and the temperature high.
CANDIDATES = {
    "linf": [Regularization("linf", strength) for strength in (0.01, 0.1, 0.3, 1.0)],
    "margin": [
        Regularization("margin", 0.001, 1.5, 1e-3),
        Regularization("margin", 0.003, 1.5, 1e-4),
        Regularization("margin", 0.003, 1.0, 1e-3),
        Regularization("margin", 0.003, 1.0, 1e-4),
        Regularization("margin", 0.01, 1.0, 1e-4),
    ],
    "soft_min_max": [
        Regularization("soft_min_max", 0.03, 30.0, 1.0),
        Regularization("soft_min_max", 0.03, 100.0, 1.0),
        Regularization("soft_min_max", 0.1, 100.0, 1.0),
        Regularization("soft_min_max", 0.1, 100.0, 10.0),
        Regularization("soft_min_max", 0.3, 100.0, 10.0),
    ],
}
# How many seeds each candidate is trained with, if as many are reported: one seed's accuracy at 2 bits says little.
SEARCH_SEEDS = 3
MOST_WORKERS = 8


@dataclass(frozen=True)
class Trial:
    """One candidate of the search: its score is the mean over the search's seeds of ``Result.score()``."""

    settings: Regularization
    score: float
    is_chosen: bool


@dataclass(frozen=True)
class Study:
    """All trials, and one result per seed for plain training (key None) and for each penalty at its chosen settings."""

    trials: list[Trial]
    results: dict[str | None, list[Result]]


class Plan:
    """Which trainings a study takes.

    Args:
        penalties: names, each a key of ``CANDIDATES``.
        strength: where given, the search is over the start of M and of the temperature only.
        seeds: how many trainings of each kind are reported.
        steps: the length of each training.
        optimizer: as ``fit`` takes it.
        has_search: False trains each penalty with its first candidate.
    """

    def __init__(
        self,
        penalties: Sequence[str],
        strength: float | None,
        seeds: int,
        steps: int,
        optimizer: str = "torch",
        has_search: bool = True,
    ) -> None:
        self.seeds, self.steps, self.optimizer = seeds, steps, optimizer
        self.candidates: dict[str, list[Regularization]] = {}
        for penalty in penalties:
            tried = CANDIDATES[penalty][: None if has_search else 1]
            if strength is not None:
                tried = list(dict.fromkeys(replace(settings, strength=strength) for settings in tried))
            self.candidates[penalty] = tried
        self._search_seeds = range(min(SEARCH_SEEDS, seeds))
        self._later_seeds = range(len(self._search_seeds), seeds)
        # Plain training has nothing to choose: all of it runs beside the search.
        self._first = [(Regularization(), seed) for seed in range(seeds)] + [
            (settings, seed)
            for choices in self.candidates.values()
            for settings in choices
            for seed in self._search_seeds
        ]

    def __len__(self) -> int:
        """The number of trainings."""
        return len(self._first) + len(self._later_seeds) * len(self.candidates)

    def run(self, on_done: Callable[[], Any]) -> Study:
        """Train everything, in as many processes as there are cores; ``on_done`` is called after each training."""
        workers = min(cores(), MOST_WORKERS, len(self))
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker) as pool:
            try:
                done = self._train(pool, self._first, on_done)
                scores = {
                    settings: statistics.mean(done[settings, seed].score() for seed in self._search_seeds)
                    for settings, _ in self._first
                }
                chosen = {penalty: max(tried, key=scores.__getitem__) for penalty, tried in self.candidates.items()}
                rest = [(settings, seed) for settings in chosen.values() for seed in self._later_seeds]
                done |= self._train(pool, rest, on_done)
            except BaseException:
                # Else leaving the block would first finish what is being trained and what waits.
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
        kinds: dict[str | None, Regularization] = {None: Regularization(), **chosen}
        return Study(
            [Trial(settings, score, settings in kinds.values()) for settings, score in scores.items()],
            {kind: [done[settings, seed] for seed in range(self.seeds)] for kind, settings in kinds.items()},
        )

    def _train(
        self, pool: ProcessPoolExecutor, jobs: Iterable[tuple[Regularization, int]], on_done: Callable[[], Any]
    ) -> dict[tuple[Regularization, int], Result]:
        futures = {
            pool.submit(train, settings, seed, self.steps, self.optimizer): (settings, seed) for settings, seed in jobs
        }
        done = {}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            on_done()
        return done
