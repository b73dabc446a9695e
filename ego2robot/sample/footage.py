"""First-person-like footage with known truth, an hour of it in minutes.

A few segments of every kind and skill are rendered and encoded once, each a loop of closed GOPs in a process
of its own; the videos are then those segments' packets in a seeded order, copied, not encoded again. What a
reader has to decode is real in every respect but one: pictures come back. The truth says which.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np

from ego2robot.errors import UserError
from ego2robot.sample.acts import SKILLS
from ego2robot.sample.segment import Codec, Segment, argument_of
from ego2robot.sample.truth import FORMAT, VERSION, Truth
from ego2robot.store import atomic

SEGMENT_S = 4.0  # at least; longer when one GOP is
SPAN_S = (6.0, 20.0)  # length of a span of one kind
MAX_VIDEO_MINUTES = 20.0
VARIANTS = (
    (5.0, 1),
    (20.0, 2),
    (float("inf"), 3),
)  # up to so many minutes, so many takes of each kind and skill
ASPECTS = (0.9, 2.4)
# In each round, half of the spans are manipulating.
ROUND = ("manipulating", "walking", "manipulating", "idle")


@dataclass(frozen=True)
class Span:
    """So many repeats of one segment."""

    kind: str
    skill: str | None
    variant: int
    repeats: int

    @property
    def segment(self) -> str:
        return f"{self.skill or self.kind}-{self.variant}"


@dataclass(frozen=True)
class Footage:
    """What was written.

    Attributes:
        videos: the files, in order; the truth of ``x.mp4`` is ``x.json``.
        duration_s: of all videos together.
        unique_s: seconds of different pictures; the rest are repeats.
        bytes: of all videos together.
    """

    videos: tuple[Path, ...]
    duration_s: float
    unique_s: float
    bytes: int

    @property
    def truths(self) -> tuple[Path, ...]:
        return tuple(video.with_suffix(".json") for video in self.videos)

    def text(self) -> str:
        """One line for a person."""
        n = len(self.videos)
        return (
            f"{n} video{'s' if n > 1 else ''}, {self.duration_s / 60:.1f} min, {self.bytes / 1e6:.0f} MB "
            f"({self.unique_s:.0f} s of different pictures), truth beside each, in {self.videos[0].parent}"
        )


def make_footage(
    out: Path,
    minutes: float = 3.0,
    codec: str = "h264",
    gop: int = 30,
    bframes: int = 0,
    seed: int = 0,
    width: int = 1920,
    height: int = 1080,
    fps: int = 30,
    videos: int = 1,
    video_minutes: float = MAX_VIDEO_MINUTES,
    progress: Callable[[float], None] | None = None,
    kinds: tuple[str, ...] = ROUND,
) -> Footage:
    """Writes ``ego_000.mp4``, ``ego_000.json`` … into the folder ``out``; files of that name are replaced.

    The same arguments give the same truth and, with the same encoders, the same bytes.

    Args:
        minutes: of all videos together, to the nearest segment (4 s, or one GOP if that is longer).
        gop: frames from one keyframe to the next, 1 to 20 s' worth; every GOP is closed.
        bframes: between two other frames, 0 to 16; H.264 and HEVC only.
        width, height: even, pixels; between 0.9 and 2.4 times as wide as high.
        fps: whole frames/s, 5 to 120.
        videos: at least so many files of equal length.
        video_minutes: no file is longer.
        progress: is told the share that is done, 0 to 1.
        kinds: of the spans of one round, in any order; repeat a kind to have more of it.

    Raises:
        UserError: an argument is out of range, or ``out`` cannot be written.
    """
    _check(minutes, codec, gop, bframes, seed, width, height, fps, videos)
    n_frames = gop * -(-round(SEGMENT_S * fps) // gop)
    seconds = n_frames / fps
    total = max(1, round(60 * minutes / seconds))
    videos = min(total, max(videos, -(-total // max(1, int(60 * video_minutes / seconds)))))
    variants = next(count for limit, count in VARIANTS if minutes <= limit)
    lengths = [total // videos + (index < total % videos) for index in range(videos)]
    plans = [
        list(_plan(index, length, seconds, seed, variants, kinds)) for index, length in enumerate(lengths)
    ]
    tell = progress or (lambda _: None)
    written: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Beside the result, so that a small /tmp does not matter.
        with tempfile.TemporaryDirectory(dir=out, prefix=".segments-") as folder:
            needed = {span.segment: span for plan in plans for span in plan}
            segments = {
                name: Segment(
                    path=str(Path(folder) / f"{name}.mp4"),
                    kind=span.kind,  # type: ignore[arg-type]
                    skill=span.skill,
                    variant=span.variant,
                    seed=seed,
                    n_frames=n_frames,
                    fps=fps,
                    width=width,
                    height=height,
                    codec=codec,  # type: ignore[arg-type]
                    gop=gop,
                    bframes=bframes,
                )
                for name, span in sorted(needed.items())
            }
            wrists = _make_all(segments, lambda share: tell(0.9 * share))
            packets = {name: _packets(segment) for name, segment in segments.items()}
            for index, plan in enumerate(plans):
                path = out / f"ego_{index:03d}.mp4"
                _join(path, plan, segments, packets)
                atomic.write_json(path.with_suffix(".json"), _truth(path, plan, segments, wrists))
                written.append(path)
                tell(0.9 + 0.1 * (index + 1) / videos)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{out}: cannot write the footage: {reason}; choose a folder with free space"
        ) from error
    return Footage(
        videos=tuple(written),
        duration_s=total * seconds,
        unique_s=len(segments) * seconds,
        bytes=sum(path.stat().st_size for path in written),
    )


def _check(
    minutes: float,
    codec: str,
    gop: int,
    bframes: int,
    seed: int,
    width: int,
    height: int,
    fps: int,
    videos: int,
) -> None:
    def refuse(what: str, value: object, want: str) -> None:
        raise UserError(f"{what}={value}: should be {want}")

    if not 0 < minutes <= 60 * 24 * 7:
        refuse("minutes", minutes, "above 0 and at most a week (10080)")
    if codec not in get_args(Codec):
        refuse("codec", codec, f"one of {', '.join(get_args(Codec))}")
    if not 5 <= fps <= 120:
        refuse("fps", fps, "5 to 120")
    if not 1 <= gop <= SPAN_S[1] * fps:
        refuse("gop", gop, f"1 to {int(SPAN_S[1] * fps)} frames (20 s)")
    if not 0 <= bframes <= 16 or (bframes and bframes >= gop):
        refuse("bframes", bframes, "0 to 16, and fewer than a GOP has frames")
    if bframes and codec not in ("h264", "hevc"):
        refuse("bframes", bframes, f"0 for {codec}, which has no B-frames to count; use h264 or hevc")
    if not 0 <= seed < 2**31:
        refuse("seed", seed, "0 to 2147483647")
    if width % 2 or height % 2 or not (64 <= height <= 4320 and ASPECTS[0] <= width / height <= ASPECTS[1]):
        refuse("size", f"{width}x{height}", "even, 64 to 4320 high, 0.9 to 2.4 times as wide as high")
    if not 1 <= videos <= 100_000:
        refuse("videos", videos, "1 to 100000")


def _plan(
    index: int, length: int, seconds: float, seed: int, variants: int, round_of: tuple[str, ...]
) -> Iterator[Span]:
    """The spans of video ``index``, ``length`` segments together. Three or more hold every kind."""
    rng = np.random.default_rng([seed, index, 7])
    fewest: int = max(1, math.ceil(SPAN_S[0] / seconds))
    most: int = max(fewest, int(SPAN_S[1] / seconds))
    skills: list[str] = []
    left, rounds, before, last = length, 0, "", ""
    while left:
        # The first round is short enough that a short video has all of it.
        kinds = [
            str(k) for k in rng.permutation(round_of if rounds or length >= len(round_of) else round_of[1:])
        ]
        if kinds[0] == last != "manipulating":
            kinds.reverse()  # two spans of walking would be one long one
        last = kinds[-1]
        for kind in kinds:
            if not left:
                return
            if not skills:
                skills = [str(name) for name in rng.permutation(list(SKILLS))]
                if len(skills) > 1 and skills[-1] == before:
                    skills.reverse()
            skill = skills.pop() if kind == "manipulating" else None
            before = skill or before
            cap = most if rounds else max(1, min(most, length // len(kinds)))
            repeats = min(left, int(rng.integers(min(fewest, cap), cap + 1)))
            yield Span(kind, skill, int(rng.integers(variants)), repeats)
            left -= repeats
        rounds += 1


def _make_all(segments: dict[str, Segment], tell: Callable[[float], None]) -> dict[str, dict[str, Any]]:
    """Runs one process per segment, as many at a time as there are cores. Returns the wrists of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(cores, len(segments))) as pool:
        jobs = [pool.submit(_make, segment) for segment in segments.values()]
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                tell(done / len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {
        name: json.loads(Path(segment.path).with_suffix(".json").read_text(encoding="utf-8"))
        for name, segment in segments.items()
    }


def _make(segment: Segment) -> None:
    # SVT-AV1 announces itself on stderr unless told not to; one thread each, the processes fill the cores.
    environment = os.environ | {"SVT_LOG": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ego2robot.sample.segment", argument_of(segment)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if "No space left" in done.stderr:
            raise OSError(28, "No space left on device")
        raise RuntimeError(f"segment {segment.name} failed (exit {done.returncode}): {last}")


@dataclass(frozen=True)
class Packet:
    """One encoded frame; times in frames from the segment's first."""

    data: bytes
    pts: int
    dts: int
    is_keyframe: bool


def _packets(segment: Segment) -> list[Packet]:
    found = []
    with av.open(segment.path) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size:
                frames = [round(t * packet.time_base * segment.fps) for t in (packet.pts, packet.dts)]
                found.append(Packet(bytes(packet), frames[0], frames[1], packet.is_keyframe))
    if sorted(p.pts for p in found) != list(range(segment.n_frames)) or not found[0].is_keyframe:
        raise RuntimeError(
            f"segment {segment.name}: {len(found)} packets do not make {segment.n_frames} frames"
        )
    return found


def _join(
    path: Path, plan: list[Span], segments: dict[str, Segment], packets: dict[str, list[Packet]]
) -> None:
    """Writes the packets of ``plan`` one after another, times moved, nothing encoded again."""
    first = segments[plan[0].segment]
    base = Fraction(1, first.fps)
    aside = path.with_name(f"{atomic.TEMPORARY_PREFIX}{path.name}.{os.getpid()}")
    try:
        with av.open(first.path) as source, av.open(str(aside), "w", format="mp4") as container:
            # Opaque: FFmpeg's AV1 decoder has another name than its encoder, and neither is opened.
            stream = container.add_stream_from_template(source.streams.video[0], opaque=True)
            stream.time_base = base
            start = 0
            for span in plan:
                for _ in range(span.repeats):
                    for item in packets[span.segment]:
                        packet = av.Packet(item.data)
                        packet.stream, packet.time_base = stream, base
                        packet.pts, packet.dts = start + item.pts, start + item.dts
                        packet.duration, packet.is_keyframe = 1, item.is_keyframe
                        container.mux(packet)
                    start += first.n_frames
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _truth(
    path: Path, plan: list[Span], segments: dict[str, Segment], wrists: dict[str, dict[str, Any]]
) -> Truth:
    one = segments[plan[0].segment]
    spans, frame = [], 0
    for span in plan:
        end = frame + span.repeats * one.n_frames
        spans.append(
            {
                "start_s": frame / one.fps,
                "end_s": end / one.fps,
                "first_frame": frame,
                "end_frame": end,
                "kind": span.kind,
                "skill": span.skill,
                "segment": span.segment,
                "repeats": span.repeats,
            }
        )
        frame = end
    return {
        "format": FORMAT,
        "version": VERSION,
        "video": path.name,
        "seed": one.seed,
        "width": one.width,
        "height": one.height,
        "fps": one.fps,
        "codec": one.codec,
        "gop": one.gop,
        "bframes": one.bframes,
        "n_frames": frame,
        "duration_s": frame / one.fps,
        "spans": spans,
        "segments": {
            name: {
                "kind": segments[name].kind,
                "skill": segments[name].skill,
                "n_frames": segments[name].n_frames,
                "used": sum(span.repeats for span in plan if span.segment == name),
                "wrists": wrists[name],
            }
            for name in sorted({span.segment for span in plan})
        },
    }
