"""What a quantizer sees of each layer: extremes, spread, and the step size it would have at 8, 4, 3 and 2 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from r2_kernels.granularity import PER_TENSOR, counts_of, over_segments

BITS = (8, 4, 3, 2)
# soft-min-max shrinks max w - min w, what an asymmetric quantizer divides into steps; the others shrink max|w|.
ASYMMETRIC_PENALTIES = ("soft_min_max",)

Row = dict[str, str | float]


@dataclass(frozen=True)
class Report:
    """One row per layer; ``print`` shows a table, ``rows`` are for a data frame, ``scalars()`` for a logger."""

    rows: Sequence[Row]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def scalars(self) -> dict[str, float]:
        """Every number by ``"quantity/layer"``, as trainers' loggers take them."""
        return {
            f"{quantity.replace('/', '_over_')}/{row['layer']}": float(number)
            for row in self.rows
            for quantity, number in row.items()
            if quantity != "layer"
        }

    def __str__(self) -> str:
        columns = list(self.rows[0])
        cells = [columns] + [[_cell(row[column]) for column in columns] for row in self.rows]
        widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def layer_report(name: str, weight: Tensor, penalty: str, value: float, group_size: int = PER_TENSOR) -> Row:
    """One layer's row. A step of b bits is range/(2^b - 1) asymmetric, max|w|/(2^(b-1) - 1) symmetric.

    With channels or groups, each of which a quantizer gives a step of its own, it is the mean over these.
    """
    flat = weight.detach().double()
    minimum, maximum, deviation = (float(statistic) for statistic in (flat.min(), flat.max(), flat.std(correction=0)))
    largest = max(abs(minimum), abs(maximum))
    row: Row = {
        "layer": name,
        "min": minimum,
        "max": maximum,
        "std": deviation,
        "max/std": largest / deviation if deviation else float("nan"),
        "penalty": value,
    }
    if group_size != PER_TENSOR:
        row["segments"] = counts_of([weight], group_size)[0]
    is_asymmetric = penalty in ASYMMETRIC_PENALTIES
    extent = float(over_segments(flat, group_size, _range if is_asymmetric else _largest).mean())
    for bits in BITS:
        row[f"step {bits} bit"] = extent / (2**bits - 1 if is_asymmetric else 2 ** (bits - 1) - 1)
    return row


def _range(segments: Tensor) -> Tensor:
    return segments.amax(-1) - segments.amin(-1)


def _largest(segments: Tensor) -> Tensor:
    return segments.abs().amax(-1)


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
