"""Frames out of videos: one module a backend, one policy that picks, one pass for all clips."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ego2robot.blobs import read_error
from ego2robot.decode.base import Backend, FrameBatch
from ego2robot.decode.probe import probe
from ego2robot.remote import RemoteError
from ego2robot.types import Blob, Clip, ClipFrames, FrameSpec, VideoInfo

__all__ = ["Backend", "ClipFailure", "FrameBatch", "probe", "read_clips"]


@dataclass(frozen=True)
class ClipFailure:
    """A clip that cannot be used, and why: ``corrupt frames at 12.3 s``."""

    clip: Clip
    reason: str


@dataclass
class _Open:
    """A clip that is being filled."""

    clip: Clip
    frames_THWC: torch.Tensor | None = None
    greys_Thw: torch.Tensor | None = None
    times_s: list[float] = field(default_factory=list)
    damaged_at: float | None = None


def read_clips(
    name: str,
    blob: Blob,
    info: VideoInfo,
    clips: Sequence[Clip],
    spec: FrameSpec,
    backend: Backend,
    device: str,
    fast: bool = False,
) -> Iterator[ClipFrames | ClipFailure]:
    """Decodes some clips of a video in one pass; clips that overlap share their frames.

    Args:
        name: the video as the user knows it, for messages.
        clips: in ascending order of ``first``, all on one grid.
        device: where the frames are wanted; a backend that cannot leave them there hands them over
            from the CPU.
        fast: as of :meth:`Backend.read`.

    Yields:
        One answer per clip, in the order given, as soon as it and those before it are complete. Frames
        are contiguous and the clip's own. Not more is held than the clips that overlap at one time.

    Raises:
        ValueError: the clips are not in order, empty, or not on one grid.
        VideoError: nothing of the video can be decoded.
    """
    if not clips:
        return
    sample_fps = clips[0].sample_fps
    if any(clip.sample_fps != sample_fps or clip.n_frames < 1 for clip in clips):
        raise ValueError("clips of one pass have frames, and one sample_fps")
    if any(a.first > b.first for a, b in itertools.pairwise(clips)):
        raise ValueError("clips of one pass are in ascending order")

    grid = np.unique(np.concatenate([np.arange(clip.grid.start, clip.grid.stop) for clip in clips]))
    content = spec.content(info.width, info.height)
    where = device if device.partition(":")[0] in backend.devices else "cpu"
    waiting = deque(clips)
    filling: deque[_Open] = deque()
    for batch in _read(backend, name, blob, info, grid / sample_fps, spec, where, fast):
        frames_THWC = batch.frames_THWC.to(device)
        greys_Thw = None if batch.greys_Thw is None else batch.greys_Thw.to(device)
        for k, time_s in enumerate(batch.times_s.tolist()):
            due = int(grid[batch.first + k])
            while waiting and waiting[0].first <= due:
                filling.append(_Open(waiting.popleft()))
            for clip in filling:
                if due in clip.clip.grid:
                    grey_hw = None if greys_Thw is None else greys_Thw[k]
                    _fill(clip, frames_THWC[k], grey_hw, time_s, bool(batch.corrupt[k]))
            while filling and due + 1 >= filling[0].clip.grid.stop:
                yield _close(filling.popleft(), content)
    for left in (*filling, *(_Open(clip) for clip in waiting)):
        if left.damaged_at is not None or len(left.times_s) == left.clip.n_frames:
            yield _close(left, content)
        else:
            lacking = (left.clip.first + len(left.times_s)) / sample_fps
            yield ClipFailure(left.clip, f"the stream ends before {lacking:.1f} s")


def _read(backend: Backend, name: str, *args: Any) -> Iterator[FrameBatch]:
    try:
        yield from backend.read(name, *args)
    except RemoteError as error:
        raise read_error(name, error) from None


def _fill(
    clip: _Open, frame_HWC: torch.Tensor, grey_hw: torch.Tensor | None, time_s: float, corrupt: bool
) -> None:
    if clip.damaged_at is not None:
        return
    if corrupt:
        clip.damaged_at, clip.frames_THWC, clip.greys_Thw = time_s, None, None
        return
    if clip.frames_THWC is None:
        clip.frames_THWC = frame_HWC.new_empty((clip.clip.n_frames, *frame_HWC.shape))
        if grey_hw is not None:
            clip.greys_Thw = grey_hw.new_empty((clip.clip.n_frames, *grey_hw.shape))
    clip.frames_THWC[len(clip.times_s)] = frame_HWC
    if clip.greys_Thw is not None:
        assert grey_hw is not None  # a backend makes them for all frames of a video, or for none
        clip.greys_Thw[len(clip.times_s)] = grey_hw
    clip.times_s.append(time_s)


def _close(clip: _Open, content: tuple[int, int, int, int]) -> ClipFrames | ClipFailure:
    if clip.damaged_at is not None or clip.frames_THWC is None:
        return ClipFailure(clip.clip, f"corrupt frames at {clip.damaged_at:.1f} s")
    return ClipFrames(clip.clip, clip.frames_THWC, np.array(clip.times_s), content, clip.greys_Thw)
