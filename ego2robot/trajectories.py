"""Trajectories as reward models are trained on them: a few frames, what was done, and an action for each.

A trajectory is a whole video, or a span of one where the dataset annotates spans. The form is that of the RFM
and Robometer projects (``dataset_upload/dataset_guides/EgoDex.md`` there): frames of 256 x 256, at most 32 of
them, evenly by linear interpolation of their numbers; actions are positions of both hands, both index finger
tips and the camera, 15 numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import av
import numpy as np
import torch
from torch.nn import functional as F

from ego2robot import config
from ego2robot.blobs import read_error
from ego2robot.decode import policy, probe, stills
from ego2robot.decode.pyav import packet_times
from ego2robot.errors import UserError, VideoError
from ego2robot.sources import SOURCES, Candidate
from ego2robot.sources.base import identity
from ego2robot.types import SIDES, Blob, FrameSpec, Span, Trajectory, Video, VideoInfo, short_id

# Columns of a dataset's own state that make the guide's actions: left hand, right hand, both index finger
# tips, camera; metres.
ACTION_NAMES = tuple(
    f"{point}.{axis}"
    for point in (*(f"{s}.wrist" for s in SIDES), *(f"{s}.index_tip" for s in SIDES), "camera")
    for axis in "xyz"
)
SIZE, MAX_FRAMES = 256, 32
EPSILON_S = 0.5e-6  # of a span's ends
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What of a dataset becomes trajectories, and how.

    Attributes:
        kind: of the source, such as ``egodex``.
        max_frames: of a trajectory; None: all.
        size: height and width of the frames, pixels; what is not square is stretched.
        shortest_edge: pixels, instead of ``size``; what is not square keeps its form.
        frame: of the dataset's poses. ``world`` is what the guide's code computes.
        annotations: the dataset's annotation file, where it does not lie with the videos.
        blur_faces: cover the faces that are found.
    """

    kind: str = "egodex"
    max_frames: int | None = MAX_FRAMES
    size: int = SIZE
    shortest_edge: int | None = None
    frame: Literal["world", "camera"] = "world"
    annotations: str = ""
    blur_faces: bool = False

    def spec(self, info: VideoInfo) -> FrameSpec:
        """The frames of a video: even numbers of pixels, as encoders need them."""
        if self.shortest_edge is None:
            return FrameSpec(self.size, self.size, "stretch")
        scale = self.shortest_edge / min(info.height, info.width)
        height, width = (2 * max(1, math.ceil(int(side * scale) / 2)) for side in (info.height, info.width))
        return FrameSpec(height, width, "stretch")

    def looked_at(self, info: VideoInfo) -> FrameSpec:
        """The frames that faces are looked for in: as high as :meth:`spec`'s, in the form of the picture."""
        height = self.spec(info).height
        return FrameSpec(height, max(32, 2 * round(height * info.width / info.height / 2)), "stretch")

    def options(self, path: str) -> config.Source:
        """The choice as the ``source`` of a recipe. Raises UserError where there is no such source."""
        tree = {"kind": self.kind, "path": path, "frame": self.frame, "annotations": self.annotations}
        return config.build({"source": tree}, "trajectories").source


@dataclass(frozen=True)
class Episode:
    """What becomes one trajectory; nobody has looked inside yet."""

    candidate: Candidate
    span: Span | None = None

    @property
    def name(self) -> str:
        if self.span is None:
            return self.candidate.name
        return f"{self.candidate.name} [{self.span.start_s:.2f}–{self.span.end_s:.2f} s]"


@dataclass(frozen=True)
class TaskTrajectory:
    """One trajectory; its attributes can be asked for by key too, as the guide does.

    Attributes:
        id: 16 hex digits, of the video's bytes and the span.
        task: what is done, in words; empty where the dataset does not say.
        frames: uint8 RGB [T, height, width, 3], see :class:`Choice`.
        actions: float32 [T, A], one for each frame: :data:`ACTION_NAMES` where the dataset knows them, else
            its own actions, else A = 0. NaN where unknown.
        action_names: of the columns.
        times_s: float64 [T], of the frames, seconds from the video's first.
        fps: frames/s of the video that the frames are from.
        source: the kind of source; ``name``: the video, and the span where it is one.
        task_name: a short name of the task, by which such trajectories belong together.
        is_robot: whether a robot is seen. False for people.
        quality_label: ``successful``: that is taken for granted, as the guide does.
        preference_group_id, preference_rank: of comparisons between trajectories; these have none.
        meta: the source's own fields.
        covered: in how many frames faces were covered; None: none were looked for.
    """

    id: str
    task: str
    frames: np.ndarray
    actions: np.ndarray
    action_names: tuple[str, ...]
    times_s: np.ndarray
    fps: float
    source: str
    name: str
    task_name: str
    is_robot: bool = False
    quality_label: str = "successful"
    preference_group_id: str | None = None
    preference_rank: int | None = None
    meta: dict[str, str] = field(default_factory=dict)
    covered: int | None = None

    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)


