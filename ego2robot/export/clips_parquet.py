"""Kept clips as plain files: ``clips/<2 hex>/<clip_id>.mp4`` and one Parquet table of them.

The table is ``metadata.parquet`` with a ``file_name`` column, by which ``datasets`` knows a folder of videos;
pandas, DuckDB and Polars read it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ego2robot.export import clips
from ego2robot.export.clips import FIELDS, ClipsResult, Encoded, Order, Store
from ego2robot.export.files import TableFile
from ego2robot.export.staging import Item, Staging, Task, Tell, remove_leftovers
from ego2robot.jobs.claims import Shard
from ego2robot.store import atomic, schema
from ego2robot.store.rundir import RunDir

TABLE, HANDS = "metadata.parquet", "hands.parquet"
COLUMNS = pa.schema([("file_name", pa.string()), *FIELDS])
GROUP_ROWS = 4096


def export_parquet(
    run: RunDir,
    out: Path,
    top: int | None,
    codec: str = "av1",
    hands: bool = False,
    only_representatives: bool = False,
    workers: int = 0,
    progress: Tell | None = None,
) -> ClipsResult:
    """Writes the ``top`` best kept clips (None: all), an MP4 each, and ``metadata.parquet`` about them.

    With ``hands`` there is also ``hands.parquet`` (``schema.HANDS``): the landmarks of every clip's frames.
    Interrupted or killed, the same call goes on.

    Raises:
        UserError: ``out`` is in use by something else, the encoder is missing, or the disk is full.
    """
    prepared = clips.prepare(run, out, "parquet", top, codec, hands, only_representatives)
    staging, order = prepared.staging, prepared.order
    with staging.held():
        remove_leftovers(order.out)
        clips.work_on(run, prepared, _worker, workers, progress)
        failed = _tables(staging, order)
        left_out = clips.skipped(prepared, failed)
        clips.describe(run, prepared, left_out, {}, LOADING)
        warnings, covered = clips.warnings(run, prepared, left_out), clips.covered(prepared)
        n = prepared.choice.table.num_rows - len(left_out)
        staging.publish()
    size = sum(path.stat().st_size for path in order.out.rglob("*") if path.is_file())
    return ClipsResult(order.out, n, n, size, left_out, warnings, covered)


def export_parquet_shard(
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
    """Does a share of the units of an :func:`export_parquet` with the same arguments, which then ends it.

    Returns:
        The number of units that are left to other shards.
    """
    prepared = clips.prepare(run, out, "parquet", top, codec, hands, only_representatives)
    return clips.share(run, prepared, _worker, shard, workers, progress)


LOADING = """```python
from datasets import load_dataset

clips = load_dataset("videofolder", data_dir="path/to/this/folder", split="train")
```"""


def file_name(clip_id: str) -> str:
    """A clip's video, relative to the dataset; no folder gets more than a 256th of them."""
    return f"clips/{clip_id[:2]}/{clip_id}.mp4"


def _tables(staging: Staging, order: Order) -> dict[int, str]:
    """Writes what is known of all clips that were made; returns those that were not, by row of the plan."""
    failed: dict[int, str] = {}
    with TableFile(staging.dataset / TABLE, COLUMNS, GROUP_ROWS) as table:
        for unit in range(staging.n_units):
            missing = {int(row): why for row, why in staging.record(unit)["failed"].items()}
            failed |= missing
            rows = staging.rows(unit).to_pylist(maps_as_pydicts="lossy")
            shown = [clips.told(row, order.privacy.stripper) for row in rows]
            cells = [
                {"file_name": file_name(row["clip_id"]), **clips.fields(row, order)}
                for number, row in enumerate(shown, staging.starts[unit])
                if number not in missing
            ]
            for number in missing:  # somebody may have made it, and been killed before his unit was done
                row = shown[number - staging.starts[unit]]
                (staging.dataset / file_name(row["clip_id"])).unlink(missing_ok=True)
            table.add(pa.Table.from_pylist(cells, schema=COLUMNS))
    if order.hands:
        with TableFile(staging.dataset / HANDS, schema.HANDS, GROUP_ROWS) as table:
            for unit in range(staging.n_units):
                table.add(pq.read_table(staging.path(unit, "").with_name(staging.record(unit)["hands"])))
    return failed


def _worker(order: Order) -> Callable[[Task], Iterator[Item]]:
    return clips.worker(order, _Videos)


class _Videos(Store):
    """Puts each video where the dataset has it."""

    def __init__(self, order: Order, staging: Staging, unit: int) -> None:
        self._dataset = staging.dataset
        self._hands_path = staging.path(unit, f"-{clips.token()}.hands.parquet")
        self._hands: list[pa.Table] | None = [schema.HANDS.empty_table()] if order.hands else None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and self._hands is not None:
            atomic.write_parquet(self._hands_path, pa.concat_tables(self._hands))

    def add(self, clip: Encoded) -> None:
        atomic.write_bytes(self._dataset / file_name(clip.row["clip_id"]), clip.mp4)
        if self._hands is not None and clip.hands is not None:
            self._hands.append(pq.read_table(pa.BufferReader(clip.hands)))

    def record(self) -> dict[str, Any]:
        return {"hands": self._hands_path.name}
