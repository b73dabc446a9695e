"""Near-duplicate clips inside clusters: groups around the best clip of each.

Clips of a cluster are taken best first (hands seen, then motion, then id). A clip joins the best one before
it whose cosine reaches the threshold and that itself joined nobody; else it stands for itself. So every
clip that is marked lies within the threshold of the one that is kept, however long a chain of look-alikes.

A cluster is compared block by block: what is in memory depends on the block, not on the cluster. Which
blocks there are does not change the result.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import torch

from ego2robot.skills.assignment import Shard, Work, unit_rows
from ego2robot.store import atomic

BLOCK, GPU_BLOCK = 4_096, 16_384  # rows compared at a time: a square of 64 MiB, 1 GiB
BATCH_ROWS = 65_536  # clusters are done, and written, in batches of about so many rows
SKETCH = 64  # directions of the sketch that rules most pairs out
PAIRS = 1 << 16  # so few pairs are compared one by one rather than by a product
SLACK = 1e-5  # of a cosine by float32 products: no pair at the threshold is ruled out too early

SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("duplicate_group", pa.string(), nullable=False),
        pa.field("duplicate_cosine", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Stored:
    """The rows of one cluster in the ``grouped/`` arrays: for each file its path, where the cluster's rows
    begin and how many they are."""

    slices: tuple[tuple[Path, int, int], ...]

    def all(self) -> np.ndarray:
        return np.concatenate([read_slice(path, first, n) for path, first, n in self.slices])

    def take(self, index: np.ndarray) -> np.ndarray:
        """Some rows, by their number in the cluster, in any order."""
        ends = np.cumsum([n for _, _, n in self.slices])
        order = np.argsort(index, kind="stable")
        which = np.searchsorted(ends, index[order], side="right")
        parts = []
        for file in np.unique(which):
            path, first, n = self.slices[file]
            at = index[order][which == file] - (ends[file] - n)
            if 8 * len(at) > n:  # most of it: read at once
                parts.append(read_slice(path, first, n)[at])
            else:
                parts += [read_slice(path, first + i, 1) for i in at]
        found = np.concatenate(parts)
        back = np.empty_like(found)
        back[order] = found
        return back


def read_slice(path: Path, first: int, n: int) -> np.ndarray:
    """Rows of an ``.npy`` file. Read rather than mapped: mapped pages would count as resident."""
    shape, dtype, start = _header(path)
    width = int(np.prod(shape[1:], dtype=np.int64))
    with path.open("rb") as file:
        file.seek(start + first * width * dtype.itemsize)
        return np.fromfile(file, dtype, n * width).reshape(n, *shape[1:])


@lru_cache(4096)  # a file is looked at once for each cluster
def _header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    with path.open("rb") as file:
        first = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        return shape, dtype, file.tell()


class Duplicates:
    """Marks the near-duplicates of a :class:`Work` whose units are all assigned and grouped."""

    def __init__(self, work: Work, sizes_UK: np.ndarray, cosine: float) -> None:
        """``sizes_UK``: rows of each cluster in each unit."""
        self._work, self._sizes, self._cosine = work, sizes_UK, cosine
        self._firsts = np.cumsum(sizes_UK, axis=1) - sizes_UK
        totals = sizes_UK.sum(axis=0)
        self.batches: list[list[int]] = [[]]
        rows = 0
        for cluster in range(len(totals)):
            if self.batches[-1] and rows + totals[cluster] > BATCH_ROWS:
                self.batches.append([])
                rows = 0
            self.batches[-1].append(cluster)
            rows += int(totals[cluster])

    def part(self, batch: Sequence[int]) -> Path:
        return self._work.folder / "duplicates" / f"clusters-{batch[0]:06}.parquet"

    def parts(self) -> list[Path]:
        return [self.part(batch) for batch in self.batches]

    def left(self, shard: Shard = Shard()) -> list[list[int]]:  # noqa: B008  # frozen
        return [batch for batch in shard.mine(self.batches) if not self.part(batch).is_file()]

    def find(self, shard: Shard = Shard(), tell: Callable[[str], None] = lambda _: None) -> None:  # noqa: B008
        """Does what is left of a shard's batches."""
        todo = self.left(shard)
        for i, batch in enumerate(todo):
            tell(f"near-duplicates in clusters {i + 1} of {len(todo)}")
            tables = [self._cluster(cluster) for cluster in batch]
            atomic.write_parquet(self.part(batch), pa.concat_tables(tables).sort_by("clip_id"))

    def _stored(self, kind: str, cluster: int) -> Stored:
        return Stored(
            tuple(
                (self._work.grouped_path(kind, unit), int(first), int(n))
                for unit, first, n in zip(
                    self._work.vectors.units, self._firsts[:, cluster], self._sizes[:, cluster], strict=True
                )
                if n
            )
        )

    def _cluster(self, cluster: int) -> pa.Table:
        keys, vectors = self._stored("keys", cluster), self._stored("vectors", cluster)
        if not keys.slices:
            return SCHEMA.empty_table()
        about = keys.all()
        order = np.lexsort((about["clip_id"], -about["motion"], -about["hands"]))
        ids = about["clip_id"][order]
        small = len(order) <= BLOCK
        whole = vectors.all()[order] if small else None

        def rows(start: int, stop: int) -> np.ndarray:
            return whole[start:stop] if whole is not None else vectors.take(order[start:stop])

        group, cosine = groups(rows, len(order), self._cosine, self._work.device, self._work.folder)
        members = np.bincount(group, minlength=len(order))[group] > 1
        marked = np.flatnonzero(members)
        own = group[marked] == marked
        return pa.Table.from_arrays(
            [
                pa.array(ids[marked].tolist(), pa.binary()).cast(pa.string()),
                pa.array(ids[group[marked]].tolist(), pa.binary()).cast(pa.string()),
                pa.array(cosine[marked], pa.float32(), mask=own),
            ],
            schema=SCHEMA,
        )