def iter_trajectories(
    path: str,
    dataset: str = "egodex",
    max_trajectories: int | None = None,
    max_frames: int | None = MAX_FRAMES,
    *,
    start_after: str | None = None,
    frame: Literal["world", "camera"] = "world",
    size: int = SIZE,
    annotations: str = "",
    blur_faces: bool = False,
    on_error: Callable[[VideoError], None] | None = None,
) -> Iterator[TaskTrajectory]:
    """The trajectories of a dataset, one in memory at a time, in a stable order.

    Args:
        path: of the dataset, as ``source.path``.
        dataset: the kind of source.
        max_trajectories: stop after so many.
        max_frames: of each; None: all frames.
        start_after: the ``id`` of a trajectory: begin with the next one. Those before it are not decoded,
            but their ids are looked up (1 MiB of each is read).
        frame, size, annotations, blur_faces: see :class:`Choice`.
        on_error: told what could not be used; None: it is logged, as a warning.

    Raises:
        UserError: nothing of that kind is there, or no trajectory has the id ``start_after``.
    """
    choice = Choice(dataset, max_frames, size, None, frame, annotations, blur_faces)
    tell = on_error or (lambda error: log.warning("%s", error))
    given, waiting = 0, start_after is not None
    for found in episodes(path, choice):
        if max_trajectories is not None and given >= max_trajectories:
            return
        if isinstance(found, VideoError):
            if not waiting:
                tell(found)
            continue
        try:
            if waiting:
                waiting = episode_id(found) != start_after
                continue
            trajectory = read(found, path, choice)
        except VideoError as error:
            if not waiting:
                tell(error)
            continue
        given += 1
        yield trajectory
    if waiting:
        raise UserError(f"{path}: no trajectory has the id {start_after!r}; ids change with a video's bytes")


def episodes(path: str, choice: Choice) -> Iterator[Episode | VideoError]:
    """What a dataset lists, in its order: each annotated span, or the whole video where there is none."""
    options = choice.options(path)
    if options.kind not in SOURCES:
        raise UserError(f"source {options.kind!r} is not there yet (sources: {', '.join(SOURCES)})")
    for found in SOURCES[options.kind].candidates(path, None, options):
        if isinstance(found, VideoError):
            yield found
        elif found.spans:
            for span in sorted(found.spans, key=lambda s: (s.start_s, s.end_s)):
                yield Episode(found, span)
        else:
            yield Episode(found)


def episode_id(episode: Episode) -> str:
    """16 hex digits, of the video's bytes and the span. Raises VideoError where it cannot be read."""
    try:
        video_id = identity(episode.candidate.blob)
    except OSError as error:
        cause = error.strerror or str(error)
        raise VideoError(episode.candidate.name, cause, "check the file", "missing") from None
    if episode.span is None:
        return video_id
    ends = (round(1e6 * s) for s in (episode.span.start_s, episode.span.end_s))
    return short_id("trajectory", video_id, *ends)


def read(episode: Episode, path: str, choice: Choice) -> TaskTrajectory:
    """Decodes the frames of an episode and looks up what the dataset knows of them.

    Raises:
        VideoError: it cannot be decoded, is damaged where a frame is due, or has no frame at all.
    """
    candidate, span = episode.candidate, episode.span
    found = episode_id(episode)
    info, times_s = _looked_at(candidate.name, candidate.blob)
    times_s = chosen_times(episode, times_s, choice.max_frames)
    covered = None
    if choice.blur_faces:
        frames, covered = _without_faces(_frames(episode, info, times_s, choice.looked_at(info)))
        frames = _resized(frames, choice.spec(info))
    else:
        frames = _frames(episode, info, times_s, choice.spec(info))
    meta = {**candidate.meta, **(span.meta if span else {})}
    video = Video(found, candidate.name, choice.kind, candidate.blob, candidate.meta, info)
    known = SOURCES[choice.kind].trajectory(video, times_s, choice.options(path))
    names, actions = _actions(known, len(times_s))
    return TaskTrajectory(
        id=found,
        task=meta.get("task", ""),
        frames=frames,
        actions=actions,
        action_names=names,
        times_s=times_s,
        fps=info.fps,
        source=choice.kind,
        name=episode.name,
        task_name=meta.get("task_name") or meta.get("task", ""),
        is_robot=choice.kind == "lerobot",
        meta=meta,
        covered=covered,
    )


