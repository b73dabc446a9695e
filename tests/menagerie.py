"""Videos that the world has: a few good ones of odd shapes, and most ways of being bad."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.footage import write_video


def good(folder: Path) -> list[str]:
    """Videos that must be used, each at least 3 s long."""
    write_video(folder / "plain.mp4", n_frames=120)
    write_video(folder / "slow_10fps.mp4", n_frames=40, fps=10)
    write_video(folder / "fast_60fps.mp4", n_frames=240, fps=60)
    write_video(folder / "wide_422_10bit.mp4", n_frames=120, codec="hevc", pix_fmt="yuv422p10le")
    write_video(folder / "odd_size.mkv", n_frames=120, width=321, height=243, pix_fmt="yuv444p")
    gaps = np.random.default_rng(3).integers(1, 8, 120).cumsum()
    times = [Fraction(int(t), 120) for t in gaps - gaps[0]]
    write_video(folder / "variable_rate.mp4", n_frames=len(times), times=times)
    write_video(folder / "tiny_24x16.mp4", n_frames=120, width=24, height=16)
    return sorted(p.name for p in folder.iterdir())


def faststart(path: Path, out: Path) -> Path:
    """A copy of an mp4 whose index comes first, so that a cut file still opens."""
    with av.open(str(path)) as source, av.open(str(out), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return out


def bad(folder: Path) -> dict[str, str]:
    """Videos that must be refused, to the class they are counted under."""
    whole = write_video(folder / "whole.mp4", n_frames=120)
    data = whole.read_bytes()
    whole.unlink()
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "no_moov.mp4").write_bytes(data[: len(data) // 2])
    (folder / "text.mp4").write_text("This is a text that somebody renamed.\n" * 99)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    write_audio(folder / "audio_only.mp4")
    write_video(folder / "one_frame.mp4", n_frames=1)
    (folder / "dangling.mp4").symlink_to(folder / "gone")
    return {
        "zero.mp4": "empty",
        "no_moov.mp4": "truncated",
        "text.mp4": "not_a_video",
        "noise.mp4": "not_a_video",
        "audio_only.mp4": "no_video_stream",
        "one_frame.mp4": "too_short",
        "dangling.mp4": "missing",
    }


def cut_in_the_middle(folder: Path) -> Path:
    """Opens, says 20 s, and ends around the middle."""
    long = write_video(folder / "long.mp4", n_frames=600)
    whole = faststart(long, folder / "cut.mp4")
    long.unlink()
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    return whole


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(20):
            tone = np.sin(np.arange(1024 * i, 1024 * (i + 1)) / 20).astype(np.float32)[None] * 0.1
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
