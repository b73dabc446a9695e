"""Ego4D: the videos that its client fetched, and their narrations.

``ego4d.json`` lies above ``full_scale/<video_uid>.mp4``, ``video_540ss/…`` and ``clips/<clip_uid>.mp4``;
``annotations/narration.json`` beside them. A clip is a part of a video, as ``ego4d.json`` or ``clips.csv``
says; its narrations are those of that part, in its own time.

A narration is a moment, not a span. Its span here reaches half the way to the narrations before and after
it, at least ``MIN_REACH_S`` and at most ``MAX_REACH_S``. The first annotator's are used, the second's where
there is no first; what others than the camera's wearer do (``#O``) is left out and counted in the meta.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ego2robot import config
from ego2robot.errors import UserError, VideoError
from ego2robot.sources.base import DEFAULTS, Candidate, Source, display_name, file_blob, find_files, storable
from ego2robot.sources.tables import Counted, csv_rows, json_items
from ego2robot.types import Span

VIDEOS = (".mp4",)
MANIFEST = "ego4d.json"
NARRATIONS = ("narration.json", "narrations.json", "all_narrations_redacted.json")
CLIPS = ("clips.csv", "clips/manifest.csv")
CLIP_COLUMNS = ("exported_clip_uid", "parent_video_uid", "parent_start_sec", "parent_end_sec")
PASSES = ("narration_pass_1", "narration_pass_2")
MIN_REACH_S, MAX_REACH_S = 0.5, 3.0
TAG = re.compile(r"\s*#\s*([A-Za-z]+)\s*")
OWN, OTHERS = "C", "O"
# Of a video in ego4d.json, taken over as they are.
KEPT = (
    "device",
    "video_source",
    "physical_setting_name",
    "fb_participant_id",
    "is_stereo",
    "has_redacted_regions",
)


@dataclass(frozen=True)
class _Part:
    """The part of a video that a clip is."""

    video: str
    start_s: float
    end_s: float


@dataclass
class _Known:
    """What the annotation files say of the videos that are there.

    Attributes:
        narrations: by video, (seconds, text, annotation) as compressed JSON: texts of millions of
            narrations are held for the whole of the dataset.
    """

    wanted: set[str]
    meta: dict[str, dict[str, str]] = field(default_factory=dict)
    duration: dict[str, float] = field(default_factory=dict)
    clips: dict[str, _Part] = field(default_factory=dict)
    narrations: dict[str, bytes] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    def videos(self) -> set[str]:
        """Those that are there, whole or in clips."""
        return self.wanted | {part.video for part in self.clips.values()}


class Ego4D(Source):
    def candidates(
        self, path: str, skip: Path | None, options: config.Source = DEFAULTS
    ) -> Iterator[Candidate | VideoError]:
        videos = find_files(path, VIDEOS, skip, "videos")
        manifest, clips, narrations = _annotations(path, options)
        known = _Known({file.stem for file in videos})
        for read, file in ((_read_manifest, manifest), (_read_clips, clips), (_read_narrations, narrations)):
            if file:
                yield from read(file, known)
        if absent := len(known.meta.keys() - known.videos()):
            cause = f"{absent:,} videos of {MANIFEST} are not there"
            yield VideoError(path, cause, "fetch them too, if they are wanted", "missing")
        first: dict[str, str] = {}
        for file in videos:
            name, uid = display_name(file, path), file.stem
            if uid in first:
                yield VideoError(name, f"a second {uid}, besides {first[uid]}", "remove one", "duplicate")
                continue
            first[uid] = name
            try:
                blob = file_blob(file)
            except VideoError as error:
                yield error
                continue
            yield _candidate(name, uid, blob, known, manifest, narrations)


def _candidate(
    name: str, uid: str, blob: Any, known: _Known, manifest: Path | None, narrations: Path | None
) -> Candidate:
    part = known.clips.get(uid)
    video = part.video if part else uid
    meta = {"video_uid": video, **known.meta.get(video, {})}
    if part:
        meta |= {"clip_uid": uid, "parent_start_s": f"{part.start_s:g}", "parent_end_s": f"{part.end_s:g}"}
    if video in known.others:
        meta["narrations_of_others"] = str(known.others[video])
    spans = _spans(known.narrations.get(video), part, known.duration.get(video))
    wrong = []
    if manifest and video not in known.meta:
        wrong.append(f"not in {MANIFEST}")
    if not narrations:
        wrong.append(f"no {NARRATIONS[0]}; set source.annotations to the folder that has it")
    elif not spans:
        wrong.append(f"no narration in {narrations.name}")
    problem = VideoError(name, "; ".join(wrong), "used without it", "metadata") if wrong else None
    return Candidate(name, blob, meta, problem, tuple(spans))


# -- finding and reading --------------------------------------------------------------------------


def _annotations(path: str, options: config.Source) -> tuple[Path | None, Path | None, Path | None]:
    """The manifest, the table of clips and the narrations, where they are."""
    root = Path(path).expanduser()
    root = root if root.is_dir() else root.parent
    folders = [root, root / "annotations", root.parent, root.parent / "annotations"]
    named = None
    if options.annotations:
        where = Path(options.annotations).expanduser()
        if not where.exists():
            raise UserError(f"source.annotations={options.annotations}: no such file or folder")
        named = where if where.is_file() else None
        home = where.parent if named else where
        folders = [home, home / "annotations", *folders]

    def first(names: tuple[str, ...]) -> Path | None:
        files = (folder / name for folder in folders for name in names)
        return next((file for file in files if file.is_file()), None)

    narrations = named if named and named.suffix == ".json" and named.name != MANIFEST else first(NARRATIONS)
    return first((MANIFEST,)), first(CLIPS), narrations


def _read_manifest(path: Path, known: _Known) -> Iterator[VideoError]:
    bad = Counted(path)
    seen: set[str] = set()
    try:
        for index, video in json_items(path, "videos"):
            uid = video.get("video_uid") if isinstance(video, dict) else None
            if not isinstance(uid, str):
                bad.add("no video_uid", f"number {index}")
            elif uid in seen:
                bad.add("its video_uid was there before", f"number {index}")
            else:
                seen.add(uid)
                _keep(uid, video, known)
        for index, clip in json_items(path, "clips"):
            keys = ("clip_uid", "video_uid", "video_start_sec", "video_end_sec")
            values = [clip.get(key) if isinstance(clip, dict) else None for key in keys]
            if reason := _add_clip(known, *values):
                bad.add(reason, f"clip number {index}")
    except VideoError as error:
        yield error
    yield from bad.problems("entry")


def _keep(uid: str, video: Mapping[str, Any], known: _Known) -> None:
    meta = {
        key: storable(str(value))
        for key in KEPT
        if isinstance(value := video.get(key), str | int | bool) and str(value)
    }
    scenarios = video.get("scenarios")
    if isinstance(scenarios, list):
        meta["scenarios"] = "; ".join(storable(s) for s in scenarios if isinstance(s, str))
    known.meta[uid] = meta
    if (length := _number(video.get("duration_sec"))) is not None and length > 0:
        known.duration[uid] = length


def _read_clips(path: Path, known: _Known) -> Iterator[VideoError]:
    bad = Counted(path)
    try:
        for line, row in csv_rows(path, CLIP_COLUMNS):
            if reason := _add_clip(known, *(row.get(key) for key in CLIP_COLUMNS)):
                bad.add(reason, f"line {line}")
    except VideoError as error:
        yield error
    yield from bad.problems()


def _add_clip(known: _Known, clip: Any, video: Any, start: Any, end: Any) -> str | None:
    """Takes over one clip, or says why not."""
    start_s, end_s = _number(start), _number(end)
    if not isinstance(clip, str) or not isinstance(video, str) or start_s is None or end_s is None:
        return "a field is missing or no number"
    if not 0 <= start_s < end_s:
        return "it ends before it starts"
    if clip in known.wanted:
        known.clips.setdefault(clip, _Part(video, start_s, end_s))
    return None


def _read_narrations(path: Path, known: _Known) -> Iterator[VideoError]:
    bad = Counted(path)
    wanted = known.videos()
    try:
        found = False
        for inside in (("videos",), ()):  # the newer form has the videos in a member of their own
            for uid, video in json_items(path, *inside):
                found = True
                if uid in wanted:
                    _narrations(uid, video, known, bad)
            if found:
                break
    except VideoError as error:
        yield error
    yield from bad.problems("narration")


def _narrations(uid: str, video: Any, known: _Known, bad: Counted) -> None:
    kept: list[tuple[float, str, str, str]] = []
    others = 0
    for name in PASSES:
        of_pass = video.get(name) if isinstance(video, dict) else None
        listed = of_pass.get("narrations") if isinstance(of_pass, dict) else None
        for index, one in enumerate(listed if isinstance(listed, list) else ()):
            where = f"{uid}, {name}, number {index}"
            text = one.get("narration_text") if isinstance(one, dict) else None
            moment = _number(one.get("timestamp_sec")) if isinstance(one, dict) else None
            if not isinstance(text, str) or not text.strip() or moment is None:
                bad.add("no text or no time", where)
            elif moment < 0 or moment > known.duration.get(uid, math.inf) + 1:
                bad.add("its time is outside of the video", where)
            elif _tag(text) == OTHERS:
                others += 1
            else:
                kept.append((moment, storable(text), storable(str(one.get("annotation_uid") or "")), name))
        if kept:
            break
    if others:
        known.others[uid] = others
    if kept:
        kept.sort(key=lambda narration: narration[0])
        known.narrations[uid] = zlib.compress(json.dumps(kept).encode(), 1)


# -- spans ----------------------------------------------------------------------------------------


def _spans(packed: bytes | None, part: _Part | None, length: float | None) -> list[Span]:
    if packed is None:
        return []
    told: dict[float, list[list[str]]] = {}
    for moment, *narration in json.loads(zlib.decompress(packed)):
        told.setdefault(moment, []).append(narration)
    begin, end = (part.start_s, part.end_s) if part else (0.0, length or math.inf)
    moments = sorted(told)
    found = []
    for k, moment in enumerate(moments):
        if not begin <= moment <= end:
            continue
        before = (moment - moments[k - 1]) / 2 if k else MAX_REACH_S
        after = (moments[k + 1] - moment) / 2 if k + 1 < len(moments) else MAX_REACH_S
        reach = (min(MAX_REACH_S, max(MIN_REACH_S, way)) for way in (before, after))
        start_s, end_s = moment - next(reach), moment + next(reach)
        now = told[moment]
        meta = {
            "task": "; ".join(dict.fromkeys(task_of(text) for text, _, _ in now)),
            "narration": "; ".join(text.strip() for text, _, _ in now),
            "narration_timestamp_s": f"{moment:g}",
            "narration_pass": now[0][2],
        }
        if now[0][1]:
            meta["annotation_uid"] = now[0][1]
        found.append(Span(max(begin, start_s) - begin, min(end, end_s) - begin, meta))
    return [span for span in found if span.end_s > span.start_s]


def _tag(text: str) -> str:
    match = TAG.match(text)
    return match[1].upper() if match else ""


def task_of(narration: str) -> str:
    """``#C C picks a bag from the floor`` → ``picks a bag from the floor``; other tags stay as they are."""
    match = TAG.match(narration)
    if match is None or match[1].upper() != OWN:
        return " ".join(narration.split())
    rest = narration[match.end() :].split()
    return " ".join(rest[1:] if rest[:1] == [OWN] and len(rest) > 1 else rest)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
