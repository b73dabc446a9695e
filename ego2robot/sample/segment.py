"""One segment of footage: rendered and encoded in a process of its own, as a loop of closed GOPs.

``python -m ego2robot.sample.segment SPEC`` with a JSON :class:`Segment` writes ``SPEC``'s ``path`` and a JSON
of the hands' truth beside it. A process each keeps the encoders' messages and threads out of the caller,
and uses every core without asking anything of the caller's ``__main__``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from ego2robot.sample import acts
from ego2robot.sample.draw import paint
from ego2robot.sample.scene import AISLE_PERIOD_M, MARGIN, Aisle, bench, film

Codec = Literal["h264", "hevc", "vp9", "av1"]
ENCODERS: dict[str, str] = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
# Bits/s of 1080p30: what head cameras write (Egocentric-10K: 16.4 TB of HEVC over 10,000 h is 3.6 Mb/s).
BIT_RATE = {"h264": 4_800_000, "hevc": 3_700_000, "vp9": 3_700_000}
AV1_CRF = 30  # SVT-AV1 has no one-pass bit rate without look-ahead in both of its structures
RENDER_HEIGHT = 540  # pixels; taller pictures are scaled up, which a lens of a head camera would hide
WALK_MPS = 1.3
NOISE = 2.0  # standard deviation of the sensor's noise, of 255, at full resolution
VIGNETTE = 0.20  # light lost in the corners


@dataclass(frozen=True)
class Segment:
    """What to make. ``path`` is the encoded file; the truth goes beside it as ``.json``."""

    path: str
    kind: Literal["idle", "walking", "manipulating"]
    skill: str | None
    variant: int
    seed: int
    n_frames: int
    fps: int
    width: int
    height: int
    codec: Codec
    gop: int
    bframes: int

    @property
    def name(self) -> str:
        return f"{self.skill or self.kind}-{self.variant}"


Hands = dict[str, list[tuple[float, float]]]  # per side, the wrist in every frame, share of the frame


def render(segment: Segment) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The pictures of a segment: uint8 RGB [h, w, 3], and per side float64 [21, 3] joints, view heights."""
    height = min(segment.height, RENDER_HEIGHT)
    width = round(segment.width / segment.height * height)
    aspect, n = width / height, segment.n_frames
    take = acts.loop(segment.seed, segment.name, segment.variant, n / segment.fps)
    place_seed = segment.seed * 1009 + segment.variant
    if segment.kind == "walking":
        aisle = Aisle(place_seed, height, width)
        periods = max(1, round(WALK_MPS * take.seconds / AISLE_PERIOD_M))
        for index in range(n):
            picture = aisle.picture(periods * AISLE_PERIOD_M * index / n)
            yield film(picture, acts.head_walking(take, index / n), height, width, MARGIN), {}
        return
    place = bench(place_seed, height, width)
    for index in range(n):
        t = index / n
        if segment.skill is None:
            yield film(place, acts.head_still(take, t), height, width, MARGIN), {}
            continue
        camera = acts.head_working(take, t)
        frame = film(place, camera, height, width, MARGIN)
        staged = acts.stage(segment.skill, take, t, camera, aspect, segment.variant)
        paint(frame, staged.shapes)
        yield frame, staged.joints


class Sensor:
    """Scales a picture to the video's size and adds what a camera adds: a dark rim and noise."""

    def __init__(self, segment: Segment) -> None:
        self.width, self.height, self.fps = segment.width, segment.height, segment.fps
        y, x = np.mgrid[-1 : 1 : segment.height * 1j, -1 : 1 : segment.width * 1j].astype(np.float32)
        self.light = np.round(256 * (1 - VIGNETTE * (x * x + y * y) / 2)).astype(np.uint16)
        self.rng = np.random.default_rng([segment.seed, segment.variant, *segment.name.encode()])
        noise = NOISE * self.rng.standard_normal((segment.height + 64, segment.width + 64), np.float32)
        self.noise = np.round(noise).astype(np.int16)

    def expose(self, picture: np.ndarray, index: int) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            self.width,
            self.height,
            "yuv420p",
            dst_colorspace=Colorspace.ITU709,
            interpolation=Interpolation.BILINEAR,
            dst_color_range=ColorRange.MPEG,
        )
        plane = frame.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(self.height, plane.line_size)[:, : self.width]
        top, left = self.rng.integers(0, 64, 2)
        luma = ((rows * self.light) >> 8).astype(np.int16)
        luma += self.noise[top : top + self.height, left : left + self.width]
        rows[...] = np.clip(luma, 16, 235)
        frame.pts, frame.time_base = index, Fraction(1, self.fps)
        return frame


def encoder_options(segment: Segment) -> dict[str, str]:
    """Fast presets, one thread, a keyframe every ``gop`` frames exactly, and closed GOPs."""
    gop, b = segment.gop, segment.bframes
    if segment.codec == "h264":
        params = f"keyint={gop}:scenecut=0:open-gop=0:bframes={b}:b-adapt=0"
        return {"preset": "superfast", "x264-params": params}
    if segment.codec == "hevc":
        params = f"log-level=error:keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes={b}:b-adapt=0"
        return {"preset": "ultrafast", "x265-params": params + ":pools=none:frame-threads=1:wpp=0"}
    if segment.codec == "vp9":
        return {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "keyint_min": str(gop)}
    # irefresh-type 2: every keyframe can be started from, nothing refers across it.
    return {
        "preset": "12",
        "crf": str(AV1_CRF),
        "svtav1-params": f"keyint={gop}:irefresh-type=2:scd=0:lp=1",
    }


def make(segment: Segment) -> Hands:
    """Renders and encodes ``segment`` into its ``path``; returns the wrists of the hands that are in view."""
    sensor = Sensor(segment)
    wrists: Hands = {}
    with av.open(segment.path, "w", format="mp4") as container:
        stream = container.add_stream(
            ENCODERS[segment.codec], rate=segment.fps, options=encoder_options(segment)
        )
        stream.width, stream.height, stream.pix_fmt = segment.width, segment.height, "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, segment.fps)
        context.gop_size, context.thread_count = segment.gop, 1
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        if segment.codec in BIT_RATE:
            share = segment.width * segment.height * segment.fps / (1920 * 1080 * 30)
            context.bit_rate = max(50_000, round(BIT_RATE[segment.codec] * share))
        if segment.codec in ("h264", "hevc"):
            context.max_b_frames = segment.bframes
        for index, (picture, joints) in enumerate(render(segment)):
            aspect = picture.shape[1] / picture.shape[0]
            for side, points in joints.items():
                x, y = points[0, 0] / aspect, points[0, 1]
                wrists.setdefault(side, []).append((round(x, 4), round(y, 4)))
            container.mux(stream.encode(sensor.expose(picture, index)))
        container.mux(stream.encode(None))
    return wrists


def main(argument: str) -> None:
    values: dict[str, Any] = json.loads(argument)
    segment = Segment(**values)
    wrists = make(segment)
    Path(segment.path).with_suffix(".json").write_text(json.dumps(wrists), encoding="utf-8")


def argument_of(segment: Segment) -> str:
    """The command-line argument that makes :func:`main` make ``segment``."""
    return json.dumps(asdict(segment))


if __name__ == "__main__":
    main(sys.argv[1])
