"""The vectors of one embedding in their Parquet files: read in units of bounded size, sampled by id.

Units are the same for every process that looks at the same files, so that work on them can be shared out,
and killed and gone on with.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ego2robot.errors import UserError
from ego2robot.store.rundir import RunDir
from ego2robot.types import short_id

T = TypeVar("T")

UNIT_ROWS = 32_768  # at 768 half-precision values 48 MiB
FILE_ROWS = 65_536  # files with more are read by row group
# Constants of splitmix64's finalizer (Steele, Lea and Flood 2014).
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class Piece:
    """Some row groups of a file (None: all of them) and how many rows they have."""

    path: Path
    row_groups: tuple[int, ...] | None
    rows: int


@dataclass(frozen=True)
class Unit:
    """What is read, and assigned, at a time."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)


@dataclass(frozen=True)
class Block:
    """Rows of a unit: ids and vectors [n, D] as they are stored, on the host or on a GPU."""

    unit: Unit
    clip_ids: pa.Array
    x_ND: torch.Tensor


class Vectors:
    """One embedding: files with the columns ``clip_id`` and ``embedding`` (fixed size list).

    Attributes:
        rows, dim: how many vectors there are, and their length.
        units: disjoint, all rows together; the same for the same files.
        identity: changes when a file does.
        metadata: of the files' schema, such as ``weights`` and ``random``.
    """

    def __init__(self, files: Sequence[tuple[Path, int, str]]) -> None:
        """``files``: path, rows and checksum of each; at least one. Their order does not matter."""
        ordered = sorted(files, key=lambda file: file[0].name)
        first = pq.read_schema(ordered[0][0])
        self.dim: int = first.field("embedding").type.list_size
        self.metadata = {k.decode(): v.decode() for k, v in (first.metadata or {}).items()}
        self.where = ordered[0][0].parent
        self.rows = sum(rows for _, rows, _ in ordered)
        self.units = _units(ordered)
        self.identity = short_id(*(part for path, rows, sha in ordered for part in (path.name, rows, sha)))
        self._device: str | None = None
        self._kept: dict[int, Block] = {}

    @classmethod
    def of_run(cls, run: RunDir, name: str) -> Vectors:
        """``embeddings/<name>`` of a run. Raises KeyError when the run has none."""
        prefix = f"embeddings/{name}/"
        files = [
            (run.path / file, int(about["rows"]), str(about["sha256"]))
            for record in run.records()
            for file, about in record.files.items()
            if file.startswith(prefix)
        ]
        if not files:
            raise KeyError(name)
        return cls(files)

    def read(self, units: Iterable[Unit] | None = None) -> Iterator[Block]:
        """The blocks of some units (default: all), in order; the next ones are read meanwhile.

        Raises:
            UserError: a vector is missing or not finite.
        """
        yield from _ahead(self._block, self.units if units is None else units)

    def clip_ids(self) -> Iterator[pa.Array]:
        """The ids of each unit, without its vectors."""
        yield from _ahead(self._ids, self.units)

    def _ids(self, unit: Unit) -> pa.Array:
        chunks = [c for piece in unit.pieces for c in _read(piece, ["clip_id"])["clip_id"].chunks]
        return pa.chunked_array(chunks, pa.string()).combine_chunks()

    def vector(self, clip_id: str) -> torch.Tensor | None:
        """The vector of one clip as it is stored, [D]; None where there is none. Looks at ids first."""
        for unit, clip_ids in zip(self.units, self.clip_ids(), strict=True):
            at = pc.index(clip_ids, clip_id).as_py()
            if at >= 0:
                return self._load(unit)[1][at]
        return None

    def keep_on(self, device: str) -> bool:
        """From now on blocks stay on a GPU once they were read, if all take at most half of what is free
        there. Says whether they do."""
        if device == "cpu" or 4 * self.rows * self.dim > torch.cuda.mem_get_info(device)[0]:
            return False
        self._device = device
        return True

    def _block(self, unit: Unit) -> Block:
        if unit.index in self._kept:
            return self._kept[unit.index]
        clip_ids, x_ND = self._load(unit)
        if self._device is None:
            return Block(unit, clip_ids, x_ND)
        block = Block(unit, clip_ids, x_ND.to(self._device))
        self._kept[unit.index] = block
        return block

    def _load(self, unit: Unit) -> tuple[pa.Array, torch.Tensor]:
        x_ND: np.ndarray | None = None
        ids: list[pa.Array] = []
        start = 0
        for piece in unit.pieces:
            table = _read(piece, ["clip_id", "embedding"])
            for batch in table.to_batches():
                values_ND = _values(batch["embedding"])
                if x_ND is None:
                    x_ND = np.empty((unit.rows, self.dim), values_ND.dtype)
                x_ND[start : start + len(batch)] = values_ND
                start += len(batch)
                ids.append(batch["clip_id"])
        clip_ids = pa.chunked_array(ids, pa.string()).combine_chunks()
        if x_ND is None or start != unit.rows:
            raise UserError(
                f"{self.where}: {start} rows where the ledger has {unit.rows}; see `ego2robot verify`"
            )
        self._require_finite(clip_ids, x_ND)
        return clip_ids, torch.from_numpy(x_ND)

    def _require_finite(self, clip_ids: pa.Array, x_ND: np.ndarray) -> None:
        # A sum over a row is finite only if its values are; float32 holds any sum of half precision.
        if np.isfinite(x_ND.sum(dtype=np.float64 if x_ND.itemsize > 2 else np.float32)):
            return
        broken = ~np.isfinite(x_ND).all(axis=1)
        if broken.any():
            names = some(clip_ids.filter(pa.array(broken)))
            raise UserError(
                f"{self.where}: values that are not finite for clips {names}; make them again in a new run"
            )


