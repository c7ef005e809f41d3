"""Finished cells on disk: one JSON file each, with all settings, and the trained networks' weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.compression.cells import Compression, Network, compression_settings

FULL_PRECISION = "float"


class Storage:
    """A folder of results.

    Every file is written whole or not at all, so that an interruption leaves no half cell.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cell(self, network: Network, compression: Compression | None) -> dict[str, Any] | None:
        """The stored cell, None if it is not finished; ``compression`` None is the network in full precision.

        Raises:
            ValueError: a cell of this name was made with other settings.
        """
        path = self._path(network, compression)
        if not path.is_file():
            return None
        stored = json.loads(path.read_text())
        for name, expected in _settings(network, compression).items():
            if stored[name] != json.loads(json.dumps(expected)):
                raise ValueError(
                    f"--output: expected the cell {path} to have been made with {name} {expected}, "
                    f"but it was made with {stored[name]}; give another folder, or delete the cell's"
                )
        return stored

    def keep(self, network: Network, compression: Compression | None, result: dict[str, Any]) -> None:
        """Store a finished cell."""
        path = self._path(network, compression)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(_settings(network, compression) | result, indent=1) + "\n")
        unfinished.replace(path)

    def keep_weights(self, network: Network, state: dict[str, Tensor]) -> None:
        """Store a trained network's weights and statistics."""
        path = self._weights_path(network)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def weights(self, network: Network) -> dict[str, Tensor]:
        """As they were kept.

        Raises:
            FileNotFoundError: they were not.
        """
        path = self._weights_path(network)
        if not path.is_file():
            raise FileNotFoundError(
                f"--output: expected the weights {path} beside their finished cell; delete {path.parent} to train again"
            )
        return torch.load(path, map_location="cpu")

    def _path(self, network: Network, compression: Compression | None) -> Path:
        name = FULL_PRECISION if compression is None else str(compression)
        return self.folder / network.folder() / f"{name}.json"

    def _weights_path(self, network: Network) -> Path:
        return self.folder / network.folder() / "weights.pt"


def _settings(network: Network, compression: Compression | None) -> dict[str, Any]:
    return {
        "network": network.settings(),
        "compression": None if compression is None else compression_settings(compression),
    }
