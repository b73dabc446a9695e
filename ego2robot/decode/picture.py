"""From decoded pictures to the frames that every stage shares. The same for every CPU backend, so that
they agree to the last bit of rounding."""

from __future__ import annotations

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter

from ego2robot.decode.base import FrameBatch
from ego2robot.errors import VideoError
from ego2robot.types import FrameSpec, VideoInfo

BATCH = 16
# Box average when shrinking (bilinear when enlarging), rounded exactly, chroma at full resolution.
QUALITY = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# Scaled to planes: swscale writes those with SIMD, packed RGB of this quality without (half as fast).
GBR = (1, 2, 0)


class Scaler:
    """Area-scales pictures of one video into the frames of a spec.

    Colour follows the tags of each picture (BT.601 where there are none, as swscale does).
    """

    def __init__(self, spec: FrameSpec, info: VideoInfo) -> None:
        self.top, self.left, self.height, self.width = spec.content(info.width, info.height)
        self._turns = info.rotation // 90  # clockwise
        # Shrinking and turning by right angles commute; turning the small picture is cheaper.
        sideways = self._turns % 2 == 1
        self._size = (self.height, self.width) if sideways else (self.width, self.height)
        self._reformatter = VideoReformatter()

    def into(self, picture: av.VideoFrame, frame_HWC: np.ndarray) -> None:
        """Draws ``picture`` into ``frame_HWC`` (uint8 RGB [spec.height, spec.width, 3], black before)."""
        width, height = self._size
        small = self._reformatter.reformat(
            picture, width=width, height=height, format="gbrp", interpolation=QUALITY, threads=1
        )
        inside_HWC = frame_HWC[self.top : self.top + self.height, self.left : self.left + self.width]
        for plane, channel in zip(small.planes, GBR, strict=True):
            rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
            inside_HWC[..., channel] = np.rot90(rows[:height, :width], -self._turns)


class Batcher:
    """Collects due frames into batches of at most 16.

    Args:
        name: the video as the user knows it, for messages.
    """

    def __init__(self, name: str, spec: FrameSpec, info: VideoInfo) -> None:
        self._name, self._shape = name, (BATCH, spec.height, spec.width, 3)
        self._scaler = Scaler(spec, info)
        self.first = 0  # index into the due times of the batch's first frame
        self._frames_THWC: np.ndarray | None = None
        self._times: list[float] = []
        self._corrupt: list[bool] = []
        self._last: av.VideoFrame | None = None

    def add(self, picture: av.VideoFrame | None, time_s: float, corrupt: bool) -> FrameBatch | None:
        """Takes the next due frame (None: lost, stays black); returns the batch when it is full."""
        if self._frames_THWC is None:
            self._frames_THWC = np.zeros(self._shape, np.uint8)
        k = len(self._times)
        if k and picture is not None and picture is self._last:  # still on screen: drawn already
            self._frames_THWC[k] = self._frames_THWC[k - 1]
        elif picture is not None:
            try:
                self._scaler.into(picture, self._frames_THWC[k])
            except av.FFmpegError as error:
                cause = f"{picture.format.name} pictures cannot be converted ({error.strerror})"
                raise VideoError(self._name, cause, "re-encode the video", "unsupported") from None
        self._last = picture
        self._times.append(time_s)
        self._corrupt.append(corrupt)
        return self.take() if k + 1 == BATCH else None

    def take(self) -> FrameBatch | None:
        """What has been collected, None where that is nothing."""
        if self._frames_THWC is None:
            return None
        n = len(self._times)
        batch = FrameBatch(
            self.first,
            torch.from_numpy(self._frames_THWC[:n]),
            np.array(self._times),
            np.array(self._corrupt),
        )
        self.first += n
        self._frames_THWC, self._times, self._corrupt, self._last = None, [], [], None
        return batch
