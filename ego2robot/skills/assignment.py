"""Assigning all vectors to centroids, unit by unit: out of core, shared out, gone on with after a kill.

A folder of work holds what is done so far: ``fit.parquet`` (the centroids, published once: the first process
wins and all use its), ``assigned/`` (a Parquet part a unit, sorted by clip id) and, where duplicates are
looked for, ``grouped/`` (the same rows by cluster). A file is whole or absent, and what it holds does not
depend on who made it.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from torch.nn import functional as F

from ego2robot.errors import UserError
from ego2robot.skills.kmeans import Metric, Rows, nearest_exactly
from ego2robot.skills.vectors import Block, Unit, Vectors
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir

ROW_GROUP = 8_192  # of a part: what is skipped at a time when a range of ids is read
DETAILS = ("label", "hand_visibility", "motion")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Fit:
    """Centroids found on a sample.

    Attributes:
        metric: what they are nearest by.
        centroids: one float32 [K, D] for each number of clusters that was asked for.
        about: what made them, for ``skills.json``.
    """

    metric: Metric
    centroids: tuple[np.ndarray, ...]
    about: dict[str, Any]


@dataclass(frozen=True)
class Shard:
    """Every ``of``-th unit from ``index`` on."""

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``I/N``, I from 0. Raises UserError for anything else."""
        index, slash, of = text.partition("/")
        if not (slash and index.isdecimal() and of.isdecimal() and int(index) < int(of)):
            raise UserError(f"shard {text!r}: should be I/N with I from 0 to N−1, such as 0/8")
        return cls(int(index), int(of))

    def mine(self, items: Sequence[Any]) -> list[Any]:
        return list(items[self.index :: self.of])


class Details:
    """What ``clips/`` says about the clips of a unit; nothing where there is no run."""

    def __init__(self, run: RunDir | None) -> None:
        self._run = run
        files = {file for record in run.records() for file in record.files} if run else set()
        self._parts = {Path(file).name for file in files if file.startswith("clips/")}

    def of(self, unit: Unit, clip_ids: pa.Array) -> pa.Table:
        """One row per id, ``DETAILS``; null where the clip has none."""
        if self._run is None:
            nulls = [pa.nulls(len(clip_ids), kind) for kind in (pa.string(), pa.float32(), pa.float32())]
            return pa.Table.from_arrays(nulls, names=list(DETAILS))
        # A commit writes a clip's row and its vectors into parts of one name.
        names = sorted({piece.path.name for piece in unit.pieces} & self._parts)
        wanted = ["clip_id", *DETAILS]
        tables = [pq.read_table(self._run.path / "clips" / name, columns=wanted) for name in names]
        found = pa.concat_tables(tables) if tables else None
        at = pc.index_in(clip_ids, value_set=found["clip_id"].combine_chunks()) if found else None
        if found is None or at is None or at.null_count:
            missing = clip_ids if at is None else clip_ids.filter(pc.is_null(at))
            rest = self._run.dataset("clips").to_table(wanted, filter=ds.field("clip_id").isin(missing))
            found = pa.concat_tables([found, rest.cast(found.schema)]) if found is not None else rest
            at = pc.index_in(clip_ids, value_set=found["clip_id"].combine_chunks())
        return found.select(list(DETAILS)).take(at)


