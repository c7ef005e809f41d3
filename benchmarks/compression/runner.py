"""Runs cells that are not finished yet: trains a network once, then compresses it in each way."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.compression import datasets
from benchmarks.compression.cells import Compression, Network
from benchmarks.compression.dataset import Dataset
from benchmarks.compression.models import build
from benchmarks.compression.storage import Storage
from benchmarks.compression.training import train
from benchmarks.compression.workers import start_worker

HISTOGRAM_BINS = 81
Log = Callable[[str], object]


@dataclass(frozen=True)
class Job:
    """A network with the compressions that are wanted of it."""

    network: Network
    compressions: tuple[Compression, ...]


@dataclass(frozen=True)
class Runner:
    """Where data come from and results go to.

    Args:
        data: the dataset's folder, where it needs one.
        output: the results' folder.
        workers: how many processes; with one, everything runs in this one.
        device: "cpu" or "cuda".
    """

    data: Path | None
    output: Path
    workers: int = 1
    device: str = "cpu"

    def run(self, jobs: Sequence[Job], log: Log) -> None:
        """Finish all cells of the jobs; what is finished already is not touched."""
        work = partial(run_job, runner=self)
        if self.workers == 1:
            for job in jobs:
                _tell(work(job), log)
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=start_worker) as pool:
            try:
                for future in as_completed([pool.submit(work, job) for job in jobs]):
                    _tell(future.result(), log)
            except BaseException:
                # Else leaving the block would first finish what is being trained and what waits.
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise


def _tell(lines: Iterable[str], log: Log) -> None:
    for line in lines:
        log(line)


def run_job(job: Job, runner: Runner) -> list[str]:
    """Finish the cells of one network; a line for each that was not finished before."""
    storage = Storage(runner.output)
    network = job.network
    lines = []
    finished = storage.cell(network, None)
    missing = [compression for compression in job.compressions if storage.cell(network, compression) is None]
    if finished is not None and (not missing or "failure" in finished):
        return lines
    device = torch.device(runner.device)
    dataset = datasets.load(network.data, runner.data, runner.output / "cache", network.subset).on(device)
    if finished is None:
        finished = _train(network, dataset, storage, device)
        lines.append(_line(network, None, finished))
        if "failure" in finished:
            return lines
    model = _build(network, dataset, device)
    model.load_state_dict(storage.weights(network))
    for compression in missing:
        result = _compress(model.eval(), network, compression, dataset)
        storage.keep(network, compression, result)
        lines.append(_line(network, compression, result))
    return lines


def _line(network: Network, compression: Compression | None, result: dict[str, Any]) -> str:
    name = f"{network.folder()} {compression or 'full precision'}"
    if "failure" in result:
        return f"{name}: {result['failure']}"
    return f"{name}: validation {result['validation']:.2f} %, {result['seconds']:.0f} s"


def _build(network: Network, dataset: Dataset, device: torch.device) -> nn.Module:
    model = build(network.model, dataset.shape, dataset.classes, network.width)
    return model.to(device, memory_format=torch.channels_last)


def _train(network: Network, dataset: Dataset, storage: Storage, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(network.seed)
    model = _build(network, dataset, device)
    if network.finetuned_from is not None:
        model.load_state_dict(storage.weights(network.finetuned_from))
    start = time.perf_counter()
    try:
        history = train(model, dataset, network.training, network.regularization, network.seed)
    except FloatingPointError as error:  # A result too: with these settings the network cannot be trained.
        result: dict[str, Any] = {"failure": str(error), **_circumstances(device)}
        storage.keep(network, None, result)
        return result
    seconds = time.perf_counter() - start
    result = _measured(model, dataset, seconds, device) | {"history": history, "histogram": _histogram(model)}
    storage.keep_weights(network, model.state_dict())
    storage.keep(network, None, result)
    return result


def _compress(model: nn.Module, network: Network, compression: Compression, dataset: Dataset) -> dict[str, Any]:
    torch.manual_seed(network.seed)
    start = time.perf_counter()
    compressed = compression.apply(model, dataset, network.seed)
    seconds = time.perf_counter() - start
    return _measured(compressed, dataset, seconds, next(model.parameters()).device)


def _measured(model: nn.Module, dataset: Dataset, seconds: float, device: torch.device) -> dict[str, Any]:
    return {
        "validation": dataset.score(model, dataset.validation),
        "test": dataset.score(model, dataset.test),
        "seconds": seconds,
        **_circumstances(device),
    }


def _circumstances(device: torch.device) -> dict[str, Any]:
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": _name(device)}


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _histogram(model: nn.Module) -> dict[str, Any]:
    """How the weights of the largest layer are distributed."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.ndim >= 2}
    name = max(weights, key=lambda name: weights[name].numel())
    weight = weights[name].float().flatten()
    reach = weight.abs().max().item()
    return {
        "layer": name,
        "reach": reach,
        "deviation": weight.std().item(),
        "counts": torch.histc(weight.cpu(), HISTOGRAM_BINS, -reach, reach).int().tolist(),
    }
