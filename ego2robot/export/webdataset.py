"""Kept clips as WebDataset shards: tars in which each clip is ``<clip_id>.mp4`` and ``<clip_id>.json``.

Any process does any unit of work and leaves its members ready to be joined; how they are dealt to shards
follows from their sizes, so shards are the same whatever the number of processes. A shard is the bytes of its
members one after the other: nothing is encoded or read twice.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ego2robot.export import clips
from ego2robot.export.clips import ClipsResult, Encoded, Order, Store
from ego2robot.export.files import cut
from ego2robot.export.staging import Item, Staging, Task, Tell, each, remove_leftovers, unwritable
from ego2robot.jobs.claims import Shard
from ego2robot.store.rundir import RunDir

SHARD = "shard-{:06d}.tar"
END = bytes(1024)  # two empty blocks end a tar: POSIX.1-2017, pax, ustar interchange format
COPY = 1 << 20


def export_webdataset(
    run: RunDir,
    out: Path,
    top: int | None,
    shard_mb: float = 512,
    codec: str = "av1",
    hands: bool = False,
    only_representatives: bool = False,
    workers: int = 0,
    progress: Tell | None = None,
) -> ClipsResult:
    """Writes the ``top`` best kept clips (None: all) as ``shard-000000.tar`` and so on, in storing order.

    A sample is ``<clip_id>.mp4``, ``<clip_id>.json`` (``clips.FIELDS``; ``meta`` as keys and values) and,
    with ``hands``, ``<clip_id>.hands.parquet`` (``schema.HANDS``). Interrupted or killed, the same call
    goes on.

    Args:
        shard_mb: MiB that a shard has at most; a clip that is larger has a shard of its own.

    Raises:
        UserError: ``out`` is in use by something else, the encoder is missing, or the disk is full.
    """
    prepared = clips.prepare(run, out, "webdataset", top, codec, hands, only_representatives)
    staging, order = prepared.staging, prepared.order
    with staging.held():
        remove_leftovers(order.out)
        clips.work_on(run, prepared, _worker, workers, progress)
        failed, pieces = _made(staging)
        shards = cut(np.array([size for *_, size in pieces], np.int64), max(1.0, shard_mb * (1 << 20)))
        tasks = [
            (number, [pieces[i] for i in np.flatnonzero(shards == number)])
            for number in range(int(shards[-1]) + 1 if len(shards) else 0)
        ]
        shutil.rmtree(staging.dataset, ignore_errors=True)  # of one who was killed here, at another shard_mb
        staging.dataset.mkdir()
        each(_joiner, (order,), tasks, workers)
        left_out = clips.skipped(prepared, failed)
        head = {"configs": [{"config_name": "default", "data_files": "shard-*.tar"}]}
        clips.describe(run, prepared, left_out, head, LOADING)
        warnings, covered = clips.warnings(run, prepared, left_out), clips.covered(prepared)
        staging.publish()
    size = sum(path.stat().st_size for path in order.out.rglob("*") if path.is_file())
    return ClipsResult(order.out, len(pieces), len(tasks), size, left_out, warnings, covered)


def export_webdataset_shard(
    run: RunDir,
    out: Path,
    top: int | None,
    shard: Shard,
    codec: str = "av1",
    hands: bool = False,
    only_representatives: bool = False,
    workers: int = 0,
    progress: Tell | None = None,
) -> int:
    """Does a share of the units of an :func:`export_webdataset` with the same arguments, which then ends it.

    How large shards are matters only then.

    Returns:
        The number of units that are left to other shards.
    """
    prepared = clips.prepare(run, out, "webdataset", top, codec, hands, only_representatives)
    return clips.share(run, prepared, _worker, shard, workers, progress)


LOADING = """```python
from datasets import load_dataset

clips = load_dataset("webdataset", data_files="path/to/this/folder/shard-*.tar", split="train")
```"""

Piece = tuple[int, str, int, int]  # unit, file, offset, bytes


def _made(staging: Staging) -> tuple[dict[int, str], list[Piece]]:
    """What could not be exported, and where the members of every other clip lie."""
    failed: dict[int, str] = {}
    pieces: list[Piece] = []
    for unit in range(staging.n_units):
        record = staging.record(unit)
        failed |= {int(row): reason for row, reason in record["failed"].items()}
        at = 0
        for size in record["sizes"]:
            pieces.append((unit, record["file"], at, size))
            at += size
    return failed, pieces


def _worker(order: Order) -> Callable[[Task], Iterator[Item]]:
    return clips.worker(order, _Members)


class _Members(Store):
    """The members of a unit's clips, without the end of a tar."""

    def __init__(self, order: Order, staging: Staging, unit: int) -> None:
        self._path = staging.path(unit, f"-{clips.token()}.members")
        self._file: BinaryIO = self._path.open("wb")
        self._sizes: list[int] = []

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()

    def add(self, clip: Encoded) -> None:
        text = json.dumps(clip.fields, ensure_ascii=False, allow_nan=False)
        parts = {"mp4": clip.mp4, "json": text.encode()}
        if clip.hands is not None:
            parts["hands.parquet"] = clip.hands
        members = b"".join(member(f"{clip.row['clip_id']}.{suffix}", data) for suffix, data in parts.items())
        self._file.write(members)
        self._sizes.append(len(members))

    def record(self) -> dict[str, Any]:
        return {"file": self._path.name, "sizes": self._sizes}


def member(name: str, data: bytes) -> bytes:
    """A file in a tar: the header, which says nothing of who wrote it when, and the padded data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _joiner(order: Order) -> Callable[[tuple[int, list[Piece]]], Iterator[None]]:
    staging = Staging(order.out, order.key)

    def join(task: tuple[int, list[Piece]]) -> Iterator[None]:
        number, pieces = task
        try:
            with (staging.dataset / SHARD.format(number)).open("wb") as shard:
                for unit, name, offset, size in pieces:
                    with staging.path(unit, "").with_name(name).open("rb") as source:
                        source.seek(offset)
                        _copy(source, shard, size)
                shard.write(END)
                shard.flush()
                os.fsync(shard.fileno())
        except OSError as error:
            raise unwritable(order.out, error) from None
        yield

    return join


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        data = source.read(min(COPY, size))
        if not data:
            raise OSError(f"{source.name} is shorter than it was")
        target.write(data)
        size -= len(data)