class Work:
    """One clustering on its way.

    Attributes:
        folder: ``skills/work-<key>``; the key stands for the vectors and the settings.
        grouped: rows are also kept by cluster, for :mod:`ego2robot.skills.duplicates`.
    """

    def __init__(self, folder: Path, vectors: Vectors, grouped: bool, device: str) -> None:
        self.folder, self.vectors, self.grouped, self.device = folder, vectors, grouped, device

    def fit(self) -> Fit | None:
        """What was published, None before."""
        path = self.folder / "fit.parquet"
        if not path.is_file():
            return None
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"fit"])
        which = table["model"].to_numpy()
        flat = table["centroid"].combine_chunks().flatten().to_numpy()
        x_ND = flat.reshape(len(table), -1)
        centroids = tuple(np.ascontiguousarray(x_ND[which == i]) for i in range(about["models"]))
        return Fit(about["metric"], centroids, about["about"])

    def publish(self, fit: Fit) -> Fit:
        """Makes ``fit`` the one that all shards use, unless another came first; says which it is."""
        which = np.repeat(np.arange(len(fit.centroids)), [len(c) for c in fit.centroids])
        flat = np.concatenate([c.ravel() for c in fit.centroids])
        about = {"metric": fit.metric, "models": len(fit.centroids), "about": fit.about}
        table = pa.table(
            {
                "model": pa.array(which, pa.int32()),
                "centroid": pa.FixedSizeListArray.from_arrays(
                    pa.array(flat, pa.float32()), fit.centroids[0].shape[1]
                ),
            }
        ).replace_schema_metadata({"fit": json.dumps(about)})
        mine = self.folder / f"fit-{socket.gethostname()}-{os.getpid()}.parquet"
        atomic.write_parquet(mine, table)
        try:
            os.link(mine, self.folder / "fit.parquet")  # fails where one is, also on NFS
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not (self.folder / "fit.parquet").exists():
                mine.replace(self.folder / "fit.parquet")
        finally:
            mine.unlink(missing_ok=True)
        atomic.sync_folder(self.folder)
        published = self.fit()
        assert published is not None
        return published

    def part(self, unit: Unit) -> Path:
        return self.folder / "assigned" / f"unit-{unit.index:06}.parquet"

    def parts(self) -> list[Path]:
        return [self.part(unit) for unit in self.vectors.units]

    def left(self) -> list[Unit]:
        """Units that nobody has assigned yet. The part is written last."""
        there = {path.name for path in (self.folder / "assigned").glob("unit-*.parquet")}
        return [unit for unit in self.vectors.units if self.part(unit).name not in there]

    def assign(self, fit: Fit, details: Details, shard: Shard, tell: Tell = lambda _: None) -> None:
        """Does what is left of a shard's units."""
        missing = {unit.index for unit in self.left()}
        todo = [unit for unit in shard.mine(self.vectors.units) if unit.index in missing]
        total, done = sum(unit.rows for unit in todo), 0
        writers = max(1, len(os.sched_getaffinity(0)) // 2)
        with ThreadPoolExecutor(writers) as pool:
            waiting: deque[Future[None]] = deque()
            for block in self.vectors.read(todo):
                found = assign_rows(block.x_ND, fit, self.device)
                waiting.append(pool.submit(self._write_unit, block, found, details))
                while len(waiting) > writers:  # what waits to be written is held in memory
                    waiting.popleft().result()
                done += block.unit.rows
                tell(f"assigned {done:,} of {total:,} clips")
            for one in waiting:
                one.result()

    def _write_unit(self, block: Block, found: list[tuple[np.ndarray, np.ndarray]], details: Details) -> None:
        order = pc.sort_indices(block.clip_ids)
        about = details.of(block.unit, block.clip_ids)
        table = pa.table(
            {
                "clip_id": block.clip_ids,
                **{
                    f"{name}_{i}": values
                    for i, (labels, distances) in enumerate(found)
                    for name, values in (("cluster", labels), ("distance", distances))
                },
                "label": about["label"],
            }
        ).take(order)
        if self.grouped:
            at = order.to_numpy()
            by_cluster = at[np.argsort(found[0][0][at], kind="stable")]
            self._write_grouped(block, about, by_cluster)
        atomic.write(
            self.part(block.unit),
            lambda file: pq.write_table(
                table, file, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True
            ),
        )

    def _write_grouped(self, block: Block, about: pa.Table, order: np.ndarray) -> None:
        """Keys and vectors by cluster, then clip id, as two arrays that are read by slices."""
        keys = grouped_keys(block.clip_ids, about)[order]
        at = torch.from_numpy(order.astype(np.int64)).to(block.x_ND.device)

        def vectors(file: BinaryIO) -> None:
            np.save(file, block.x_ND[at].cpu().numpy(), allow_pickle=False)

        atomic.write(self.grouped_path("vectors", block.unit), vectors)
        atomic.write(
            self.grouped_path("keys", block.unit), lambda file: np.save(file, keys, allow_pickle=False)
        )

    def grouped_path(self, kind: str, unit: Unit) -> Path:
        return self.folder / "grouped" / f"{kind}-{unit.index:06}.npy"


def grouped_keys(clip_ids: pa.Array, about: pa.Table) -> np.ndarray:
    """Id and quality of each clip: a higher ``hands``, then a higher ``motion``, is better."""
    text = clip_ids.cast(pa.binary()).to_numpy(zero_copy_only=False).astype("S")
    keys = np.empty(len(clip_ids), [("clip_id", text.dtype), ("hands", "<f4"), ("motion", "<f4")])
    keys["clip_id"] = text
    for name, column in (("hands", "hand_visibility"), ("motion", "motion")):
        values = about[column].cast(pa.float32()).fill_null(-1.0).combine_chunks()
        keys[name] = values.to_numpy(zero_copy_only=False)
    return keys


def assign_rows(x_ND: torch.Tensor, fit: Fit, device: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each of the fit's centroids: the nearest of each row, int32 [N], and the distance to it,
    float32 [N]. Rows are read once for all."""
    unit = fit.metric == "cosine"
    shift_D = None if unit else torch.from_numpy(fit.centroids[0].mean(axis=0, dtype=np.float64)).float()
    models = []
    for centroids in fit.centroids:
        c_KD = torch.from_numpy(centroids)
        models.append((c_KD if shift_D is None else c_KD - shift_D).to(device))
    rows = Rows(x_ND, device, None if shift_D is None else shift_D.to(device), unit)
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in models]
    for chunk_ND in rows.chunks(max(len(c) for c in models)):
        for found, centroids_KD in zip(parts, models, strict=True):
            labels, squared = nearest_exactly(chunk_ND, centroids_KD)
            found.append((labels, squared.sqrt_()))
    return [
        (
            torch.cat([labels for labels, _ in found]).to(torch.int32).cpu().numpy(),
            torch.cat([distances for _, distances in found]).cpu().numpy(),
        )
        for found in parts
    ]


@dataclass(frozen=True)
class Survey:
    """What the parts add up to, for one number of clusters.

    Attributes:
        number: new number of each cluster: by size, largest first, ties by the medoid's id; −1 when empty.
        sizes: clips of each skill, by new number.
        nearest: the ids nearest to each skill's centroid, best first.
        pairs: (label, skill) → clips.
    """

    number: np.ndarray
    sizes: np.ndarray
    nearest: list[list[str]]
    pairs: Counter[tuple[str | None, int]]


def survey(parts: Sequence[Path], model: int, k: int, n_nearest: int) -> Survey:
    """Sizes, medoids and labels of the clusters, in one pass over the parts."""
    counts = np.zeros(k, np.int64)
    best = np.zeros(0, [("cluster", "<i4"), ("distance", "<f4"), ("clip_id", "S1")])
    pairs: Counter[tuple[str | None, int]] = Counter()
    columns = ["clip_id", f"cluster_{model}", f"distance_{model}", "label"]
    for path in parts:
        table = pq.read_table(path, columns=columns)
        clusters, distances = (table[name].to_numpy() for name in columns[1:3])
        counts += np.bincount(clusters, minlength=k)
        # Rows are sorted by id, and so are equals after a stable sort.
        order = _first(np.lexsort((distances, clusters)), clusters, n_nearest)
        text = table["clip_id"].take(pa.array(order)).cast(pa.binary()).to_numpy().astype("S")
        width = max(text.itemsize, best["clip_id"].itemsize)
        kind = [("cluster", "<i4"), ("distance", "<f4"), ("clip_id", f"S{width}")]
        found = np.empty(len(order), kind)
        found["cluster"], found["distance"], found["clip_id"] = clusters[order], distances[order], text
        best = np.concatenate([best.astype(kind), found])
        order = np.lexsort((best["clip_id"], best["distance"], best["cluster"]))
        best = best[_first(order, best["cluster"], n_nearest)]
        grouped = table.group_by(["label", f"cluster_{model}"]).aggregate([([], "count_all")])
        for row in grouped.to_pylist():
            pairs[row["label"], row[f"cluster_{model}"]] += row["count_all"]
    ends = np.searchsorted(best["cluster"], np.arange(k + 1))
    nearest = [[i.decode() for i in best["clip_id"][a:b].tolist()] for a, b in itertools.pairwise(ends)]
    medoids = [ids[0] if ids else "" for ids in nearest]
    by_size = sorted((i for i in range(k) if counts[i]), key=lambda i: (-counts[i], medoids[i]))
    number = np.full(k, -1, np.int32)
    number[by_size] = np.arange(len(by_size), dtype=np.int32)
    return Survey(
        number,
        counts[by_size],
        [nearest[i] for i in by_size],
        Counter({(label, int(number[c])): n for (label, c), n in pairs.items()}),
    )


def _first(order: np.ndarray, clusters: np.ndarray, n: int) -> np.ndarray:
    """The first ``n`` of each cluster in ``order``, which goes cluster by cluster."""
    of = clusters[order]
    starts = np.searchsorted(of, of)  # where each one's cluster begins
    return order[np.arange(len(order)) - starts < n]


def ranges(clip_ids: pa.Array, rows: int, most: int) -> Iterator[tuple[str | None, str | None]]:
    """Bounds [from, to) on ids, None: open, such that each range holds about ``most`` of ``rows`` ids.

    Args:
        clip_ids: a sorted sample of them.
    """
    n = max(1, -(-rows // most))
    cuts = [clip_ids[len(clip_ids) * i // n].as_py() for i in range(1, n)]
    bounds = [None, *dict.fromkeys(cuts), None]
    yield from itertools.pairwise(bounds)


def between(parts: Sequence[Path], low: str | None, high: str | None) -> pa.Table:
    """The rows of sorted parts whose id is in [low, high), sorted by id."""
    keep: Any = None
    if low is not None:
        keep = ds.field("clip_id") >= low
    if high is not None:
        below = ds.field("clip_id") < high
        keep = below if keep is None else keep & below
    files = [str(path) for path in parts]
    return ds.dataset(files, format="parquet").to_table(filter=keep).sort_by("clip_id")


def unit_rows(x_ND: torch.Tensor) -> torch.Tensor:
    """float32, each row of length 1; rows of zeros stay zeros."""
    return F.normalize(x_ND.to(torch.float32), dim=1)
