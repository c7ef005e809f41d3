"""A study: for each kind of regularization a search of its settings, then all seeds with the chosen ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from benchmarks.compression.cells import Compression, Network
from benchmarks.compression.regularization import Regularization
from benchmarks.compression.runner import Job, Log, Runner
from benchmarks.compression.storage import Storage
from benchmarks.compression.training import Training

# Settings are eligible that cost the network no more than this, in points of validation accuracy at full precision.
MOST_LOST = 0.5
SEARCH_SEED = 0


@dataclass(frozen=True)
class Part:
    """One network of a study.

    Args:
        candidates: for each kind of regularization the settings that are tried.
        compressions: what is measured of each chosen network, for every seed.
        criteria: those of the compressions whose mean validation accuracy chooses the settings.
        pretraining: where given, every training starts from the network that was trained plainly in this way.
    """

    data: str
    model: str
    width: float
    training: Training
    candidates: Mapping[str, Sequence[Regularization]]
    compressions: tuple[Compression, ...]
    criteria: tuple[Compression, ...]
    subset: int | None = None
    pretraining: Training | None = None

    def of_kinds(self, kinds: Sequence[str]) -> Part:
        """The same with these kinds of regularization only."""
        return replace(self, candidates={kind: tried for kind, tried in self.candidates.items() if kind in kinds})

    def network(self, regularization: Regularization, seed: int) -> Network:
        """One training of this part."""
        training = self.training
        start = None if self.pretraining is None else self.pretrained(seed)
        return Network(self.data, self.subset, self.model, self.width, training, regularization, seed, start)

    def pretrained(self, seed: int) -> Network:
        """What a training starts from.

        Raises:
            ValueError: it starts from random weights.
        """
        if self.pretraining is None:
            raise ValueError("pretraining: expected a part whose networks are fine-tuned")
        return Network(self.data, self.subset, self.model, self.width, self.pretraining, Regularization(), seed)


@dataclass(frozen=True)
class Trial:
    """One candidate of the search, by validation accuracy in percent; a score of None: its training diverged."""

    regularization: Regularization
    full_precision: float | None
    score: float | None
    is_chosen: bool = False


@dataclass(frozen=True)
class Study:
    """Parts with the seeds that all of them are trained with."""

    name: str
    parts: tuple[Part, ...]
    seeds: int

    def run(self, runner: Runner, log: Log) -> None:
        """Search, then train and compress with every seed; what is finished is not done again."""
        for is_fine_tuned in (False, True):
            parts = [part for part in self.parts if (part.pretraining is not None) == is_fine_tuned]
            self._run(parts, runner, log)

    def _run(self, parts: Sequence[Part], runner: Runner, log: Log) -> None:
        starts = [part.pretrained(seed) for part in parts if part.pretraining for seed in range(self.seeds)]
        runner.run([Job(network, ()) for network in starts], log)
        runner.run([job for part in parts for job in search_jobs(part)], log)
        storage = Storage(runner.output)
        runner.run([job for part in parts for job in self.seed_jobs(part, storage)], log)

    def seed_jobs(self, part: Part, storage: Storage) -> list[Job]:
        """Seed by seed, so that an interrupted study has something of every kind."""
        kinds = chosen(part, storage)
        return [
            Job(part.network(settings, seed), part.compressions)
            for seed in range(self.seeds)
            for settings in kinds.values()
        ]


def search_jobs(part: Part) -> list[Job]:
    """Plain training, then the first candidate of every kind, then the second of every kind, and so on."""
    rounds = zip_longest(*part.candidates.values())
    tried = [Regularization(), *(settings for round_ in rounds for settings in round_ if settings is not None)]
    return [Job(part.network(settings, SEARCH_SEED), part.criteria) for settings in tried]


def trials(part: Part, storage: Storage) -> list[Trial]:
    """The search as far as it is finished: of each kind, the best eligible trial is the chosen one.

    If no candidate of a kind is eligible, it is the one that costs the network least.
    """
    plain = _trial(part, Regularization(), storage)
    if plain is None:
        return []
    result = [replace(plain, is_chosen=True)]
    for choices in part.candidates.values():
        done = [trial for settings in choices if (trial := _trial(part, settings, storage)) is not None]
        best = _best(done, plain)
        result += [replace(trial, is_chosen=trial is best) for trial in done]
    return result


def chosen(part: Part, storage: Storage) -> dict[str | None, Regularization]:
    """The settings of each kind that has a finished trial."""
    return {trial.regularization.penalty: trial.regularization for trial in trials(part, storage) if trial.is_chosen}


def _best(done: Sequence[Trial], plain: Trial) -> Trial | None:
    finite = [trial for trial in done if trial.score is not None]
    if not finite:
        return None
    eligible = [trial for trial in finite if trial.full_precision >= plain.full_precision - MOST_LOST]
    if not eligible:
        return max(finite, key=lambda trial: trial.full_precision)
    return max(eligible, key=lambda trial: trial.score)


def _trial(part: Part, settings: Regularization, storage: Storage) -> Trial | None:
    """None unless all its cells are finished."""
    network = part.network(settings, SEARCH_SEED)
    full = storage.cell(network, None)
    if full is None:
        return None
    if "failure" in full:
        return Trial(settings, None, None)
    cells = [storage.cell(network, compression) for compression in part.criteria]
    if any(cell is None for cell in cells):
        return None
    return Trial(settings, full["validation"], statistics.mean(cell["validation"] for cell in cells))