@dataclass(frozen=True)
class Sample:
    """Some rows of an embedding, sorted by clip id: all of them, or those whose hashed ids are smallest.

    Attributes:
        clip_ids: ascending.
        x_ND: as stored, on the CPU or the GPU.
        rows: of the whole embedding.
    """

    clip_ids: pa.Array
    x_ND: torch.Tensor
    rows: int

    @property
    def whole(self) -> bool:
        return len(self.clip_ids) == self.rows


def sample(vectors: Vectors, max_rows: int, max_bytes: int, seed: int) -> Sample:
    """A sample within both budgets, the same for the same clips and seed whatever files they are in.

    Raises:
        UserError: a vector is missing or not finite, or a clip of the sample occurs twice.
    """
    budget = max(1, min(max_rows, max_bytes // (2 * vectors.dim)))
    threshold = None if vectors.rows <= budget else _smallest(vectors, budget, seed)
    ids: list[pa.Array] = []
    parts: list[torch.Tensor] = []
    for block in vectors.read():
        if threshold is None:
            ids.append(block.clip_ids)
            parts.append(block.x_ND)
        else:
            chosen = hashed(block.clip_ids, seed) <= threshold
            ids.append(block.clip_ids.filter(pa.array(chosen)))
            at = torch.from_numpy(np.flatnonzero(chosen)).to(block.x_ND.device)
            parts.append(block.x_ND[at])
    clip_ids = pa.chunked_array(ids, pa.string()).combine_chunks()
    order = pc.sort_indices(clip_ids)
    clip_ids = clip_ids.take(order)
    require_once(clip_ids, vectors.where)
    x_ND = torch.empty((len(clip_ids), vectors.dim), dtype=parts[0].dtype, device=parts[0].device)
    to = torch.empty(len(clip_ids), dtype=torch.int64)
    to[torch.from_numpy(order.to_numpy().astype(np.int64))] = torch.arange(len(clip_ids))
    start = 0
    parts.reverse()
    while parts:  # taken off one by one, so that the sample is not in memory twice
        part = parts.pop()
        x_ND[to[start : start + len(part)].to(part.device)] = part
        start += len(part)
    return Sample(clip_ids, x_ND, vectors.rows)


def hashed(clip_ids: pa.Array, seed: int) -> np.ndarray:
    """A number for each id that looks random and depends on the id and the seed alone, uint64 [N]."""
    lengths = pc.min_max(pc.binary_length(clip_ids)).as_py()
    shortest, longest = lengths["min"] or 0, lengths["max"] or 0
    if shortest == longest and longest and not longest % 8:
        first = np.frombuffer(clip_ids.buffers()[1], np.int32)[clip_ids.offset]
        words_NW = np.frombuffer(clip_ids.buffers()[2], "<u8", len(clip_ids) * longest // 8, first)
        words_NW = words_NW.reshape(len(clip_ids), -1)
    else:
        width = max(8, -(-longest // 8) * 8)
        text = clip_ids.cast(pa.binary()).to_numpy(zero_copy_only=False).astype(f"S{width}")
        words_NW = text.view(np.uint8).reshape(len(clip_ids), width).view("<u8")
    state = np.full(len(clip_ids), np.uint64(seed))
    for word in words_NW.T:
        state = _mixed(state ^ word)
    return state


def require_once(clip_ids: pa.Array, where: Path) -> None:
    """Raises UserError when a clip occurs twice among sorted ids."""
    twice = pc.equal(clip_ids[1:], clip_ids[:-1])
    if pc.any(twice).as_py():
        names = some(clip_ids[1:].filter(twice))
        raise UserError(
            f"{where}: clips that occur twice: {names}; see `ego2robot verify {where.parents[1]}`"
        )


def some(values: pa.Array, most: int = 5) -> str:
    shown = ", ".join(values[:most].to_pylist())
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")


def _mixed(state: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        state = state + _MIX[0]
        state = (state ^ (state >> np.uint64(30))) * _MIX[1]
        state = (state ^ (state >> np.uint64(27))) * _MIX[2]
    return state ^ (state >> np.uint64(31))


def _smallest(vectors: Vectors, n: int, seed: int) -> np.uint64:
    """The ``n``-th smallest hash; holds twice as many at most."""
    kept = np.zeros(0, np.uint64)
    for clip_ids in vectors.clip_ids():
        found = hashed(clip_ids, seed)
        if len(kept) >= n:
            found = found[found <= kept[:n].max()]
        kept = np.concatenate([kept, found])
        if len(kept) > n:
            kept = np.partition(kept, n - 1)[:n]
    return kept.max()


def _units(files: Sequence[tuple[Path, int, str]]) -> list[Unit]:
    pieces: list[Piece] = []
    for path, rows, _ in files:
        if rows <= FILE_ROWS:
            pieces.append(Piece(path, None, rows))
            continue
        about = pq.read_metadata(path)
        pieces += [Piece(path, (i,), about.row_group(i).num_rows) for i in range(about.num_row_groups)]
    units: list[Unit] = []
    open_pieces: list[Piece] = []
    for piece in pieces:
        if open_pieces and sum(p.rows for p in open_pieces) + piece.rows > UNIT_ROWS:
            units.append(Unit(len(units), tuple(open_pieces)))
            open_pieces = []
        open_pieces.append(piece)
    return [*units, Unit(len(units), tuple(open_pieces))]


def _read(piece: Piece, columns: list[str]) -> pa.Table:
    # Memory-mapped pages would count as resident; a plain file's do not.
    with pq.ParquetFile(piece.path, memory_map=False, pre_buffer=False) as file:
        if piece.row_groups is None:
            return file.read(columns=columns, use_threads=False)
        return file.read_row_groups(list(piece.row_groups), columns=columns, use_threads=False)


def _values(column: pa.FixedSizeListArray) -> np.ndarray:
    """[n, D]; NaN where the vector or a value is missing."""
    width = column.type.list_size
    if not column.null_count:
        flat = column.flatten()
        if not flat.null_count:
            return flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    kind = column.type.value_type.to_pandas_dtype()
    values_ND = np.full((len(column), width), np.nan, kind)
    there = column.is_valid().to_numpy(zero_copy_only=False)
    flat = column.flatten().cast(pa.float32()).fill_null(float("nan"))
    values_ND[there] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    return values_ND


def _ahead(load: Callable[[Unit], T], units: Iterable[Unit]) -> Iterator[T]:
    """``load`` of each unit in order, with some loaded ahead: one on a small machine, one a core on a
    large one."""
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    todo = iter(units)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for unit in todo:
                waiting.append(pool.submit(load, unit))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