def groups(
    rows: Callable[[int, int], np.ndarray],
    n: int,
    threshold: float,
    device: str = "cpu",
    scratch: Path | None = None,
    block: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The group of each of ``n`` rows, best first, as the number of the row that stands for it.

    Args:
        rows: gives rows [start, stop), vectors of any floating type. A row of zeros is like nothing.
        threshold: the least cosine.
        scratch: folder for the representatives' vectors while there is more than one block.

    Returns:
        int64 [n], the row itself where it stands for itself; float32 [n], the cosine to it, else 1.
    """
    block = block or (BLOCK if device == "cpu" else GPU_BLOCK)
    group, cosine = np.arange(n), np.ones(n, np.float32)
    leaders: list[int] = []
    basis: torch.Tensor | None = None
    with tempfile.TemporaryFile(dir=scratch, prefix=atomic.TEMPORARY_PREFIX) as file:
        for start in range(0, n, block):
            stored = rows(start, min(start + block, n))
            x_ND = unit_rows(torch.from_numpy(stored).to(device))
            if basis is None and n > block:
                basis = _directions(x_ND)
            left = torch.arange(len(x_ND), device=device)
            for first, leaders_LD in _read_back(file, len(leaders), stored, block, device):
                if not len(left):
                    break
                hit, which, value = _first_hits(x_ND[left], leaders_LD, threshold, basis)
                at = left[hit].cpu().numpy() + start
                group[at] = np.asarray(leaders)[first + which.cpu().numpy()]
                cosine[at] = value.cpu().numpy()
                left = left[~hit]
            owner, likeness = _within(x_ND[left], threshold)
            numbers = left.cpu().numpy() + start
            group[numbers] = numbers[owner]
            cosine[numbers] = likeness
            new = numbers[owner == np.arange(len(numbers))]
            if n > block:
                leaders += new.tolist()
                file.seek(0, 2)
                file.write(np.ascontiguousarray(stored[new - start]).tobytes())
    return group, cosine


def _read_back(
    file: IO[bytes], n: int, like: np.ndarray, block: int, device: str
) -> Iterator[tuple[int, torch.Tensor]]:
    """Representatives so far, in order: the number of the first of a block, and their unit vectors."""
    width = like.shape[1] * like.itemsize
    for first in range(0, n, block):
        file.seek(first * width)
        raw = file.read(min(block, n - first) * width)
        stored = np.frombuffer(bytearray(raw), like.dtype).reshape(-1, like.shape[1])
        yield first, unit_rows(torch.from_numpy(stored).to(device))


def _first_hits(
    x_ND: torch.Tensor, leaders_LD: torch.Tensor, threshold: float, basis_DP: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which rows reach the threshold with a leader (bool [N]), and for those the first such leader and the
    cosine.

    A cosine is at most that of the parts along some directions plus the product of what is left of both:
    with few directions that rules nearly all pairs out at a fraction of the cost.
    """
    if basis_DP is None:
        near = torch.ones((len(x_ND), len(leaders_LD)), dtype=torch.bool, device=x_ND.device)
    else:
        near = _sketch(x_ND, basis_DP) @ _sketch(leaders_LD, basis_DP).T >= threshold - SLACK
    row_at, leader_at = near.any(dim=1).nonzero()[:, 0], near.any(dim=0).nonzero()[:, 0]
    hit = torch.zeros(len(x_ND), dtype=torch.bool, device=x_ND.device)
    if not len(row_at):
        none = torch.zeros(0, dtype=torch.int64, device=x_ND.device)
        return hit, none, none.to(torch.float32)
    n_pairs = int(near.sum())
    if n_pairs <= PAIRS:
        i, j = near.nonzero().unbind(1)
        value = torch.cat(
            [(x_ND[a] * leaders_LD[b]).sum(dim=1) for a, b in zip(i.split(4096), j.split(4096), strict=True)]
        )
        good = value >= threshold - SLACK / 10
        i, j, value = i[good], j[good], value[good]
        # Pairs come by row, then by leader: the first of each row is the one that counts.
        first = torch.ones(len(i), dtype=torch.bool, device=i.device)
        first[1:] = i[1:] != i[:-1]
        hit[i[first]] = True
        return hit, j[first], value[first]
    cosines = x_ND[row_at] @ leaders_LD[leader_at].T
    good_NL = cosines >= threshold - SLACK / 10
    hit[row_at] = good_NL.any(dim=1)
    good_rows = good_NL.any(dim=1).nonzero()[:, 0]
    which = good_NL[good_rows].to(torch.uint8).argmax(dim=1)
    return hit, leader_at[which], cosines[good_rows, which]


def _within(x_ND: torch.Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The same among the rows of one block: owner int64 [N] (itself when it stands for itself) and cosine."""
    n = len(x_ND)
    owner, cosine = np.arange(n), np.ones(n, np.float32)
    cosines = x_ND @ x_ND.T
    i, j = (cosines >= threshold - SLACK / 10).triu_(diagonal=1).nonzero().unbind(1)
    value = cosines[i, j].cpu().numpy()
    first, second = i.cpu().numpy(), j.cpu().numpy()
    free = np.ones(n, bool)
    starts = np.flatnonzero(np.diff(first, prepend=-1))
    for start, stop in itertools.pairwise([*starts.tolist(), len(first)]):
        row = first[start]
        if free[row]:
            later = second[start:stop]
            mine = free[later]
            owner[later[mine]], cosine[later[mine]] = row, value[start:stop][mine]
            free[later[mine]] = False
    return owner, cosine


def _directions(x_ND: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns [D, P] that hold most of the rows: their strongest common directions."""
    second_DD = (x_ND.T.double() @ x_ND.double()) if len(x_ND) < x_ND.shape[1] else (x_ND.T @ x_ND).double()
    return torch.linalg.eigh(second_DD.cpu())[1][:, -SKETCH:].to(x_ND.device, torch.float32)


def _sketch(x_ND: torch.Tensor, basis_DP: torch.Tensor) -> torch.Tensor:
    """The part along the basis, and the length of what is left, [N, P + 1]."""
    part_NP = x_ND @ basis_DP
    # Rounding may make what is left too small, never by more than is added.
    rest_N = (x_ND.square().sum(dim=1) - part_NP.square().sum(dim=1)).clamp_(min=0).add_(1e-6).sqrt_()
    return torch.cat([part_NP, rest_N[:, None]], dim=1)
