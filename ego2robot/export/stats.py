"""Exact dataset statistics: ten numbers a feature, of an episode and of a whole dataset.

LeRobot 0.4.4 estimates the same ten from sampled, subsampled pictures and averages the quantiles of
episodes. Here every pixel and every row counts: ``std`` is the population's (as there), quantiles
interpolate linearly between order statistics (``numpy.quantile``'s default).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
COLUMN_BYTES = 256 << 20  # of one feature held at once while a whole dataset is summed up
BLOCK_ROWS = 1 << 16
HALF = 1 << 16  # values of half a float32

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


def weighted_statistics(values: np.ndarray, counts: np.ndarray) -> Statistics:
    """Statistics of ``values`` [V] ascending that occur ``counts`` [V] times; each [1].

    Raises:
        ValueError: no value occurs.
    """
    if not counts.sum():
        raise ValueError("no rows to sum up")
    found = _of_histogram(values.astype(np.float64), counts)
    exact = values if np.issubdtype(values.dtype, np.integer) else values.astype(np.float64)
    ends = [exact[counts > 0][end] for end in (0, -1)]
    return {
        **{name: np.array([found[name]]) for name in found},
        "min": np.array([ends[0]]),
        "max": np.array([ends[1]]),
        "count": np.array([int(counts.sum())]),
    }


def count_statistics(n: int) -> Statistics:
    """Statistics of the numbers 0 to ``n`` - 1, each once; each [1]."""
    return {
        "min": np.array([0]),
        "max": np.array([n - 1]),
        "mean": np.array([(n - 1) / 2]),
        "std": np.array([np.sqrt((n * n - 1) / 12)]),
        "count": np.array([n]),
        **{name: np.array([q * (n - 1)]) for name, q in QUANTILES.items()},
    }


def column_statistics(files: Sequence[Path], column: str, dim: int) -> Statistics:
    """:func:`vector_statistics` of a float32 column over all data files of a dataset, in their order.

    Sums are of blocks of ``BLOCK_ROWS`` rows, whatever the files, so equal rows give equal numbers.
    Quantiles are exact: up to ``COLUMN_BYTES`` the values are held; of more, those at the wanted ranks are
    found by counting first the upper and then the lower halves of their bits, so memory stays bounded.

    Raises:
        ValueError: no rows.
    """
    n = sum(pq.read_metadata(file).num_rows for file in files)
    if not n:
        raise ValueError("no rows to sum up")
    held = 4 * n * dim <= COLUMN_BYTES
    blocks = list(_blocks(files, column, dim)) if held else None

    def again() -> Iterable[np.ndarray]:
        return blocks if blocks is not None else _blocks(files, column, dim)

    total, low, high = np.zeros(dim), np.full(dim, np.inf), np.full(dim, -np.inf)
    for block in again():
        total += block.sum(0, dtype=np.float64)
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
    mean = total / n
    squares = np.zeros(dim)
    for block in again():
        squares += ((block.astype(np.float64) - mean) ** 2).sum(0)
    positions = [q * (n - 1) for q in QUANTILES.values()]
    ranks = sorted({r for at in positions for r in (int(at), min(int(at) + 1, n - 1))})
    if blocks is not None:
        ranked = _ranked_by_sorting(np.concatenate(blocks), ranks)
    else:
        ranked = _ranked_by_counting(again, ranks, dim)
    quantiles = {}
    for name, at in zip(QUANTILES, positions, strict=True):
        below, above = (ranked[ranks.index(r)] for r in (int(at), min(int(at) + 1, n - 1)))
        quantiles[name] = below + (at - int(at)) * (above - below)
    return {
        "min": low,
        "max": high,
        "mean": mean,
        "std": np.sqrt(squares / n),
        "count": np.array([n]),
        **quantiles,
    }


def _ranked_by_sorting(values_ND: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """float64 [ranks, D]: the values at these ranks of each column."""
    return np.stack([np.partition(column, ranks)[ranks] for column in values_ND.T], 1).astype(np.float64)


def _ranked_by_counting(
    blocks: Callable[[], Iterable[np.ndarray]], ranks: Sequence[int], dim: int
) -> np.ndarray:
    """As :func:`_ranked_by_sorting`, of float32 blocks that are gone through several times."""
    upper = np.zeros((dim, HALF), np.int64)
    for block in blocks():
        keys = _ordered(block) >> 16
        for d in range(dim):
            upper[d] += np.bincount(keys[:, d], minlength=HALF)
    ends = np.cumsum(upper, axis=1)
    bins = np.stack([np.searchsorted(e, ranks, side="right") for e in ends])  # [D, ranks]
    del upper
    found = np.zeros((len(ranks), dim), np.uint32)
    width = max(1, COLUMN_BYTES // (8 * HALF * len(ranks)))  # columns whose lower halves are counted at once
    for start in range(0, dim, width):
        some = range(start, min(dim, start + width))
        lower = {(d, b): np.zeros(HALF, np.int64) for d in some for b in set(bins[d].tolist())}
        for block in blocks():
            keys = _ordered(block[:, start : some.stop])
            for (d, b), counts in lower.items():
                column = keys[:, d - start]
                np.add(counts, np.bincount(column[column >> 16 == b] & 0xFFFF, minlength=HALF), out=counts)
        for d in some:
            for i, rank in enumerate(ranks):
                b = int(bins[d, i])
                before = int(ends[d, b - 1]) if b else 0
                low = int(np.searchsorted(np.cumsum(lower[d, b]), rank - before, side="right"))
                found[i, d] = b << 16 | low
    return _values(found).astype(np.float64)


def _ordered(values: np.ndarray) -> np.ndarray:
    """uint32 keys that order as the float32 ``values`` do: IEEE 754's bits, with negative numbers turned."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _values(keys: np.ndarray) -> np.ndarray:
    """The inverse of :func:`_ordered`."""
    return np.where(keys >> 31, keys & np.uint32(0x7FFFFFFF), ~keys).astype(np.uint32).view(np.float32)


def _blocks(files: Sequence[Path], column: str, dim: int) -> Iterator[np.ndarray]:
    """float32 [BLOCK_ROWS, dim], the last one shorter; no negative zeros."""
    waiting, rows = [], 0
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(BLOCK_ROWS, columns=[column]):
                flat = batch.column(0).flatten().to_numpy(zero_copy_only=False)
                waiting.append(flat.reshape(-1, dim) + np.float32(0))
                rows += len(waiting[-1])
                if rows >= BLOCK_ROWS:
                    joined = np.concatenate(waiting)
                    yield joined[:BLOCK_ROWS]
                    waiting, rows = [joined[BLOCK_ROWS:]], rows - BLOCK_ROWS
    if rows:
        yield np.concatenate(waiting)
