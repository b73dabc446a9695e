"""Pictures of clips, taken from the source videos when the report is written."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from PIL import Image

from ego2robot.blobs import container_size
from ego2robot.decode import policy
from ego2robot.errors import VideoError
from ego2robot.report import Progress
from ego2robot.store.rundir import RunDir
from ego2robot.types import N_LANDMARKS, Blob, FrameSpec, VideoInfo

SPEC = FrameSpec(height=216, width=384)
QUALITY = 72  # of WebP: 6–14 kB a picture


@dataclass(frozen=True)
class DrawnHand:
    side: str
    landmarks_xy: np.ndarray  # float64 [21, 2], shares of the pipeline's frame


@dataclass(frozen=True)
class Shot:
    """A picture that is wanted."""

    clip_id: str
    video_id: str
    time_s: float  # relative to the video's first frame
    hands: tuple[DrawnHand, ...] = ()


@dataclass(frozen=True)
class Thumbnail:
    """A picture, or why there is none. The picture has no letterbox bars.

    Attributes:
        width, height: pixels.
        webp: the file's bytes; None when the frame could not be read.
        problem: why not, on one line.
        hands: side and float64 [21, 2] in pixels of this picture.
    """

    width: int
    height: int
    webp: bytes | None
    problem: str | None
    hands: tuple[tuple[str, np.ndarray], ...] = ()

    @property
    def uri(self) -> str | None:
        if self.webp is None:
            return None
        return "data:image/webp;base64," + base64.b64encode(self.webp).decode()


def videos(run: RunDir, video_ids: Sequence[str]) -> dict[str, tuple[str, Blob, VideoInfo]]:
    """Name, bytes and headers of some videos, as the plan has them."""
    path = run.path / "plan" / "units.parquet"
    if not path.is_file() or not video_ids:
        return {}
    found = {}
    chosen = ds.field("video_id").isin(list(video_ids))
    for batch in ds.dataset(path, format="parquet").to_batches(filter=chosen):
        for row in batch.to_pylist():
            found[row["video_id"]] = (
                row["name"],
                Blob(row["path"], row["offset"], row["size"], row["whole_file"]),
                VideoInfo(
                    row["width"], row["height"], row["rotation"], row["fps"], row["duration_s"],
                    row["video_start_s"], row["n_frames"], row["codec"], row["pix_fmt"], row["bit_depth"],
                ),
            )  # fmt: skip
    return found


def shot(clip: Mapping[str, object], hands: pa.Table | None, sample_fps: float) -> Shot:
    """The frame to show of a clip: one with as many hands as any, nearest to the middle.

    Args:
        clip: ``clip_id``, ``video_id``, ``start_s`` and ``n_frames`` of its row.
        hands: the clip's rows of ``hands``; None or empty: the middle frame.
    """
    clip_id, video_id = str(clip["clip_id"]), str(clip["video_id"])
    middle = int(str(clip["n_frames"])) // 2
    if hands is None or not hands.num_rows:
        return Shot(clip_id, video_id, float(str(clip["start_s"])) + middle / sample_fps)
    frames = hands["frame"].to_numpy()
    index, counts = np.unique(frames, return_counts=True)
    best = index[np.lexsort((np.abs(index - middle), -counts))[0]]
    rows = hands.filter(pa.array(frames == best)).to_pylist()
    drawn = tuple(
        DrawnHand(row["side"], np.asarray(row["landmarks"], np.float64).reshape(N_LANDMARKS, 3)[:, :2])
        for row in rows
    )
    return Shot(clip_id, video_id, float(rows[0]["time_s"]), drawn)


def take(
    shots: Sequence[Shot],
    sources: Mapping[str, tuple[str, Blob, VideoInfo]],
    frames: FrameSpec,
    progress: Progress | None = None,
) -> dict[str, Thumbnail]:
    """Reads the wanted frames, each video once, several videos at a time.

    Args:
        sources: see :func:`videos`.
        frames: the pipeline's own picture, to whose sides landmarks are relative.
        progress: called with (pictures done, pictures wanted).

    Returns:
        Clip id to its picture; a frame that cannot be read has a ``problem`` instead.

    Raises:
        UserError: no decoder is installed.
    """
    groups: dict[str, list[Shot]] = {}
    for one in shots:
        groups.setdefault(one.video_id, []).append(one)
    found: dict[str, Thumbnail] = {}
    if not groups:
        return found
    # libav lets go of the interpreter while it decodes, so threads do run side by side.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1, len(groups))) as pool:
        jobs = [pool.submit(_of_video, group, sources.get(key), frames) for key, group in groups.items()]
        for job in as_completed(jobs):
            found |= job.result()
            if progress is not None:
                progress(len(found), len(shots))
    return found


def _of_video(
    shots: Sequence[Shot], source: tuple[str, Blob, VideoInfo] | None, frames: FrameSpec
) -> dict[str, Thumbnail]:
    if source is None:
        return {one.clip_id: _missing("the plan does not name this video") for one in shots}
    name, blob, info = source
    problem = _gone(blob)
    if problem:
        return {one.clip_id: _missing(problem) for one in shots}
    times = np.unique([one.time_s for one in shots])
    wanted: dict[float, list[Shot]] = {}
    for one in shots:
        wanted.setdefault(one.time_s, []).append(one)
    found: dict[str, Thumbnail] = {}
    problem = "the stream ends before this clip"
    try:
        # The report only needs a picture: whatever backend is best here will do.
        backend, _ = policy.pick(info, "auto", "cpu")
        for batch in backend.read(name, blob, info, times, SPEC, "cpu"):
            for i, frame_HWC in enumerate(batch.frames_THWC.numpy()):
                for one in wanted[float(times[batch.first + i])]:
                    found[one.clip_id] = _thumbnail(frame_HWC, one, info, frames)
    except VideoError as error:
        problem = error.cause
    return {one.clip_id: found.get(one.clip_id) or _missing(problem) for one in shots}


def _gone(blob: Blob) -> str | None:
    """Why the bytes are not what they were when the run was planned, or None."""
    try:
        size = container_size(blob)
    except OSError as error:
        return f"source video not readable now: {error.strerror}"
    if (blob.whole_file and size != blob.size) or size < blob.offset + blob.size:
        return "source video changed since the run"
    return None


def _thumbnail(frame_HWC: np.ndarray, one: Shot, info: VideoInfo, frames: FrameSpec) -> Thumbnail:
    top, left, height, width = SPEC.content(info.width, info.height)
    file = io.BytesIO()
    picture = np.ascontiguousarray(frame_HWC[top : top + height, left : left + width])
    Image.fromarray(picture).save(file, "WEBP", quality=QUALITY, method=4)
    hands = []
    for hand in one.hands:
        top_, left_, height_, width_ = frames.content(info.width, info.height)
        xy = (hand.landmarks_xy * (frames.width, frames.height) - (left_, top_)) / (width_, height_)
        if np.isfinite(xy).all():
            hands.append((hand.side, xy * (width, height)))
    return Thumbnail(width, height, file.getvalue(), None, tuple(hands))


def _missing(problem: str) -> Thumbnail:
    return Thumbnail(SPEC.width, SPEC.height, None, problem)
