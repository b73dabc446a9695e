"""From a source to a stored plan: list, probe, cut into clips and units (``jobs/cutting.py``), store."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ego2robot import config, decode, remote
from ego2robot.blobs import UNKNOWN, read_error, sized
from ego2robot.decode.keyframes import keyframes_before
from ego2robot.decode.shots import find_cuts
from ego2robot.errors import UserError, VideoError
from ego2robot.jobs.cutting import clips_of, cut_video, span_of, units_of
from ego2robot.jobs.pool import Pool
from ego2robot.remote import RemoteError, is_remote, shown
from ego2robot.sources import SOURCES, Candidate
from ego2robot.sources.base import DEFAULTS, identity
from ego2robot.store import atomic, schema
from ego2robot.store.ledger import Record
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import CLIP_S, ROW_GROUP, VIDEOS, clip_s, n_videos, units_table
from ego2robot.types import Blob, Span, Unit, Video

__all__ = ["Planned", "Probed", "clips_of", "plan", "probed", "probing", "require_units", "units_of"]

# A video of which nothing is heard for so long when it is looked into is given up: here, and where a store
# is asked several times, or a whole video decoded.
PROBE_S, PATIENT_S = 120.0, 600.0
DENIED = 5  # refusals, and nothing else, before a store is given up

# -- probing, in child processes ------------------------------------------------------------------


@dataclass(frozen=True)
class Probed:
    """A video that was looked into: its units of work, none where it is too short, and what is wrong."""

    video: Video
    units: tuple[Unit, ...]
    problems: tuple[VideoError, ...] = ()


def probing(cut: config.Clips, source: config.Source = DEFAULTS) -> Callable[[Candidate], Iterator[Probed]]:
    """The work of a probing child: a candidate to a video with its identity, its headers and its clips."""
    remote.configure(source.cache_gib)

    def probe(candidate: Candidate) -> Iterator[Probed]:
        try:
            blob = sized(candidate.blob)
            info = decode.probe(candidate.name, blob)
            video_id = identity(blob)
        except RemoteError as error:
            raise read_error(candidate.name, error) from None
        except OSError as error:
            cause = error.strerror or str(error)
            raise VideoError(candidate.name, cause, "check the file", "missing") from None
        video = Video(video_id, candidate.name, source.kind, blob, candidate.meta, info)
        yield probed(video, cut, candidate.spans)

    return probe


def probed(video: Video, cut: config.Clips, spans: Sequence[Span] = ()) -> Probed:
    """Cuts a video whose headers are known into clips and units.

    Only a video that makes several units has its keyframes looked up, and only with ``clips.shots`` is
    anything of it decoded.

    Raises:
        VideoError: it cannot be read.
    """
    info = video.info
    assert info is not None
    shots_s = find_cuts(video.name, video.blob, info) if cut.shots else ()
    clips, problems = cut_video(video.name, video.video_id, info, cut, spans, shots_s)
    if not clips and not problems:
        problems = [_too_short(video, cut)]
    keyframes_s = None
    if clips and clips[-1].start_s - clips[0].start_s > span_of(video):
        starts_s = np.array([clip.start_s for clip in clips])
        keyframes_s = keyframes_before(video.name, video.blob, info, starts_s)
    return Probed(video, tuple(units_of(video, clips, keyframes_s)), tuple(problems))


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
        UserError: the source holds nothing to look at, or lets nobody in; or its plan cannot grow.
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
    known = _places(before) if before is not None else frozenset[Place]()
    problems: list[VideoError] = []
    rows = _Rows(problems)
    remote.configure(cfg.source.cache_gib)  # listing may read from afar too
    patient = cfg.clips.shots or is_remote(cfg.source.path) or cfg.source.kind == "manifest"
    timeout_s = PATIENT_S if patient else PROBE_S
    pool = Pool(probing, (cfg.clips, cfg.source), _probing_children(cfg), timeout_s=timeout_s, backlog=256)
    candidates = (found for found in _candidates(cfg, run.path, problems) if _place(found.blob) not in known)
    for event in pool.run(candidates):
        if event.kind == "item":
            rows.add(event.value)
        elif event.kind == "error":
            problems.append(event.value)
            _stop_if_denied(problems, rows.videos, cfg)
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
        stride_s = clip_s(table, run.config.clips)
        about = {VIDEOS: str(n_videos(table)).encode(), CLIP_S: repr(stride_s).encode()}
        atomic.write_parquet(run.plan_path, table.replace_schema_metadata(about), ROW_GROUP)


def _commit_problems(run: RunDir, problems: Sequence[VideoError]) -> None:
    """What could not be used, in place of what an earlier planning found."""
    table = quarantine_table([(None, None, "plan", problem, 1) for problem in problems])
    old = [record.part for record in run.records() if record.info.get("plan")]
    new = run.commit((), {"quarantine": table}, {"plan": True})
    if old:
        run.append(Record("", (), {}, {"plan": True, "instead": new.part}, tuple(old)))


def _probing_children(cfg: config.Config) -> int:
    """One a core; who waits for a store more than it works can be several to a core."""
    cores = os.cpu_count() or 1
    return min(16, 4 * cores) if is_remote(cfg.source.path) and not cfg.clips.shots else min(8, cores)


Place = tuple[str, int, int]


def _place(blob: Blob) -> Place:
    return blob.path, blob.offset, blob.size


def _places(table: pa.Table) -> frozenset[Place]:
    """Where the bytes of planned videos are; also as they are listed where their size is not known yet."""
    places = table.group_by(["path", "offset", "size"]).aggregate([])
    columns = (places[name].to_pylist() for name in ("path", "offset", "size"))
    found = list(zip(*columns, strict=True))
    unsized = [(path, offset, UNKNOWN) for path, offset, _ in found if is_remote(path)]
    return frozenset(found + unsized)


class _Rows:
    """Probed videos as rows of the plan, a batch at a time."""

    def __init__(self, problems: list[VideoError]) -> None:
        self._problems = problems
        self._units: list[Unit] = []
        self._tables: list[pa.Table] = []
        self.videos = 0

    def add(self, found: Probed) -> None:
        self.videos += 1
        self._problems += found.problems
        self._units += found.units
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
    table = new if before is None else pa.concat_tables([before, new], promote_options="default")
    order = pc.sort_indices(table, [("cost_s", "descending"), ("unit_id", "ascending")])
    return table.take(order), len(first) - n_before


def _stop_if_denied(problems: Sequence[VideoError], videos: int, cfg: config.Config) -> None:
    """Raises UserError when a store lets nobody in at all: one line, and not one for each of its files."""
    first = list(itertools.islice((p for p in problems if p.kind != "metadata"), DENIED))
    if not videos and len(first) == DENIED and all(p.kind == "denied" for p in first):
        raise UserError(f"source.path={shown(cfg.source.path)}: {first[0].cause}; {first[0].hint}")


def _candidates(cfg: config.Config, run_dir: Path, problems: list[VideoError]) -> Iterator[Candidate]:
    count = 0
    for found in SOURCES[cfg.source.kind].candidates(cfg.source.path, run_dir, cfg.source):
        if isinstance(found, VideoError):
            problems.append(found)
            _stop_if_denied(problems, count, cfg)
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
    raise UserError(f"source.path={shown(path)}: no usable video ({reasons})")
