"""Recordings that are single pictures with a time each, not a video stream: VRS files and HOT3D's clips.

They know when each picture was taken, need no keyframes, and have no packets to look at. One backend
serves them all; where the pictures come from is a :class:`Recording`, one module a format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import av
import numpy as np

from ego2robot.blobs import local_blob, read_error
from ego2robot.decode import clip_tar, vrs
from ego2robot.decode.base import FrameBatch
from ego2robot.decode.picture import Batcher
from ego2robot.errors import VideoError
from ego2robot.types import Blob, FrameSpec, VideoInfo

EPSILON_NS = 500  # a picture's time and a due time nearer than this are the same
DEFAULT_FPS = 25.0  # of a single picture


class Recording(Protocol):
    """Pictures in ascending order of time. A context manager that closes what it opened.

    Attributes:
        times_ns: int64 [N], strictly ascending, the recording's own clock.
        rotation: clockwise degrees that make the pictures upright.
        width, height: as stored, pixels.
    """

    times_ns: np.ndarray
    rotation: int
    width: int
    height: int

    def picture(self, index: int) -> np.ndarray | None:
        """uint8 [H, W, 3] RGB or [H, W] grey; None where it is damaged."""

    def close(self) -> None: ...


# By the name that stands for a codec.
OPENERS: dict[str, Callable[[str, Blob], Recording]] = {
    vrs.CODEC: vrs.open_vrs,
    clip_tar.CODEC: clip_tar.open_clip,
}


def kind_of(blob: Blob) -> str | None:
    """The codec of a recording, by its first bytes; None for anything else, and for what cannot be read."""
    return vrs.CODEC if vrs.looks_like(blob) else clip_tar.CODEC if clip_tar.looks_like(blob) else None


def probe(name: str, blob: Blob, codec: str) -> VideoInfo:
    """What the pictures of a recording are.

    Raises:
        VideoError: the package that reads it is missing, or it is damaged, or has no pictures.
    """
    with _opened(name, blob, codec) as recording:
        times = recording.times_ns
        n = len(times)
        first = next((p for i in range(n) if (p := recording.picture(i)) is not None), None)
        if first is None:
            cause = f"none of its {n} pictures can be decoded" if n else "it holds no pictures"
            raise VideoError(name, cause, "re-download the file", "corrupt" if n else "no_video_stream")
        span_s = (int(times[-1]) - int(times[0])) / 1e9
        fps = (n - 1) / span_s if n > 1 else DEFAULT_FPS
        sideways = recording.rotation % 180 != 0
        width, height = recording.width, recording.height
        return VideoInfo(
            width=height if sideways else width,
            height=width if sideways else height,
            rotation=recording.rotation,
            fps=fps,
            duration_s=span_s + 1 / fps,
            start_s=int(times[0]) / 1e9,
            n_frames=n,
            codec=codec,
            pix_fmt="rgb24" if first.ndim == 3 else "gray",
            bit_depth=8,
        )


class _opened:
    """A recording while it is used; a remote one is fetched into the cache first."""

    def __init__(self, name: str, blob: Blob, codec: str) -> None:
        try:
            self._recording = OPENERS[codec](name, local_blob(blob))
        except OSError as error:
            raise read_error(name, error) from None

    def __enter__(self) -> Recording:
        return self._recording

    def __exit__(self, *_: object) -> None:
        self._recording.close()


class Stills:
    """See :class:`ego2robot.decode.base.Backend`. Every picture stands alone: ``fast`` has nothing to
    leave out."""

    name = "stills"
    devices: tuple[str, ...] = ("cpu",)
    planes: tuple[str, ...] = ("rgb",)

    def missing(self) -> str | None:
        return None  # what a format needs is asked when such a file is opened

    def version(self) -> str:
        return vrs.version()

    def refuses(self, info: VideoInfo) -> str | None:
        return None if info.codec in OPENERS else f"is only used for {', '.join(OPENERS)}, not {info.codec}"

    def read(
        self,
        name: str,
        blob: Blob,
        info: VideoInfo,
        times_s: np.ndarray,
        spec: FrameSpec,
        device: str,
        fast: bool = False,
    ) -> Iterator[FrameBatch]:
        if not len(times_s):
            return
        with _opened(name, blob, info.codec) as recording:
            since_ns = recording.times_ns - recording.times_ns[0]
            due_ns = np.round(np.asarray(times_s, np.float64) * 1e9).astype(np.int64)
            shown = np.searchsorted(since_ns, due_ns + EPSILON_NS, side="right") - 1
            end_ns = since_ns[-1] + round(1e9 / info.fps)
            batcher = Batcher(name, spec, info)
            held, frame = -1, None
            for index in np.maximum(shown[due_ns + EPSILON_NS < end_ns], 0).tolist():
                if index != held:
                    held, frame = index, _frame(recording.picture(index))
                batch = batcher.add(frame, since_ns[index] / 1e9, frame is None)
                if batch:
                    yield batch
            if rest := batcher.take():
                yield rest


def _frame(picture: np.ndarray | None) -> av.VideoFrame | None:
    if picture is None:
        return None
    return av.VideoFrame.from_ndarray(
        np.ascontiguousarray(picture), format="rgb24" if picture.ndim == 3 else "gray"
    )
