"""Decoding with decord 0.6, whose wheel brings FFmpeg 4.1.

Kept for comparison. Its own time stamps are 32-bit and its frame count is a guess on some containers,
so times come from the packets, and a file where the two disagree is refused. It conceals damage
without a word, and can take the process down with it on a damaged file. The wheel has no GPU in it; where
it was built with CUDA, it decodes there too, to RGB at full size.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import av
import numpy as np
import torch
import torch.utils.dlpack

from ego2robot.decode import hardware
from ego2robot.decode.base import FrameBatch
from ego2robot.decode.picture import Batcher
from ego2robot.decode.pyav import EPSILON_S, container_of, locator, packet_times
from ego2robot.decode.surfaces import Scaled
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


@cache
def _has_cuda() -> bool:
    """Whether this decord was built with CUDA. Only its shared library knows."""
    if _missing() or hardware.missing():
        return False
    import decord

    try:
        return bool(decord.gpu(0).exist)
    except (AttributeError, decord.DECORDError):
        return False


class Decord:
    """See :class:`ego2robot.decode.base.Backend`."""

    name = "decord"
    planes: tuple[str, ...] = ("rgb",)

    def __init__(self) -> None:
        self.devices: tuple[str, ...] = ("cpu", "cuda") if _has_cuda() else ("cpu",)

    def missing(self) -> str | None:
        return _missing()

    def version(self) -> str:
        return importlib.metadata.version("decord")

    def refuses(self, info: VideoInfo) -> str | None:
        if info.codec not in CODECS:
            return f"its FFmpeg 4.1 is only known to decode {', '.join(CODECS)}, not {info.codec}"
        return None

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
        import decord

        if (container := container_of(name, blob)).startswith("mpeg"):
            cause = f"decord loses the start of {container} streams"
            raise VideoError(name, cause, HINT, "unsupported")
        on_gpu = device != "cpu"
        if on_gpu and (refusal := "a rotated video" if info.rotation else hardware.refuses(info)):
            raise VideoError(name, f"decord on a GPU does not take {refusal}", HINT, "unsupported")
        stored = packet_times(name, blob)
        shown = np.sort(stored)
        try:
            where = decord.gpu(hardware.device_index(device)) if on_gpu else decord.cpu(0)
            reader = decord.VideoReader(locator(blob), ctx=where, num_threads=1)
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
        upright = dataclasses.replace(info, rotation=0)  # decord has turned them
        batcher: Batcher | Scaled = Scaled(upright, spec, device) if on_gpu else Batcher(name, spec, upright)
        try:
            picked = _sought if sought else _counted
            for k, rgb_HWC in picked(reader, indices, _on_gpu if on_gpu else _on_cpu):
                time_s = float(shown[k]) - info.start_s
                if isinstance(batcher, Scaled):
                    full = batcher.add(rgb_HWC, time_s, False)
                else:
                    picture = av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24")
                    full = batcher.add(picture, time_s, False)
                if full:
                    yield full
        except (decord.DECORDError, RuntimeError) as error:
            at = times_s[batcher.first]
            raise VideoError(name, f"decord fails after {at:.1f} s ({_gist(error)})", HINT) from None
        if rest := batcher.take():
            yield rest


def _on_cpu(pictures: Any) -> np.ndarray:
    found: np.ndarray = pictures.asnumpy()
    return found


def _on_gpu(pictures: Any) -> torch.Tensor:
    found: torch.Tensor = torch.utils.dlpack.from_dlpack(pictures.to_dlpack())
    return found


def _sought(reader: Any, indices: np.ndarray, take: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
    for at in range(0, len(indices), GROUP):
        group = indices[at : at + GROUP].tolist()
        yield from zip(group, take(reader.get_batch(group)), strict=True)


def _counted(reader: Any, indices: np.ndarray, take: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
    now, rgb_HWC = -1, None
    for k in indices.tolist():
        while now < k:
            now, found = now + 1, reader.next()
            if now == k:
                rgb_HWC = take(found)
        yield k, rgb_HWC


def _gist(error: Exception) -> str:
    """decord's message without its own traceback."""
    return str(error).strip().splitlines()[0].rpartition("] ")[2]
