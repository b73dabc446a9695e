"""Decoding with torchcodec. Its wheel brings no FFmpeg: it takes the system's, else PyAV's.

On a CPU, frames come at full size and are scaled like everyone else's. The whole file is indexed first,
because only that finds the right frame at a variable rate. torchcodec does not report damage that the
decoder concealed: only frames that it fails on are marked.

On a GPU, the packet decoder of newer versions (0.17) hands over the planes of every picture, which are
converted like everyone else's; older ones only give RGB at full size.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import av
import numpy as np
import torch

from ego2robot.blobs import read_error
from ego2robot.decode import hardware, surfaces
from ego2robot.decode.base import FrameBatch
from ego2robot.decode.ffmpeg_names import share_pyav_ffmpeg
from ego2robot.decode.picture import Batcher
from ego2robot.decode.pyav import EPSILON_S, MAX_WAIT_PACKETS, container_of, locator, open_stream
from ego2robot.decode.surfaces import DecoderError, Planes, Scaled, Seeker, Surface
from ego2robot.errors import VideoError
from ego2robot.types import Blob, FrameSpec, VideoInfo

GROUP = 4  # full-size frames held at once
# Surfaces of its NVDEC backend, and how their samples are stored.
SURFACES = {"nv12": torch.uint8, "p010le": torch.uint16, "p012le": torch.uint16, "p016le": torch.uint16}
CUDA_CODECS = ("h264", "hevc", "vp9", "av1")


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
    # Newer versions load without FFmpeg, and only fail when they are used.
    if getattr(importlib.import_module("torchcodec"), "ffmpeg_major_version", 0) is None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchcodec"]:
            del sys.modules[name]  # the next import looks again
        return "no libav"
    return None


class TorchCodec:
    """See :class:`ego2robot.decode.base.Backend`."""

    name = "torchcodec"
    planes: tuple[str, ...] = ("rgb", "nv12", "p010")

    def __init__(self) -> None:
        self.devices: tuple[str, ...] = ("cpu",) if hardware.missing() else ("cpu", "cuda")

    def missing(self) -> str | None:
        return _missing()

    def version(self) -> str:
        return importlib.metadata.version("torchcodec")

    def refuses(self, info: VideoInfo) -> str | None:
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
        if (container := container_of(name, blob)).startswith("mpeg"):
            cause = f"torchcodec seeks past the start of {container} streams"
            raise VideoError(name, cause, "use decode.backend=pyav", "unsupported")
        if device == "cpu":
            yield from _read_cpu(name, blob, info, times_s, spec)
            return
        refusal = hardware.refuses(info) if info.codec in CUDA_CODECS else f"{info.codec} on a GPU"
        if refusal:
            raise VideoError(name, refusal, HINT, "unsupported")
        from torchcodec import decoders

        reader = _read_planes if hasattr(decoders, "Demuxer") else _read_rgb
        yield from reader(name, blob, info, times_s, spec, device)


HINT = "try decode.backend=pyav, or re-download the file"


def _read_cpu(
    name: str, blob: Blob, info: VideoInfo, times_s: np.ndarray, spec: FrameSpec
) -> Iterator[FrameBatch]:
    decoder, due = _open(name, blob, info, times_s, "cpu")
    upright = dataclasses.replace(info, rotation=0)  # torchcodec has turned the frames
    batcher = Batcher(name, spec, upright)
    good = False
    for at in range(0, len(due), GROUP):
        for t, found in zip(due[at : at + GROUP], _played_at(decoder, due[at : at + GROUP]), strict=True):
            good |= found is not None
            rgb_HWC, time_s = found or (None, float(t))
            picture = None if rgb_HWC is None else av.VideoFrame.from_ndarray(rgb_HWC.numpy(), format="rgb24")
            if full := batcher.add(picture, time_s - info.start_s, found is None):
                yield full
    if not good:
        raise VideoError(name, "no picture can be decoded", HINT)
    if rest := batcher.take():
        yield rest


def _read_rgb(
    name: str, blob: Blob, info: VideoInfo, times_s: np.ndarray, spec: FrameSpec, device: str
) -> Iterator[FrameBatch]:
    """On a GPU without its packet decoder."""
    decoder, due = _open(name, blob, info, times_s, device)
    scaled = Scaled(dataclasses.replace(info, rotation=0), spec, device)  # torchcodec has turned the frames
    good = False
    for at in range(0, len(due), GROUP):
        for t, found in zip(due[at : at + GROUP], _played_at(decoder, due[at : at + GROUP]), strict=True):
            good |= found is not None
            rgb_HWC, time_s = found or (None, float(t))
            if full := scaled.add(rgb_HWC, time_s - info.start_s, found is None):
                yield full
    if not good:
        raise VideoError(name, "no picture can be decoded", HINT)
    if rest := scaled.take():
        yield rest


def _open(name: str, blob: Blob, info: VideoInfo, times_s: np.ndarray, device: str) -> tuple[Any, np.ndarray]:
    """A decoder, and the due times in the stream's own clock that it has pictures for."""
    from torchcodec.decoders import VideoDecoder

    try:
        decoder = VideoDecoder(locator(blob), dimension_order="NHWC", num_ffmpeg_threads=1, device=device)
    except (RuntimeError, ValueError) as error:
        raise VideoError(name, f"torchcodec cannot open it ({_first_line(error)})", HINT) from None
    begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    due = np.maximum(np.asarray(times_s, np.float64) + info.start_s + EPSILON_S, begin)
    return decoder, due[due < end]


