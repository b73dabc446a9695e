"""Decoding with decord 0.6, whose wheel brings FFmpeg 4.1.

Kept for comparison. Its own time stamps are 32-bit and its frame count is a guess on some containers,
so times come from the packets, and a file where the two disagree is refused. It conceals damage
without a word, and can take the process down with it on a damaged file.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from functools import cache
from typing import Any

import av
import numpy as np

from ego2robot.decode.base import FrameBatch
from ego2robot.decode.picture import Batcher
from ego2robot.decode.pyav import EPSILON_S, container_of, locator, packet_times
from ego2robot.errors import VideoError
from ego2robot.types import Blob, FrameSpec, VideoInfo

CODECS = ("h264", "hevc", "vp9")
GROUP = 4  # full-size frames held at once
HINT = "use decode.backend=pyav"


@cache
def _missing() -> str | None:
    if importlib.util.find_spec("decord") is None:
        return "not installed: pip install decord"
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:
        return f"does not load here ({str(error).strip().splitlines()[0]})"
    decord.logging.set_level(decord.logging.QUIET)
    return None


class Decord:
    """See :class:`ego2robot.decode.base.Backend`."""

    name = "decord"
    devices: tuple[str, ...] = ("cpu",)
    planes: tuple[str, ...] = ("rgb",)

    def missing(self) -> str | None:
        return _missing()

    def version(self) -> str:
        return importlib.metadata.version("decord")

    def refuses(self, info: VideoInfo) -> str | None:
        if info.codec not in CODECS:
            return f"its FFmpeg 4.1 is only known to decode {', '.join(CODECS)}, not {info.codec}"
        return None

    def read(
        self, name: str, blob: Blob, info: VideoInfo, times_s: np.ndarray, spec: FrameSpec, device: str
    ) -> Iterator[FrameBatch]:
        if not len(times_s):
            return
        import decord

        if (container := container_of(name, blob)).startswith("mpeg"):
            cause = f"decord loses the start of {container} streams"
            raise VideoError(name, cause, HINT, "unsupported")
        stored = packet_times(name, blob)
        shown = np.sort(stored)
        try:
            reader = decord.VideoReader(locator(blob), ctx=decord.cpu(0), num_threads=1)
        except (decord.DECORDError, RuntimeError, AssertionError) as error:
            raise VideoError(name, f"decord cannot open it ({_gist(error)})", HINT, "unsupported") from None
        if len(reader) != len(shown):
            cause = f"decord sees {len(reader)} frames of {len(shown)}"
            raise VideoError(name, cause, HINT, "unsupported")
        due = np.asarray(times_s, np.float64) + info.start_s
        due = due[due + EPSILON_S < shown[-1] + 1 / info.fps]
        indices = np.maximum(np.searchsorted(shown, due + EPSILON_S, side="right") - 1, 0)
        # Where pictures are reordered, its seeks miscount those around a keyframe: it must not seek.
        sought = np.array_equal(shown, stored)
        batcher = Batcher(name, spec, dataclasses.replace(info, rotation=0))  # decord has turned them
        try:
            for k, rgb_HWC in _sought(reader, indices) if sought else _counted(reader, indices):
                picture = av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24")
                if full := batcher.add(picture, float(shown[k]) - info.start_s, False):
                    yield full
        except (decord.DECORDError, RuntimeError) as error:
            at = times_s[batcher.first]
            raise VideoError(name, f"decord fails after {at:.1f} s ({_gist(error)})", HINT) from None
        if rest := batcher.take():
            yield rest


def _sought(reader: Any, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for at in range(0, len(indices), GROUP):
        group = indices[at : at + GROUP].tolist()
        yield from zip(group, reader.get_batch(group).asnumpy(), strict=True)


def _counted(reader: Any, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    now, rgb_HWC = -1, np.zeros(0)
    for k in indices.tolist():
        while now < k:
            now, found = now + 1, reader.next()
            if now == k:
                rgb_HWC = found.asnumpy()
        yield k, rgb_HWC


def _gist(error: Exception) -> str:
    """decord's message without its own traceback."""
    return str(error).strip().splitlines()[0].rpartition("] ")[2]
