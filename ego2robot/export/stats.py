"""Exact dataset statistics: ten numbers a feature, of an episode and of a whole dataset.

LeRobot 0.4.4 estimates the same ten from sampled, subsampled pictures and averages the quantiles of
episodes. Here every pixel and every row counts: ``std`` is the population's (as there), quantiles
interpolate linearly between order statistics (``numpy.quantile``'s default).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
COLUMN_BYTES = 256 << 20  # of one feature held at once while a whole dataset is summed up

Statistics = dict[str, np.ndarray]


class PixelHistogram:
    """How often each of the 256 values occurs in each colour channel.

    All ten statistics of 8-bit pictures follow from it exactly, and histograms add up: those of a
    dataset are the sum of those of its episodes, whatever its size.

    Attributes:
        counts: int64 [3, 256].
        frames: pictures counted.
    """

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), np.int64)
        self.frames = 0

    def add(self, frames_THWC: torch.Tensor) -> None:
        """Counts uint8 RGB [T, H, W, 3]; one frame at a time, so that the copy stays small."""
        for frame in frames_THWC:
            for channel in range(3):
                values = frame[..., channel].reshape(-1)
                self.counts[channel] += torch.bincount(values, minlength=256).cpu().numpy()
        self.frames += len(frames_THWC)

    def merge(self, other: PixelHistogram) -> None:
        self.counts += other.counts
        self.frames += other.frames

    def statistics(self) -> Statistics:
        """Each [3, 1, 1] float64 with pixels in [0, 1], except ``count``: int64 [1], frames.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.frames:
            raise ValueError("no frames were counted")
        values = np.arange(256, dtype=np.float64)
        per_channel = [_of_histogram(values, counts) for counts in self.counts]
        found = {
            name: np.array([s[name] for s in per_channel]).reshape(3, 1, 1) / 255 for name in per_channel[0]
        }
        return {name: found[name] if name != "count" else np.array([self.frames]) for name in NAMES}


def _of_histogram(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """All statistics but ``count`` of ``values`` [V] ascending that occur ``counts`` [V] times."""
    n = int(counts.sum())
    present = values[counts > 0]
    mean = float(values @ counts) / n
    ends = np.cumsum(counts)  # ranks below ends[i] have at most values[i]
    found = {
        "min": float(present[0]),
        "max": float(present[-1]),
        "mean": mean,
        "std": float(np.sqrt(((values - mean) ** 2) @ counts / n)),
    }
    for name, q in QUANTILES.items():
        rank = q * (n - 1)
        low = int(np.floor(rank))
        below, above = values[np.searchsorted(ends, [low, min(low + 1, n - 1)], side="right")]
        found[name] = float(below + (rank - low) * (above - below))
    return found


def vector_statistics(values_ND: np.ndarray) -> Statistics:
    """Statistics of each column of [N, D], or of [N], which gives D = 1.

    ``min`` and ``max`` keep integers integers, the rest is float64 [D]; ``count`` is int64 [1].

    Raises:
        ValueError: N = 0.
    """
    if not len(values_ND):
        raise ValueError("no rows to sum up")
    values = values_ND.reshape(len(values_ND), -1)
    exact = values.astype(np.float64)
    ends = values if np.issubdtype(values.dtype, np.integer) else exact
    quantiles = np.quantile(exact, list(QUANTILES.values()), axis=0)
    return {
        "min": ends.min(0),
        "max": ends.max(0),
        "mean": exact.mean(0),
        "std": exact.std(0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def column_statistics(files: Sequence[Path], column: str, dim: int) -> Statistics:
    """:func:`vector_statistics` of one column over all data files of a dataset.

    Quantiles need all values of a dimension at once, so as many dimensions as fit into
    ``COLUMN_BYTES`` are read per pass: memory is bounded, more rows cost more passes.
    """
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    width = max(1, min(dim, COLUMN_BYTES // (8 * max(1, rows))))
    parts = []
    for start in range(0, dim, width):
        some = slice(start, min(dim, start + width))
        blocks = [block[:, some].copy() for block in _blocks(files, column, dim)]
        parts.append(vector_statistics(np.concatenate(blocks)))
    return {
        name: parts[0][name] if name == "count" else np.concatenate([p[name] for p in parts])
        for name in NAMES
    }


def _blocks(files: Sequence[Path], column: str, dim: int) -> Iterator[np.ndarray]:
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(columns=[column]):
                array = batch.column(0)
                flat = array.flatten() if pa.types.is_fixed_size_list(array.type) else array
                yield flat.to_numpy(zero_copy_only=False).reshape(-1, dim)