def chosen(n: int, max_frames: int | None) -> np.ndarray:
    """Which of ``n`` frames are kept: int [at most max_frames], ascending; all where they are so few.

    Numbers from 0 to n - 1 in equal steps, rounded down, as RFM's and Robometer's ``downsample_frames``.
    """
    if max_frames is None or n <= max_frames:
        return np.arange(n)
    return np.unique(np.linspace(0, n - 1, max_frames, dtype=int))


def chosen_times(episode: Episode, times_s: np.ndarray, max_frames: int | None) -> np.ndarray:
    """When the kept frames of an episode are shown: float64 [T], of the video's ``times_s`` [N], ascending.

    Raises:
        VideoError: no frame lies in its span.
    """
    if span := episode.span:
        times_s = times_s[(times_s >= span.start_s - EPSILON_S) & (times_s < span.end_s - EPSILON_S)]
    if not len(times_s):
        raise VideoError(episode.name, "no frame in it", "check the annotation", "too_short")
    return times_s[chosen(len(times_s), max_frames)]


@lru_cache(maxsize=2)  # spans of one video follow each other
def _looked_at(name: str, blob: Blob) -> tuple[VideoInfo, np.ndarray]:
    """What a video is, and when its frames are shown: float64 [N], ascending, seconds from the first.

    Counted are the frames that the file really has, not those that its headers promise.
    """
    info = probe(name, blob)
    if stills.kind_of(blob):
        return info, np.arange(info.n_frames) / info.fps
    try:
        times_s = np.unique(packet_times(name, blob)) - info.start_s
    except (av.FFmpegError, OSError) as error:
        raise read_error(name, error) from None
    return info, times_s[times_s >= -EPSILON_S].clip(min=0)


def _frames(episode: Episode, info: VideoInfo, times_s: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """uint8 RGB [T, spec.height, spec.width, 3], one decoding pass."""
    candidate = episode.candidate
    backend, _ = policy.pick(info, "auto", "cpu")
    frames_THWC = np.empty((len(times_s), spec.height, spec.width, 3), np.uint8)
    n = 0
    for batch in backend.read(candidate.name, candidate.blob, info, times_s, spec, "cpu"):
        if batch.corrupt.any():
            at = times_s[batch.first + int(batch.corrupt.argmax())]
            raise VideoError(episode.name, f"damaged at {at:.1f} s", "download it again", "corrupt")
        n = batch.first + len(batch.times_s)
        frames_THWC[batch.first : n] = batch.frames_THWC.numpy()
    if n < len(times_s):
        cause = f"ends before {times_s[n]:.1f} s"
        raise VideoError(episode.name, cause, "download it again", "truncated")
    return frames_THWC


@lru_cache(maxsize=1)
def _face_net() -> Any:
    from ego2robot.export import privacy

    return privacy.face_net()


def _without_faces(frames_THWC: np.ndarray) -> tuple[np.ndarray, int]:
    """Covers faces in place; in how many frames."""
    from ego2robot.export import privacy

    _, covered = privacy.blur_faces(torch.from_numpy(frames_THWC), _face_net())
    return frames_THWC, covered


def _resized(frames_THWC: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """uint8 RGB [T, spec.height, spec.width, 3], area-averaged as far as frames get smaller."""
    frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
    size = spec.height, spec.width
    scaled_TCHW = F.interpolate(frames_TCHW, size, mode="bilinear", antialias=True)
    return scaled_TCHW.permute(0, 2, 3, 1).contiguous().numpy()


def _actions(known: Trajectory | None, n: int) -> tuple[tuple[str, ...], np.ndarray]:
    if known is None:
        return (), np.zeros((n, 0), np.float32)
    if set(ACTION_NAMES) <= set(known.state_names):
        columns = [known.state_names.index(name) for name in ACTION_NAMES]
        return ACTION_NAMES, known.state_TD[:, columns].astype(np.float32)
    return known.action_names, known.action_TA.astype(np.float32)
