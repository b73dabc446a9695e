"""Decoding with torchcodec. Its wheel brings no FFmpeg: it takes the system's, else PyAV's.

Frames come at full size and are scaled like everyone else's. The whole file is indexed first, because
only that finds the right frame at a variable rate. torchcodec does not report damage that the decoder
concealed: only frames that it fails on are marked.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Iterator
from functools import cache
from typing import Any

import av
import numpy as np

from ego2robot.decode.base import FrameBatch
from ego2robot.decode.ffmpeg_names import share_pyav_ffmpeg
from ego2robot.decode.picture import Batcher
from ego2robot.decode.pyav import EPSILON_S, container_of, locator
from ego2robot.errors import VideoError
from ego2robot.types import Blob, FrameSpec, VideoInfo

GROUP = 4  # full-size frames held at once


@cache
def _missing() -> str | None:
    try:
        importlib.metadata.version("torchcodec")
    except importlib.metadata.PackageNotFoundError:
        return "not installed: pip install torchcodec"
    trouble = _loading_fails()
    if trouble and "libav" in trouble and share_pyav_ffmpeg():
        trouble = _loading_fails()
    if trouble is None:
        return None
    if "libav" in trouble:
        return "finds no FFmpeg libraries (versions 4 to 8): apt install ffmpeg"
    return f"does not load beside this torch ({trouble.splitlines()[0]})"


def _loading_fails() -> str | None:
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).strip() or type(error).__name__
    return None


class TorchCodec:
    """See :class:`ego2robot.decode.base.Backend`."""

    name = "torchcodec"
    devices: tuple[str, ...] = ("cpu",)
    planes: tuple[str, ...] = ("rgb",)

    def missing(self) -> str | None:
        return _missing()

    def version(self) -> str:
        return importlib.metadata.version("torchcodec")

    def refuses(self, info: VideoInfo) -> str | None:
        return None

    def read(
        self, name: str, blob: Blob, info: VideoInfo, times_s: np.ndarray, spec: FrameSpec, device: str
    ) -> Iterator[FrameBatch]:
        if not len(times_s):
            return
        from torchcodec.decoders import VideoDecoder

        if (container := container_of(name, blob)).startswith("mpeg"):
            cause = f"torchcodec seeks past the start of {container} streams"
            raise VideoError(name, cause, "use decode.backend=pyav", "unsupported")
        try:
            decoder = VideoDecoder(locator(blob), dimension_order="NHWC", num_ffmpeg_threads=1, device="cpu")
        except (RuntimeError, ValueError) as error:
            raise VideoError(name, f"torchcodec cannot open it ({_first_line(error)})", HINT) from None
        begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
        due = np.maximum(np.asarray(times_s, np.float64) + info.start_s + EPSILON_S, begin)
        due = due[due < end]
        upright = dataclasses.replace(info, rotation=0)  # torchcodec has turned the frames
        batcher = Batcher(name, spec, upright)
        good = False
        for at in range(0, len(due), GROUP):
            for t, found in zip(due[at : at + GROUP], _played_at(decoder, due[at : at + GROUP]), strict=True):
                good |= found is not None
                picture, time_s = found or (None, float(t))
                if full := batcher.add(picture, time_s - info.start_s, found is None):
                    yield full
        if not good:
            raise VideoError(name, "no picture can be decoded", HINT)
        if rest := batcher.take():
            yield rest


HINT = "try decode.backend=pyav, or re-download the file"


def _played_at(decoder: Any, times_s: np.ndarray) -> list[tuple[av.VideoFrame, float] | None]:
    """Picture and presentation time at each of ``times_s``, None where decoding failed."""
    try:
        frames = decoder.get_frames_played_at(seconds=times_s.tolist())
    except (RuntimeError, IndexError):
        if len(times_s) == 1:
            return [None]
        return [found for k in range(len(times_s)) for found in _played_at(decoder, times_s[k : k + 1])]
    pictures = [av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24") for rgb_HWC in frames.data.numpy()]
    return list(zip(pictures, frames.pts_seconds.tolist(), strict=True))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
