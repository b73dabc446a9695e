"""Chosen clips read back: their frames, one pass per video, and their hands out of the run's own rows.

With ``frames.undistort`` both come without the bend of a fisheye camera, where the dataset gives one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ego2robot import cameras, decode, remote
from ego2robot.decode import policy
from ego2robot.errors import UserError, VideoError
from ego2robot.sources.base import identity
from ego2robot.store import schema
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import StoredPlan
from ego2robot.types import Clip, ClipFrames, FrameSpec, Hand, Unit, Video

Row = Mapping[str, Any]  # of choose.CHOSEN
UNITS_KEPT = 64
BATCH_ROWS = 4096  # of landmarks, that are read at once


@dataclass(frozen=True)
class Begun:
    """What is read from here on is of this video."""

    video_id: str


class Footage:
    """The clips of a run for whoever exports some of them; keeps a few units and one part of hands.

    From here on this process reads videos that lie afar through a cache of the size of the run's.
    """

    def __init__(self, run: RunDir, spec: FrameSpec) -> None:
        remote.configure(run.config.source.cache_gib)
        self._run, self._spec = run, spec
        self._units: dict[str, Unit] = {}
        self._wanted: frozenset[str] = frozenset()
        self._part: tuple[str, pa.Table] | None = None
        self._straight: tuple[str, cameras.Undistorter | None] | None = None

    @cached_property
    def _plan(self) -> StoredPlan:
        return StoredPlan(self._run.plan_path)

    def video(self, row: Row) -> Video:
        """The video of a chosen clip. Raises VideoError when the run's plan no longer has it."""
        return self._unit(row).video

    def clip(self, row: Row) -> Clip:
        """A chosen clip as it was planned. Raises VideoError when the run's plan no longer has it."""
        for clip in self._unit(row).clips:
            if clip.clip_id == row["clip_id"]:
                return clip
        raise _lost(row)

    def _unit(self, row: Row) -> Unit:
        unit_id = row["unit_id"]
        if unit_id not in self._units:
            if len(self._units) >= UNITS_KEPT:
                del self._units[next(iter(self._units))]
            try:
                self._units[unit_id] = self._plan.unit(self._plan.index(unit_id or ""))
            except KeyError:
                raise _lost(row) from None
        return self._units[unit_id]

    def read(
        self, rows: Sequence[Row], avoid: Mapping[str, str]
    ) -> Iterator[Begun | tuple[Row, ClipFrames | str]]:
        """Each chosen clip once, in storing order, with its frames or the reason why there are none; and
        before a decoder touches a video, :class:`Begun`.

        Args:
            rows: in storing order: those of a video lie together, by start.
            avoid: video_id → why nothing of that video is to be read.
        """
        for video_id, members in groupby(rows, key=lambda row: row["video_id"]):
            group = list(members)
            waiting = {row["clip_id"]: row for row in group}
            reason = avoid.get(video_id, "its frames did not come")
            if video_id not in avoid:
                yield Begun(video_id)
                try:
                    for found in self._decode(group):
                        row = waiting.pop(found.clip.clip_id)
                        if isinstance(found, decode.ClipFailure):
                            yield row, found.reason
                            continue
                        if straighten := self._undistorter(row):
                            found.frames_THWC, found.greys_Thw = straighten(found.frames_THWC), None
                        yield row, found
                except VideoError as error:
                    reason = str(error)
            for row in waiting.values():
                yield row, reason

    def _decode(self, group: Sequence[Row]) -> Iterator[ClipFrames | decode.ClipFailure]:
        clips = [self.clip(row) for row in group]
        source = self.video(group[0])
        assert source.info is not None
        try:
            same = identity(source.blob) == source.video_id
        except OSError as error:
            cause = error.strerror or str(error)
            raise VideoError(source.name, cause, "put it back, then export again", "missing") from None
        if not same:
            raise VideoError(
                source.name, "its bytes have changed since the run", "run on it again", "missing"
            )
        wanted = policy.backends().get(self._run.config.decode.backend)
        on_cpu = wanted.name if wanted and "cpu" in wanted.devices else "auto"
        backend, _ = policy.pick(source.info, on_cpu, "cpu")
        # Decoded as they were when hands were looked for: the landmarks are of these very frames.
        fast = self._run.config.decode.mode == "fast"
        yield from decode.read_clips(
            source.name, source.blob, source.info, clips, self._spec, backend, "cpu", fast
        )

    def _undistorter(self, row: Row) -> cameras.Undistorter | None:
        if not self._run.config.frames.undistort:
            return None
        if self._straight is None or self._straight[0] != row["video_id"]:
            self._straight = row["video_id"], cameras.undistorter(self.video(row).meta, self._spec)
        return self._straight[1]

    def expect(self, rows: Sequence[Row]) -> None:
        """Names the clips whose hands will be asked for; only theirs are held."""
        self._wanted, self._part = frozenset(row["clip_id"] for row in rows), None

    def hand_rows(self, row: Row) -> pa.Table:
        """The detected hands of an expected clip as the run stores them (``schema.HANDS``)."""
        part = row["hands"]
        if part is None:
            return schema.HANDS.empty_table()
        if self._part is None or self._part[0] != part:
            path = self._run.path / part
            try:
                table = self._wanted_of(path)
            except (OSError, pa.ArrowException) as error:
                cause = " ".join(str(error).split())
                raise UserError(f"{path}: cannot be read ({cause}); run `ego2robot repair`") from None
            self._part = (part, table)
        table = self._part[1]
        found = table.filter(pc.equal(table["clip_id"], row["clip_id"]))
        straighten = self._undistorter(row)
        return straightened(found, straighten) if straighten and len(found) else found

    def _wanted_of(self, path: Path) -> pa.Table:
        """The rows of the expected clips; a part may hold many more, which are not held."""
        wanted, found = pa.array(sorted(self._wanted), pa.string()), []
        with pq.ParquetFile(path, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(BATCH_ROWS):
                some = batch.filter(pc.is_in(batch["clip_id"], value_set=wanted))
                if some.num_rows:
                    found.append(some)
        return pa.Table.from_batches(found, schema=schema.HANDS)

    def hands(self, row: Row) -> list[Hand]:
        """The detected hands of an expected clip, by frame and side."""
        found = []
        for hand in self.hand_rows(row).to_pylist():
            landmarks, world = (
                np.asarray(hand[k], np.float32).reshape(-1, 3) for k in ("landmarks", "world")
            )
            box = np.asarray(hand["box"], np.float32)
            found.append(
                Hand(hand["frame"], hand["side"], hand["score"], box, landmarks, world, hand["presence"])
            )
        return sorted(found, key=lambda hand: (hand.frame, hand.side))


def straightened(hands: pa.Table, straighten: cameras.Undistorter) -> pa.Table:
    """Rows of ``schema.HANDS`` as they lie in undistorted frames: landmarks moved, boxes drawn around where
    their outline went. A hand of which a part is where no undistorted picture reaches is left out."""
    landmarks = np.asarray(hands["landmarks"].to_pylist(), np.float64).reshape(len(hands), -1, 3)
    boxes = np.asarray(hands["box"].to_pylist(), np.float64)
    landmarks[..., :2] = straighten.points(landmarks[..., :2])
    left, top, right, bottom = (boxes[:, i] for i in range(4))
    x, y = (left + right) / 2, (top + bottom) / 2
    corners = [(left, top), (x, top), (right, top), (right, y), (right, bottom), (x, bottom), (left, bottom)]
    outline = straighten.points(np.stack([np.stack(c, -1) for c in (*corners, (left, y))], 1))
    boxes = np.concatenate([outline.min(1), outline.max(1)], -1)
    seen = np.isfinite(landmarks).all((1, 2)) & np.isfinite(boxes).all(1)
    for name, values in (("box", boxes), ("landmarks", landmarks.reshape(len(hands), -1))):
        field = hands.schema.field(name)
        flat = pa.array(np.nan_to_num(values).astype(np.float32).ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, values.shape[1]).cast(field.type)
        hands = hands.set_column(hands.schema.get_field_index(name), field, column)
    return hands.filter(pa.array(seen))


def _lost(row: Row) -> VideoError:
    return VideoError(row["name"], "the run's plan does not have it any more", "export again", "missing")
