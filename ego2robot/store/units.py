"""The plan as a table: units of work to rows and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ego2robot.store import schema
from ego2robot.types import Blob, Clip, Unit, Video, VideoInfo, clip_id


def units_table(units: Sequence[Unit]) -> pa.Table:
    """Units as rows of ``schema.UNITS``."""
    rows = []
    for unit in units:
        video, info = unit.video, unit.video.info
        assert info is not None
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
            }
        )
    return pa.Table.from_pylist(rows, schema=schema.UNITS)


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
    clips = tuple(
        Clip(clip_id(video.video_id, first, n, fps), video.video_id, first, n, fps)
        for first, n in zip(row["first"], row["length"], strict=True)
    )
    return Unit(row["unit_id"], video, clips, row["cost_s"])
