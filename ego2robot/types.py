"""The nouns of the project. Plain frozen dataclasses that pickle; no logic beyond derived values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

Side = Literal["left", "right"]
Decision = Literal["kept", "dropped", "failed"]
SIDES: tuple[Side, Side] = ("left", "right")
N_LANDMARKS = 21


@dataclass(frozen=True)
class Blob:
    """The bytes of one video: a whole file, or a byte range of one (a tar member, never extracted)."""

    path: str
    offset: int
    size: int
    whole_file: bool = True


@dataclass(frozen=True)
class VideoInfo:
    """What the headers of a video say, as displayed (rotation applied to ``width`` and ``height``)."""

    width: int
    height: int
    rotation: int  # clockwise degrees to apply for display: 0, 90, 180, 270
    fps: float  # average frame rate, frames/s
    duration_s: float  # from the first to the end of the last frame
    start_s: float  # presentation time of the first frame; grid times are relative to it
    n_frames: int  # as the container says, else estimated
    codec: str  # ffmpeg's name: h264, hevc, vp9, av1 …
    pix_fmt: str
    bit_depth: int


@dataclass(frozen=True)
class Video:
    """One video of a source. ``video_id`` names its bytes, whatever the file is called."""

    video_id: str  # 16 hex digits
    name: str  # what the user would call it; shown, never opened
    source: str  # the kind of source that found it
    blob: Blob
    meta: Mapping[str, str] = field(default_factory=dict)
    info: VideoInfo | None = None


@dataclass(frozen=True)
class Span:
    """A part of a video that its dataset annotates, seconds from the video's first frame.

    Attributes:
        meta: the annotation's own fields; ``task`` is what happens, in words.
    """

    start_s: float
    end_s: float
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """What a dataset itself knows at some moments of a video: poses, gaze, robot states.

    Attributes:
        state_TD: float32 [T, D], NaN where unknown.
        action_TA: float32 [T, A], NaN where unknown; A may be 0.
        state_names, action_names: of the columns, such as ``left.wrist.x``.
        units: of the columns, for people: ``metres in the camera's frame (x right, y down, z forward)``.
    """

    state_TD: np.ndarray
    action_TA: np.ndarray
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    units: str


@dataclass(frozen=True)
class FrameSpec:
    """The picture every consumer shares: ``height`` x ``width`` RGB, area-scaled.

    ``letterbox`` keeps the aspect ratio and pads with black; ``stretch`` does not (the reference).
    """

    height: int = 360
    width: int = 640
    fit: Literal["letterbox", "stretch"] = "letterbox"

    def content(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Where a ``width`` x ``height`` picture lies inside the frame: (top, left, height, width).

        All four are even, so that chroma-subsampled planes can be addressed too.
        """
        if self.fit == "stretch":
            return 0, 0, self.height, self.width
        scale = min(self.width / width, self.height / height)
        w = min(self.width, max(2, 2 * round(width * scale / 2)))
        h = min(self.height, max(2, 2 * round(height * scale / 2)))
        top, left = (self.height - h) // 4 * 2, (self.width - w) // 4 * 2
        return top, left, h, w


@dataclass(frozen=True)
class Clip:
    """A span of a video on the frame grid. Frame ``i`` of the grid is due at ``i / sample_fps`` s."""

    clip_id: str  # 16 hex digits
    video_id: str
    first: int  # grid index of the first frame
    n_frames: int
    sample_fps: float
    meta: Mapping[str, str] = field(default_factory=dict, compare=False)  # of its annotation, such as task

    @property
    def start_s(self) -> float:
        return self.first / self.sample_fps

    @property
    def end_s(self) -> float:
        return (self.first + self.n_frames) / self.sample_fps

    @property
    def grid(self) -> range:
        return range(self.first, self.first + self.n_frames)


@dataclass(frozen=True)
class Unit:
    """A piece of work: some clips of one video, decoded in one pass."""

    unit_id: str  # 16 hex digits
    video: Video
    clips: tuple[Clip, ...]
    cost_s: float  # estimated seconds of decoding


@dataclass
class ClipFrames:
    """The frames of one clip, on one device.

    Attributes:
        frames_THWC: uint8 RGB [T, H, W, 3].
        times_s: float64 [T], real presentation times relative to the video's first frame.
        content: (top, left, height, width) of the picture inside the frame.
        greys_Thw: uint8 [T, 90, 160], the grey pictures of ``ego2robot_kernels.camera.small_greys``, where
            the decoder made them on its way.
    """

    clip: Clip
    frames_THWC: torch.Tensor
    times_s: np.ndarray
    content: tuple[int, int, int, int]
    greys_Thw: torch.Tensor | None = None


@dataclass(frozen=True)
class Hand:
    """One detected hand in one frame; coordinates are shares of the frame's width and height."""

    frame: int  # index within the clip
    side: Side  # the person's own left or right
    score: float  # of the side, 0..1
    box: np.ndarray  # float32 [4]: x_min, y_min, x_max, y_max
    landmarks: np.ndarray  # float32 [21, 3]: shares of the frame (may lie just outside), z from the wrist
    world: np.ndarray  # float32 [21, 3]: metres, origin at the hand's centre
    presence: float = 1.0  # score of the landmark network that there is a hand, 0..1


def short_id(*parts: object) -> str:
    """16 hex digits that name ``parts`` (blake2b of their text, separated)."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def clip_id(video_id: str, first: int, n_frames: int, sample_fps: float) -> str:
    """The id of a clip: the video's identity and the span in microseconds, nothing else."""
    start, end = (round(1e6 * i / sample_fps) for i in (first, first + n_frames))
    return short_id("clip", video_id, start, end)
