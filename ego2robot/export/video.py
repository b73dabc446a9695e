"""Episodes to video: each encoded on its own, many to a file, every frame at an exact time.

An episode starts with a keyframe and refers to no other one, because it has an encoder of its own; a
file is its episodes' packets one after the other. So an episode's bytes depend on its frames alone, its size
is known before it is decided whether it still fits into a file, and an encoder never holds more than one.
Encoders have one thread: there is a process for each core, and more threads would give other bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from ego2robot.errors import UserError
from ego2robot.export.files import Limits

# LeRobot compares times in float32 with a tolerance of 1e-4 s. From 1024 s on one step of float32 is
# more than that, and frames that are there are refused.
MAX_FILE_S = 1000.0
PIX_FMT = "yuv420p"


@dataclass(frozen=True)
class Codec:
    """An encoder and its settings. ``name`` is what info.json calls the codec."""

    name: str
    encoder: str
    options: Mapping[str, str]


# Keyframe every 2nd frame and crf 30 are LeRobot's own, for fast random access. SVT-AV1's presets 11 and 12
# take 0.65 and 0.6 of the time of its default, 10, but lose small motions: of 684 frames of two films 20
# looked more (0.5 dB) like a neighbour than like themselves, by 10 none. x264 at crf 30 would be visibly
# worse than SVT-AV1 at 30, so it gets its own; no B-frames, times are then exact.
GOP = 2
CODECS = {
    "av1": Codec("av1", "libsvtav1", {"crf": "30", "preset": "10", "svtav1-params": "lp=1"}),
    "h264": Codec("h264", "libx264", {"crf": "23", "preset": "veryfast", "bf": "0"}),
}
# Of one pixel in one frame at these settings: what the demo's footage takes, rounded up. It decides how much
# footage is meant for a file, not how large a file may get.
EXPECTED_BYTES = 0.1


def check_codec(name: str) -> Codec:
    """The codec of that name. Raises UserError when there is none, or this PyAV lacks its encoder."""
    if name not in CODECS:
        raise UserError(f"codec={name!r}: should be one of {', '.join(CODECS)}")
    encoder = CODECS[name].encoder
    if encoder not in av.codecs_available:
        others = [other for other, c in CODECS.items() if c.encoder in av.codecs_available]
        raise UserError(
            f"codec={name}: this PyAV has no {encoder}; "
            + (f"use codec={others[0]}" if others else "pip install --force-reinstall av")
        )
    return CODECS[name]


def encode_episode(frames_THWC: np.ndarray, fps: Fraction | int, codec: Codec, gop: int = GOP) -> bytes:
    """uint8 RGB [T, H, W, 3] as an MP4 of its own, frame ``k`` at ``k / fps`` s.

    Args:
        gop: frames from keyframe to keyframe.

    The colour matrix is BT.601 and says so: decoders that read the tag, those that go by the picture's
    size and those that know only their default all give the same colours back.
    """
    # SVT-AV1 writes a banner to stderr, past any logging of ours; 1: errors only.
    os.environ.setdefault("SVT_LOG", "1")
    _, height, width, _ = frames_THWC.shape
    buffer, convert = io.BytesIO(), VideoReformatter()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec.encoder, rate=fps, options=dict(codec.options))
        stream.width, stream.height, stream.pix_fmt = width, height, PIX_FMT
        context = stream.codec_context
        context.gop_size, context.thread_count = gop, 1
        context.time_base = 1 / Fraction(fps)
        context.colorspace, context.color_range = int(Colorspace.ITU601), int(ColorRange.MPEG)
        for k, picture in enumerate(frames_THWC):
            frame = convert.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"),
                format=PIX_FMT, dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG, threads=1,
            )  # fmt: skip
            frame.pts, frame.time_base = k, 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@dataclass(frozen=True)
class Segment:
    """Where an episode lies: in which of the files, and at which of its frames it begins."""

    part: int
    first: int


class VideoFiles:
    """Writes episodes one after the other into files.

    A new file starts when the next episode would pass the size limit or ``MAX_FILE_S``. Use as a
    context manager; files are complete, and flushed to disk, once it is left.

    Args:
        path_of: the path of each file, counted from 0; its folder exists.

    Attributes:
        n_files: so many were begun.
    """

    def __init__(self, path_of: Callable[[int], Path], fps: int, limits: Limits) -> None:
        self._path_of, self._fps, self._limits = path_of, fps, limits
        self.n_files = 0
        self._file: BinaryIO | None = None
        self._output: Any = None
        self._stream: Any = None
        self._setup = b""
        self._frames = 0

    def __enter__(self) -> VideoFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close()
        elif self._file:  # the file does not count; a trailer for it would only fail again
            self._file.close()

    def add(self, episode: bytes, n_frames: int) -> Segment:
        """Appends what :func:`encode_episode` made."""
        with av.open(io.BytesIO(episode)) as source:
            video = source.streams.video[0]
            if self._needs_new_file(video, len(episode), n_frames):
                self._close()
                self._open(video)
            start = self._frames
            for packet in source.demux(video):
                if packet.pts is None:  # the demuxer's end mark
                    continue
                shift = round(Fraction(start, self._fps) / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = self._stream
                self._output.mux(packet)
        self._frames += n_frames
        return Segment(self.n_files - 1, start)

    def _needs_new_file(self, video: Any, size: int, n_frames: int) -> bool:
        if self._file is None:
            return True
        return (
            self._file.tell() + size > self._limits.video_bytes
            or self._frames + n_frames > MAX_FILE_S * self._fps
            or bytes(video.codec_context.extradata or b"") != self._setup
        )

    def _open(self, video: Any) -> None:
        # Through Python's file, so that a full disk is an OSError that says so.
        self._file = self._path_of(self.n_files).open("wb")
        self.n_files += 1
        self._output = av.open(self._file, "w", format="mp4")
        self._stream = self._output.add_stream_from_template(video, opaque=True)
        self._setup = bytes(video.codec_context.extradata or b"")
        self._frames = 0

    def _close(self) -> None:
        if self._file is None:
            return
        self._output.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = self._output = self._stream = None
