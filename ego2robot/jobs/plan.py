"""From a source to units of work: list, probe, cut into clips, group into units.

Every id comes from the bytes and the span, so that the same footage makes the same plan wherever it
lies and whatever it is called.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from ego2robot import config, decode
from ego2robot.errors import UserError, VideoError
from ego2robot.jobs.pool import Pool
from ego2robot.sources import SOURCES, Candidate
from ego2robot.sources.base import identity
from ego2robot.store import atomic, schema
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_from_table, units_table
from ego2robot.types import Clip, Unit, Video, VideoInfo, clip_id, short_id

UNIT_SPAN_S = 300.0  # a unit covers at most so much of a video: bounds what a crash can lose
# Seconds of one CPU core per million decoded pixels, for ordering and ETA only; the run corrects it.
DECODE_COST = {"h264": 0.0022, "hevc": 0.0026, "vp9": 0.0022, "av1": 0.0030}


def clips_of(video_id: str, info: VideoInfo, clips: config.Clips) -> list[Clip]:
    """The clips of a video: every ``stride_s``, ``duration_s`` long, on the frame grid.

    Starts are rounded to the grid. The last clip may be shorter, down to ``min_frames``.
    """
    fps = clips.sample_fps
    available = math.ceil(info.duration_s * fps - 1e-6)  # grid times before the video's end
    length = max(1, round(clips.duration_s * fps))
    found: list[Clip] = []
    for i in range(available):
        first = round(i * clips.stride_s * fps)
        n = min(length, available - first)
        if n < min(clips.min_frames, length):
            break
        if not found or first > found[-1].first:
            found.append(Clip(clip_id(video_id, first, n, fps), video_id, first, n, fps))
    return found


def units_of(video: Video, clips: Sequence[Clip]) -> list[Unit]:
    """Groups the clips of a probed video into units of at most ``UNIT_SPAN_S``."""
    groups: dict[int, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(int(clip.start_s // UNIT_SPAN_S), []).append(clip)
    return [
        Unit(
            short_id("unit", video.video_id, *(c.clip_id for c in group)),
            video,
            tuple(group),
            _cost(video, group),
        )
        for group in groups.values()
    ]


def _cost(video: Video, clips: Sequence[Clip]) -> float:
    """Seconds of decoding: the union of the clips' spans, and half a usual GOP before each gap."""
    assert video.info is not None
    seconds, end = 0.0, -math.inf
    for clip in clips:
        seconds += clip.end_s - max(clip.start_s, end) if end > clip.start_s else clip.end_s - clip.start_s
        seconds += 1.0 if clip.start_s > end else 0.0
        end = max(end, clip.end_s)
    megapixels = video.info.width * video.info.height / 1e6
    return seconds * video.info.fps * megapixels * DECODE_COST.get(video.info.codec, 0.003)


# -- probing, in child processes ------------------------------------------------------------------


def probing(cut: config.Clips) -> Callable[[Candidate], Iterator[Video]]:
    """The work of a probing child: a candidate to a video with its identity and headers."""

    def probe(candidate: Candidate) -> Iterator[Video]:
        try:
            info = decode.probe(candidate.name, candidate.blob)
            video_id = identity(candidate.blob)
        except OSError as error:
            cause = error.strerror or str(error)
            raise VideoError(candidate.name, cause, "check the file", "missing") from None
        yield Video(video_id, candidate.name, "", candidate.blob, candidate.meta, info)

    return probe


@dataclass(frozen=True)
class Planned:
    units: list[Unit]
    problems: list[VideoError]
    videos: int
    reused: bool


def plan(run: RunDir, progress: Callable[[int], None] | None = None) -> Planned:
    """Makes the plan of a run and stores it, or reads the one that is there.

    Args:
        progress: told how many videos were looked at.

    Raises:
        UserError: the source holds nothing to look at.
    """
    if run.planned:
        units = units_from_table(run.units())
        return Planned(units, [], len({u.video.video_id for u in units}), True)
    cfg = run.config
    problems: list[VideoError] = []
    videos: list[Video] = []
    pool = Pool(probing, (cfg.clips,), min(8, os.cpu_count() or 1), timeout_s=120.0, backlog=256)
    for event in pool.run(_candidates(cfg, run.path, problems)):
        if event.kind == "item":
            videos.append(replace(event.value, source=cfg.source.kind))
        elif event.kind == "error":
            problems.append(event.value)
        elif event.kind in ("crashed", "timeout") and not event.again:
            kind = "crash" if event.kind == "crashed" else "timeout"
            problems.append(VideoError(event.task.name, f"reading its headers: {event.value}", "", kind))
        if progress:
            progress(len(videos) + len(problems))
    units = []
    n_videos = 0
    first_name: dict[str, str] = {}
    for video in sorted(videos, key=lambda v: v.name):
        assert video.info is not None
        if video.video_id in first_name:
            cause = f"the same bytes as {first_name[video.video_id]}"
            problems.append(VideoError(video.name, cause, "used once", "duplicate"))
            continue
        first_name[video.video_id] = video.name
        clips = clips_of(video.video_id, video.info, cfg.clips)
        if clips:
            n_videos += 1
            units += units_of(video, clips)
        else:
            problems.append(_too_short(video, cfg.clips))
    units.sort(key=lambda unit: (-unit.cost_s, unit.unit_id))
    problems.sort(key=lambda p: (p.name, p.cause))
    run.commit((), {"quarantine": quarantine_table([(None, None, "plan", p, 1) for p in problems])})
    if units:  # with nothing to do the next start looks again: the source may have been mended
        atomic.write_parquet(run.path / "plan" / "units.parquet", units_table(units))
    return Planned(units, problems, n_videos, False)


def _candidates(cfg: config.Config, run_dir: Path, problems: list[VideoError]) -> Iterator[Candidate]:
    count = 0
    for found in SOURCES[cfg.source.kind].candidates(cfg.source.path, run_dir):
        if isinstance(found, VideoError):
            problems.append(found)
            continue
        if found.problem:
            problems.append(found.problem)
        yield found
        count += 1
        if count == cfg.source.limit:
            return


def _too_short(video: Video, clips: config.Clips) -> VideoError:
    assert video.info is not None
    n = min(clips.min_frames, max(1, round(clips.duration_s * clips.sample_fps)))
    return VideoError(
        video.name,
        f"{video.info.duration_s:.2f} s ({video.info.n_frames} frames) is shorter than the shortest clip "
        f"({n} frames at {clips.sample_fps:g} frames/s = {n / clips.sample_fps:.2f} s)",
        "lower clips.min_frames to use it",
        "too_short",
    )


Refusal = tuple[str | None, str | None, str, VideoError, int]  # unit, video, stage, error, attempts


def quarantine_table(refusals: Sequence[Refusal]) -> pa.Table:
    """What failed as rows of ``schema.QUARANTINE``."""
    rows = [
        {
            "unit_id": unit_id,
            "video_id": video_id,
            "name": error.name,
            "stage": stage,
            "error_class": error.kind,
            "message": error.cause + (f"; {error.hint}" if error.hint else ""),
            "attempts": attempts,
        }
        for unit_id, video_id, stage, error, attempts in refusals
    ]
    return pa.Table.from_pylist(rows, schema=schema.QUARANTINE)


def require_units(planned: Planned, path: str) -> None:
    """Raises UserError when there is nothing to do at all, with the first reason."""
    if planned.units:
        return
    reasons = "; ".join(str(p) for p in planned.problems[:3]) or "see quarantine/"
    raise UserError(f"source.path={path}: no usable video ({reasons})")
