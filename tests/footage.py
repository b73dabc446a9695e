"""Small real videos for tests: moving texture whose every frame says which one it is."""

from __future__ import annotations

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
) -> Path:
    """Encodes ``n_frames`` pictures; ``times`` (seconds) makes the frame rate variable."""
    options = {
        "h264": {"crf": str(crf), "preset": "veryfast"},
        "hevc": {"preset": "ultrafast", "x265-params": f"log-level=error:crf={crf}:bframes={bframes}"},
        "vp9": {"crf": str(crf), "b": "0", "cpu-used": "8", "deadline": "realtime"},
        "av1": {"crf": str(crf), "preset": "10"},
    }[codec]
    stamps = list(times) if times is not None else [Fraction(i) / Fraction(fps) for i in range(n_frames)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(ENCODERS[codec], rate=Fraction(fps), options=options)
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