def _played_at(decoder: Any, times_s: np.ndarray) -> list[tuple[torch.Tensor, float] | None]:
    """Picture [H, W, 3] and presentation time at each of ``times_s``, None where decoding failed."""
    try:
        frames = decoder.get_frames_played_at(seconds=times_s.tolist())
    except (RuntimeError, IndexError):
        if len(times_s) == 1:
            return [None]
        return [found for k in range(len(times_s)) for found in _played_at(decoder, times_s[k : k + 1])]
    return list(zip(frames.data, frames.pts_seconds.tolist(), strict=True))


def _read_planes(
    name: str, blob: Blob, info: VideoInfo, times_s: np.ndarray, spec: FrameSpec, device: str
) -> Iterator[FrameBatch]:
    try:
        with ExitStack() as stack:
            source = _PacketDecoder(name, blob, info, device, stack)
            yield from surfaces.read(name, source, info, times_s, spec, device)
    except DecoderError as error:
        raise VideoError(name, str(error), HINT, "unsupported") from None
    except (av.FFmpegError, OSError) as error:
        raise read_error(name, error) from None


class _PacketDecoder:
    """torchcodec's demuxer and packet decoder. See :class:`ego2robot.decode.surfaces.Source`.

    Its packets are opaque. Where a keyframe is, and at what time, libav's demuxer says beside it.
    """

    def __init__(self, name: str, blob: Blob, info: VideoInfo, device: str, stack: ExitStack) -> None:
        self._blob, self._info, self._device = blob, info, device
        self._guide, self._guided = stack.enter_context(open_stream(name, blob))
        self._tick = float(self._guided.time_base or 1)
        self._seeker = Seeker(self._guided, info.start_s)
        self._from_s = info.start_s
        self.left_out = ()  # its packets are opaque: all are decoded
        self.stream = torch.cuda.Stream(hardware.device_index(device))
        self._open()

    def surfaces(self) -> Iterator[Surface]:
        last, damaged, after_damage = -math.inf, False, False
        for frames in self._decoded():
            if frames is None:  # where the next keyframe is, nobody says: all that follows is suspect
                damaged = after_damage = True
                continue
            for frame in frames:
                time_s = frame.pts_seconds
                if time_s <= last or time_s < self._from_s - EPSILON_S:
                    continue
                last = time_s
                yield Surface(
                    time_s,
                    frame.duration_seconds,
                    damaged,
                    after_damage,
                    math.inf,
                    lambda frame=frame: self._planes(frame),  # type: ignore[misc]
                    lasts=True,
                )

    def jump(self, target_s: float, now_s: float) -> Iterator[Surface] | None:
        if not self._seeker.worthwhile(target_s, now_s):
            return None
        for at in self._seeker.tries(target_s):
            if (key_s := self._keyframe_after(at)) is None:
                break
            if key_s <= target_s + EPSILON_S:
                try:
                    self._demuxer.seek(key_s)
                    self._decoder.reset()
                except RuntimeError as error:
                    raise DecoderError(f"torchcodec cannot seek ({_first_line(error)})") from None
                self._from_s = key_s
                return self.surfaces()
        self._open()
        return self.surfaces()

    def _keyframe_after(self, position: int) -> float | None:
        """Presentation time of the keyframe that a seek to ``position`` finds."""
        try:
            self._guide.seek(position, stream=self._guided)
            for packet in itertools.islice(self._guide.demux(self._guided), MAX_WAIT_PACKETS):
                if packet.is_keyframe and packet.pts is not None:
                    return packet.pts * self._tick
        except av.FFmpegError:
            pass
        return None

    def _open(self) -> None:
        from torchcodec.decoders import Demuxer

        self._from_s = self._info.start_s
        try:
            self._demuxer = Demuxer(locator(self._blob), streams=self._guided.index)
            with torch.cuda.stream(self.stream):
                self._decoder = self._demuxer.streams[0].make_decoder(device=self._device)
        except (RuntimeError, ValueError) as error:
            raise DecoderError(f"torchcodec cannot open it ({_first_line(error)})") from None

    def _decoded(self) -> Iterator[list[Any] | None]:
        """The pictures of each packet, None for one that fails."""
        packets, failures = iter(self._demuxer), 0
        while True:
            with torch.cuda.stream(self.stream):
                try:
                    packet = next(packets, None)
                    frames = self._decoder.decode(packet) if packet is not None else self._decoder.drain()
                    failures = 0
                except RuntimeError as error:
                    packet, frames, failures = None, None, failures + 1
                    if failures > MAX_FAILURES:
                        raise DecoderError(f"torchcodec fails ({_first_line(error)})") from None
            yield frames
            if packet is None and frames is not None:
                return

    def _planes(self, frame: Any) -> Planes:
        if frame.pixel_format not in SURFACES:
            raise DecoderError(f"torchcodec gives {frame.pixel_format} pictures")
        luma, cb, cr = frame.planes
        size, item = cb.shape, cb.element_size()
        if cb.stride(1) != 2 or cr.data_ptr() - cb.data_ptr() != item:
            raise DecoderError("torchcodec's chroma planes are not interleaved")
        chroma = cb.as_strided((*size, 2), (cb.stride(0), 2, 1))
        context = self._guided.codec_context
        return surfaces.planes(
            luma, chroma, self._info.codec, int(context.colorspace), int(context.color_range)
        )


MAX_FAILURES = 16  # packets in a row


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
