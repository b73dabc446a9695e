"""One unit of a LeRobot export: some consecutive episodes, decoded, encoded and summed up.

Nothing of it depends on another unit, so any process may do any.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ego2robot.errors import VideoError
from ego2robot.export import episode, stats, video
from ego2robot.export.episode import ActionName, Layout, Smooth
from ego2robot.export.files import Limits
from ego2robot.export.footage import Begun, Footage, Row
from ego2robot.export.lerobot_format import VIDEO_KEY, staged_schema, vector_schema, vectors_table
from ego2robot.export.privacy import Privacy
from ego2robot.export.staging import Item, Staging, Task, unwritable
from ego2robot.stages import tracks
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.types import ClipFrames, FrameSpec


@dataclass(frozen=True)
class Order:
    """What was asked for; decides, with the run, every byte that comes out. Pickles."""

    run: Path
    out: Path
    key: str
    fps: int
    spec: FrameSpec
    layout: Layout
    codec: str
    action: ActionName
    smooth: Smooth
    limits: Limits
    privacy: Privacy


def worker(order: Order) -> Callable[[Task], Iterator[Item]]:
    """The work of a child process, or of this one: does one unit after the other."""
    torch.set_num_threads(1)  # one process per core; threads of several would only fight
    return _Worker(order).do


class _Worker:
    def __init__(self, order: Order) -> None:
        self.order = order
        self.run = RunDir.open(order.run)
        self.staging = Staging(order.out, order.key)
        self.footage = Footage(self.run, order.spec)
        self.cover = order.privacy.cover()

    def do(self, task: Task) -> Iterator[Item]:
        """One unit; it is committed when this ends."""
        try:
            yield from self._do(task)
        except OSError as error:
            raise unwritable(self.order.out, error) from None

    def _do(self, task: Task) -> Iterator[Item]:
        order, staging = self.order, self.staging
        rows = staging.rows(task.unit).to_pylist(maps_as_pydicts="lossy")
        followed = self._followed(task.unit, rows)
        staging.path(task.unit, "").parent.mkdir(parents=True, exist_ok=True)
        # Somebody else may be doing this unit too, and be killed in the middle of a file.
        token = secrets.token_hex(4)
        files = video.VideoFiles(
            lambda part: staging.path(task.unit, f"-{token}-{part}.mp4"), order.fps, order.limits
        )
        made = _Made(order)
        number = staging.starts[task.unit] - 1
        with files:
            for read in self.footage.read(rows, dict(task.avoid)):
                if isinstance(read, Begun):
                    yield Item(read.video_id)
                    continue
                row, found = read
                number += 1
                dealt = followed.next(row, self.footage.hands(row)) if followed else None
                if isinstance(found, str):
                    made.failed[number] = found
                else:
                    try:
                        vectors = self._vectors(row, found, dealt)
                    except VideoError as error:
                        made.failed[number] = str(error)
                    else:
                        made.hand_frames += episode.seen(dealt) if dealt else 0
                        made.covered += self.cover(found)
                        made.add(number, found, vectors, files)
                yield Item()
        for suffix, table in made.tables().items():
            atomic.write_parquet(staging.path(task.unit, suffix), table)
        names = [staging.path(task.unit, f"-{token}-{part}.mp4").name for part in range(files.n_files)]
        staging.commit(task.unit, {"videos": names, **made.record()})

    def _followed(self, unit: int, rows: Sequence[Row]) -> episode.Followed | None:
        """Follows hands from where the clips before this unit leave them; None: they are not asked for."""
        order = self.order
        if order.layout.schema == "native":
            return None
        earlier: list[Row] = []
        while unit and len(earlier) < episode.WARM_UP:
            unit -= 1
            earlier = self.staging.rows(unit).to_pylist(maps_as_pydicts="lossy") + earlier
            if earlier[0]["video_id"] != rows[0]["video_id"]:
                break
        before = episode.warm_up(earlier, rows[0], order.fps)
        self.footage.expect([*before, *rows])
        followed = episode.Followed(self.run.config.hands, order.fps, order.spec.width / order.spec.height)
        for row in before:
            followed.next(row, self.footage.hands(row))
        return followed

    def _vectors(self, row: Row, found: ClipFrames, dealt: tracks.Followed | None) -> dict[str, np.ndarray]:
        """The episode's float32 features. Raises VideoError when its dataset has none for it."""
        order = self.order
        if dealt is None:
            source = self.footage.video(row)
            known = episode.trajectory(source, found.times_s, self.run.config.source)
            return episode.native(known, order.layout, f"{row['name']} at {row['start_s']:.1f} s")
        hands, gap = self.footage.hands(row), self.run.config.hands.max_gap
        return episode.of_detected(
            order.layout.schema, found, hands, dealt, order.action, order.smooth, gap, order.fps
        )


class _Made:
    """What a unit adds up to."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._codec = video.CODECS[order.codec]
        self._vectors: list[dict[str, np.ndarray]] = []
        self._rows: list[dict[str, Any]] = []
        self._pixels = stats.PixelHistogram()
        self.failed: dict[int, str] = {}  # row of the plan → why
        self.hand_frames = 0
        self.covered = 0  # frames in which a face was

    def add(
        self, number: int, found: ClipFrames, vectors: dict[str, np.ndarray], files: video.VideoFiles
    ) -> None:
        """Encodes and sums up one episode, row ``number`` of the plan."""
        frames = found.frames_THWC
        mp4 = video.encode_episode(frames.cpu().numpy(), self._order.fps, self._codec)
        segment = files.add(mp4, len(frames))
        pixels = stats.PixelHistogram()
        pixels.add(frames)
        self._pixels.merge(pixels)
        cells: dict[str, Any] = {"row": number, "part": segment.part, "first": segment.first}
        summary = {VIDEO_KEY: pixels.statistics()}
        summary |= {name: stats.vector_statistics(values) for name, values in vectors.items()}
        for feature, values in summary.items():
            cells |= {f"stats/{feature}/{name}": value.tolist() for name, value in values.items()}
        self._rows.append(cells)
        self._vectors.append(vectors)

    def tables(self) -> dict[str, pa.Table]:
        """By suffix: every frame's numbers, and every episode's place and statistics."""
        layout = self._order.layout
        vectors = {
            name: np.concatenate([one[name] for one in self._vectors] or [np.zeros((0, len(columns)))])
            for name, columns in layout.vectors.items()
        }
        return {
            ".frames.parquet": vectors_table(vectors, vector_schema(layout)),
            ".episodes.parquet": pa.Table.from_pylist(self._rows, schema=staged_schema(layout)),
        }

    def record(self) -> dict[str, Any]:
        return {
            "failed": {str(number): reason for number, reason in self.failed.items()},
            "hand_frames": self.hand_frames,
            "covered": self.covered,
            "pixels": self._pixels.counts.tolist(),
            "frames": self._pixels.frames,
        }
