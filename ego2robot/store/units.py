"""The plan as a table: units of work to rows and back."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ego2robot import config
from ego2robot.store import schema
from ego2robot.types import Blob, Clip, Unit, Video, VideoInfo, clip_id

ROW_GROUP = 4096  # units; what is read to get one
GROUPS_KEPT = 4
VIDEOS = b"videos"  # in a plan's metadata: how many
CLIP_S = b"clip_s"  # in a plan's metadata: seconds of its videos that a clip stands for


def units_table(units: Sequence[Unit]) -> pa.Table:
    """Units as rows of ``schema.UNITS``."""
    rows = []
    for unit in units:
        video, info = unit.video, unit.video.info
        assert info is not None
        any_meta = any(clip.meta for clip in unit.clips)
        rows.append(
            {
                "unit_id": unit.unit_id,
                "video_id": video.video_id,
                "name": video.name,
                "source": video.source,
                "path": video.blob.path,
                "offset": video.blob.offset,
                "size": video.blob.size,
                "whole_file": video.blob.whole_file,
                "width": info.width,
                "height": info.height,
                "rotation": info.rotation,
                "fps": info.fps,
                "duration_s": info.duration_s,
                "video_start_s": info.start_s,
                "n_frames": info.n_frames,
                "codec": info.codec,
                "pix_fmt": info.pix_fmt,
                "bit_depth": info.bit_depth,
                "first": [c.first for c in unit.clips],
                "length": [c.n_frames for c in unit.clips],
                "sample_fps": unit.clips[0].sample_fps,
                "cost_s": unit.cost_s,
                "meta": list(video.meta.items()),
                "clip_meta": [list(c.meta.items()) for c in unit.clips] if any_meta else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=schema.UNITS)


class StoredPlan:
    """A stored plan, of which only what ordering needs is in memory; units are read as they are asked for.

    Attributes:
        unit_ids: bytes [N].
        costs_s: float64 [N], estimated seconds.
        kinds: int64 [N], a number for the codec, the same in every plan.
        n_clips: int64 [N].
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = pq.ParquetFile(path)
        self._stamp = self._look()
        table = self._file.read(["unit_id", "cost_s", "codec", "length"])
        self.unit_ids = ids_array(table["unit_id"])
        self.costs_s = table["cost_s"].to_numpy().astype(np.float64)
        codecs = table["codec"].combine_chunks().dictionary_encode()
        names = [zlib.crc32(name.encode()) for name in codecs.dictionary.to_pylist()]
        self.kinds = np.array([*names, 0], np.int64)[codecs.indices.to_numpy()]
        self.n_clips = pc.list_value_length(table["length"]).to_numpy().astype(np.int64)
        rows = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        self._groups: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return len(self.unit_ids)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.unit_ids, kind="stable")

    @cached_property
    def _sorted(self) -> np.ndarray:
        return self.unit_ids[self._order]

    def _look(self) -> tuple[int, int, int]:
        seen = self._path.stat()
        return seen.st_ino, seen.st_size, seen.st_mtime_ns

    def replaced(self) -> bool:
        """Whether another plan has been stored in its place."""
        return self._look() != self._stamp

    def videos(self) -> int:
        """How many videos the units are of."""
        told = (self._file.metadata.metadata or {}).get(VIDEOS)
        return int(told) if told else n_videos(pq.read_table(self._path, columns=["video_id"]))

    def clip_s(self, default: float) -> float:
        """Seconds of its videos that a clip stands for, ``default`` where the plan does not say."""
        told = (self._file.metadata.metadata or {}).get(CLIP_S)
        return float(told) if told else default

    def index(self, unit_id: str) -> int:
        """Raises KeyError for a unit of another plan."""
        at = int(np.searchsorted(self._sorted, np.bytes_(unit_id.encode())))
        if at >= len(self._sorted) or self._sorted[at] != unit_id.encode():
            raise KeyError(unit_id)
        return int(self._order[at])

    def mask(self, unit_ids: Iterable[str]) -> np.ndarray:
        """bool [N]: which units these are; those of other plans are left out."""
        wanted = pa.array(list(unit_ids), pa.string()).cast(pa.binary())
        found = pc.is_in(pa.array(self.unit_ids, pa.binary()), value_set=wanted)
        return np.asarray(found, bool)

    def unit(self, index: int) -> Unit:
        """One unit. Neighbours are read with it. Not for several threads at once."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if group not in self._groups:
            while len(self._groups) >= GROUPS_KEPT:
                del self._groups[next(iter(self._groups))]
            self._groups[group] = self._file.read_row_group(group)
        (row,) = self._groups[group].slice(index - int(self._starts[group]), 1).to_pylist()
        return _unit(row)


def clip_s(table: pa.Table, clips: config.Clips) -> float:
    """Seconds of video that a clip of a plan stands for: from a window's start to the next one's; of spans
    and whole videos their mean length."""
    annotated = clips.policy == "auto" and table["clip_meta"].null_count < len(table)
    if clips.policy == "windows" or (clips.policy == "auto" and not annotated):
        return clips.stride_s
    frames = pc.list_flatten(table["length"])
    return float(pc.mean(frames).as_py()) / clips.sample_fps


def n_videos(table: pa.Table) -> int:
    """How many videos the units of a plan are of."""
    return int(pc.count_distinct(table["video_id"]).as_py())


def ids_array(ids: pa.ChunkedArray) -> np.ndarray:
    """Ids as bytes [N] of one width; without a Python object each where they have one length."""
    if not len(ids):
        return np.zeros(0, "S16")
    whole = pa.concat_arrays(ids.chunks)
    _, offsets_buffer, data = whole.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32)[whole.offset : whole.offset + len(whole) + 1]
    widths = np.unique(np.diff(offsets))
    if len(widths) == 1 and widths[0] > 0:
        return np.frombuffer(data, f"S{widths[0]}", len(whole), int(offsets[0]))
    return whole.to_numpy(zero_copy_only=False).astype("S")


def units_from_table(table: pa.Table) -> list[Unit]:
    """The units of a stored plan, see :func:`units_table`."""
    return [_unit(row) for batch in table.to_batches(1024) for row in batch.to_pylist()]


def _unit(row: dict[str, Any]) -> Unit:
    info = VideoInfo(
        width=row["width"],
        height=row["height"],
        rotation=row["rotation"],
        fps=row["fps"],
        duration_s=row["duration_s"],
        start_s=row["video_start_s"],
        n_frames=row["n_frames"],
        codec=row["codec"],
        pix_fmt=row["pix_fmt"],
        bit_depth=row["bit_depth"],
    )
    blob = Blob(row["path"], row["offset"], row["size"], row["whole_file"])
    video = Video(row["video_id"], row["name"], row["source"], blob, dict(row["meta"]), info)
    fps = row["sample_fps"]
    # Plans of before there were annotations have no such column.
    metas = row.get("clip_meta") or [()] * len(row["first"])
    clips = tuple(
        Clip(clip_id(video.video_id, first, n, fps), video.video_id, first, n, fps, dict(meta))
        for first, n, meta in zip(row["first"], row["length"], metas, strict=True)
    )
    return Unit(row["unit_id"], video, clips, row["cost_s"])
