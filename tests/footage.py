"""Small real videos for tests: moving texture whose every frame says which one it is."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1"}


def textured_frame(index: int, width: int, height: int) -> np.ndarray:
    """uint8 RGB [height, width, 3]: smooth coloured texture that drifts, and the frame's number as
    twelve large black or white cells along the top (most significant bit first)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin((x + 3 * index) / (17 + 9 * c) + y / (29 - 5 * c)) for c in range(3)]
    frame = np.stack([128 + 90 * wave for wave in waves], -1).astype(np.uint8)
    cell = width / 12
    for bit in range(12):
        value = 255 if index >> (11 - bit) & 1 else 0
        frame[: height // 6, int(bit * cell) : int((bit + 1) * cell)] = value
    return frame


def frame_number(frame: np.ndarray) -> int:
    """Reads back the number that :func:`textured_frame` drew, from a picture of any size."""
    height, width = frame.shape[:2]
    row = frame[height // 12].mean(-1)
    return sum(int(row[int((bit + 0.5) * width / 12)] > 127) << (11 - bit) for bit in range(12))


def write_video(
    path: Path,
    n_frames: int = 60,
    width: int = 320,
    height: int = 180,
    fps: int | Fraction = 30,
    codec: str = "h264",
    gop: int = 30,
    bframes: int = 0,
    pix_fmt: str = "yuv420p",
    times: Iterable[Fraction] | None = None,
    picture: Callable[[int, int, int], np.ndarray] = textured_frame,
    crf: int = 18,
    options: dict[str, str] | None = None,
) -> Path:
    """Encodes ``n_frames`` pictures; ``times`` (seconds) makes the frame rate variable.

    ``options`` are more of the encoder's own.
    """
    defaults = {
        "h264": {"crf": str(crf), "preset": "veryfast"},
        "hevc": {"preset": "ultrafast", "x265-params": f"log-level=error:crf={crf}:bframes={bframes}"},
        "vp9": {"crf": str(crf), "b": "0", "cpu-used": "8", "deadline": "realtime"},
        "av1": {"crf": str(crf), "preset": "10"},
    }[codec]
    stamps = list(times) if times is not None else [Fraction(i) / Fraction(fps) for i in range(n_frames)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(ENCODERS[codec], rate=Fraction(fps), options=defaults | (options or {}))
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size = gop
        if codec == "h264":
            stream.codec_context.max_b_frames = bframes
        stream.codec_context.time_base = Fraction(1, 90000)
        for index, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(picture(index, width, height), format="rgb24")
            frame.pts, frame.time_base = round(stamp * 90000), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_flat(path: Path, yuv: tuple[int, int, int], matrix: int, full: bool, n_frames: int = 6) -> Path:
    """H.264 of one colour, given as its stored 8-bit Y, Cb, Cr; tagged with a matrix (ITU-T H.273
    number: 1 BT.709, 2 unspecified, 6 BT.601, 9 BT.2020) and a range."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=6, options={"crf": "1", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full else 1
        for _ in range(n_frames):
            frame = av.VideoFrame(128, 96, "yuv420p")
            for plane, value in zip(frame.planes, yuv, strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path, seconds: float = 1.0) -> Path:
    """A tone in AAC, without a picture."""
    rate = 16000
    tone = (np.sin(np.arange(int(seconds * rate)) / 5) * 8000).astype(np.int16)[None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate, frame_size=1024)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def remux(source: Path, path: Path, options: dict[str, str] | None = None) -> Path:
    """The same packets in another container, such as ``x.ts``, ``x.mkv`` or an mp4 with
    ``{"movflags": "faststart"}``."""
    with av.open(str(source)) as old, av.open(str(path), "w", container_options=options or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return path


def rotate(source: Path, path: Path, clockwise: int) -> Path:
    """A copy of an mp4 whose display matrix asks for a turn by 90, 180 or 270 degrees, as phones write."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[clockwise]
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2, version 0
    data[at : at + 36] = matrix
    path.write_bytes(data)
    return path
