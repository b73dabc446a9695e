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
import pyarrow.compute as pc

from ego2robot import config, decode
from ego2robot.errors import UserError, VideoError
from ego2robot.jobs.pool import Pool
from ego2robot.sources import SOURCES, Candidate
from ego2robot.sources.base import identity
from ego2robot.store import atomic, schema
from ego2robot.store.ledger import Record
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import ROW_GROUP, VIDEOS, n_videos, units_table
from ego2robot.types import Clip, Unit, Video, VideoInfo, clip_id, short_id

# A unit covers at most so much of a video, and costs about so much to decode at most: what a crash can lose,
# and what the last worker may be busy with while the others have ended.
UNIT_SPAN_S, UNIT_COST_S = 300.0, 90.0
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
    """Groups the clips of a probed video into units of at most ``UNIT_SPAN_S`` and about ``UNIT_COST_S``."""
    groups: dict[int, list[Clip]] = {}
    span_s = _span_s(video)
    for clip in clips:
        groups.setdefault(int(clip.start_s // span_s), []).append(clip)
    return [
        Unit(
            short_id("unit", video.video_id, *(c.clip_id for c in group)),
            video,
            tuple(group),
            _cost(video, group),
        )
        for group in groups.values()
    ]


def _span_s(video: Video) -> float:
    """Seconds of a video that a unit may cover: whole minutes, or a part of one where that costs much."""
    a_second = _second_s(video)
    span_s = min(UNIT_SPAN_S, UNIT_COST_S / max(a_second, 1e-9))
    return 60.0 * (span_s // 60) if span_s >= 60 else max(5.0, 5.0 * (span_s // 5))


def _second_s(video: Video) -> float:
    """What decoding a second of a video takes."""
    assert video.info is not None
    megapixels = video.info.width * video.info.height / 1e6
    return video.info.fps * megapixels * DECODE_COST.get(video.info.codec, 0.003)


def _cost(video: Video, clips: Sequence[Clip]) -> float:
    """Seconds of decoding: the union of the clips' spans, and half a usual GOP before each gap."""
    seconds, end = 0.0, -math.inf
    for clip in clips:
        seconds += clip.end_s - max(clip.start_s, end) if end > clip.start_s else clip.end_s - clip.start_s
        seconds += 1.0 if clip.start_s > end else 0.0
        end = max(end, clip.end_s)
    return seconds * _second_s(video)


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
    """What a plan holds.

    Attributes:
        problems: what could not be used, of the videos that were looked at now.
        added: videos that were not in the plan before.
        reused: there was a plan, and the source was not listed again.
    """

    n_units: int
    problems: list[VideoError]
    videos: int
    added: int
    reused: bool


def plan(run: RunDir, progress: Callable[[int], None] | None = None, add: bool = False) -> Planned:
    """Makes the plan of a run and stores it, or reads the one that is there.

    Videos become rows as they are probed, so that memory holds one compact table and no objects a video.

    Args:
        progress: told how many videos were looked at.
        add: where there is a plan, list the source again and add the videos that are new. Those that could
            not be used are looked at again; what is planned stays as it is.

    Raises:
        UserError: the source holds nothing to look at; or its plan cannot grow.
    """
    before = run.units() if run.planned else None
    if before is not None and not add:
        return Planned(before.num_rows, [], n_videos(before), 0, True)
    cfg = run.config
    if before is not None and cfg.decode.triage.enabled:
        raise UserError(
            f"{run.path}: with decode.triage.enabled=true a plan cannot grow, since its rule was fitted to "
            "all of its videos; use another run_dir for the new ones"
        )
    known = _places(before) if before is not None else frozenset[tuple[str, int, int]]()
    problems: list[VideoError] = []
    rows = _Rows(cfg.clips, problems)
    pool = Pool(probing, (cfg.clips,), min(8, os.cpu_count() or 1), timeout_s=120.0, backlog=256)
    candidates = (
        found
        for found in _candidates(cfg, run.path, problems)
        if (found.blob.path, found.blob.offset, found.blob.size) not in known
    )
    for event in pool.run(candidates):
        if event.kind == "item":
            rows.add(replace(event.value, source=cfg.source.kind))
        elif event.kind == "error":
            problems.append(event.value)
        elif event.kind in ("crashed", "timeout") and not event.again:
            kind = "crash" if event.kind == "crashed" else "timeout"
            problems.append(VideoError(event.task.name, f"reading its headers: {event.value}", "", kind))
        if progress:
            progress(rows.videos + len(problems))
    table, added = _merged(before, rows.table(), problems)
    problems.sort(key=lambda p: (p.name, p.cause))
    _commit_problems(run, problems)
    if before is None or added:  # an unchanged plan is not written over under those who work on it
        _store(run, table)
    return Planned(table.num_rows, problems, n_videos(table), added, False)


def _store(run: RunDir, table: pa.Table) -> None:
    if table.num_rows:  # with nothing to do the next start looks again: the source may have been mended
        videos = {VIDEOS: str(n_videos(table)).encode()}
        atomic.write_parquet(run.plan_path, table.replace_schema_metadata(videos), ROW_GROUP)


def _commit_problems(run: RunDir, problems: Sequence[VideoError]) -> None:
    """What could not be used, in place of what an earlier planning found."""
    table = quarantine_table([(None, None, "plan", problem, 1) for problem in problems])
    old = [record.part for record in run.records() if record.info.get("plan")]
    new = run.commit((), {"quarantine": table}, {"plan": True})
    if old:
        run.append(Record("", (), {}, {"plan": True, "instead": new.part}, tuple(old)))


def _places(table: pa.Table) -> frozenset[tuple[str, int, int]]:
    """Where the bytes of planned videos are."""
    places = table.group_by(["path", "offset", "size"]).aggregate([])
    columns = (places[name].to_pylist() for name in ("path", "offset", "size"))
    return frozenset(zip(*columns, strict=True))


class _Rows:
    """Probed videos as rows of the plan, a batch at a time."""

    def __init__(self, cut: config.Clips, problems: list[VideoError]) -> None:
        self._cut, self._problems = cut, problems
        self._units: list[Unit] = []
        self._tables: list[pa.Table] = []
        self.videos = 0

    def add(self, video: Video) -> None:
        assert video.info is not None
        self.videos += 1
        clips = clips_of(video.video_id, video.info, self._cut)
        if not clips:
            self._problems.append(_too_short(video, self._cut))
        self._units += units_of(video, clips)
        if len(self._units) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._tables.append(units_table(self._units))
        self._units = []

    def table(self) -> pa.Table:
        self._flush()
        return pa.concat_tables(self._tables)


def _merged(before: pa.Table | None, new: pa.Table, problems: list[VideoError]) -> tuple[pa.Table, int]:
    """The whole plan, the longest units first, and how many videos are new in it.

    Of videos with the same bytes the first by name is used, or the one that is planned already.
    """
    first: dict[str, str] = {}
    if before is not None:
        for video, name in zip(before["video_id"].to_pylist(), before["name"].to_pylist(), strict=True):
            first.setdefault(video, name)
    n_before = len(first)
    by_name = new.select(["name", "video_id"]).group_by(["name", "video_id"]).aggregate([])
    by_name = by_name.sort_by([("name", "ascending"), ("video_id", "ascending")])
    twice: set[tuple[str, str]] = set()
    for name, video in zip(by_name["name"].to_pylist(), by_name["video_id"].to_pylist(), strict=True):
        if first.setdefault(video, name) != name:
            twice.add((name, video))
            cause = f"the same bytes as {first[video]}"
            problems.append(VideoError(name, cause, "used once", "duplicate"))
    if before is not None:  # one that lies elsewhere now, under its old name
        planned = pc.is_in(new["video_id"], value_set=pc.unique(before["video_id"]))
        new = new.filter(pc.invert(planned))
    if twice:
        pairs = zip(new["name"].to_pylist(), new["video_id"].to_pylist(), strict=True)
        new = new.filter(pa.array([pair not in twice for pair in pairs], pa.bool_()))
    table = new if before is None else pa.concat_tables([before, new])
    order = pc.sort_indices(table, [("cost_s", "descending"), ("unit_id", "ascending")])
    return table.take(order), len(first) - n_before


def _candidates(cfg: config.Config, run_dir: Path, problems: list[VideoError]) -> Iterator[Candidate]:
    count = 0
    for found in SOURCES[cfg.source.kind].candidates(cfg.source.path, run_dir, cfg.source):
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
    if planned.n_units:
        return
    reasons = "; ".join(str(p) for p in planned.problems[:3]) or "see quarantine/"
    raise UserError(f"source.path={path}: no usable video ({reasons})")
