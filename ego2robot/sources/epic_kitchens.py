"""EPIC-KITCHENS-100: videos and the actions that are annotated in them.

``<participant>/videos/<video_id>.MP4`` (or any other folders: a video is known by its name), and beside
them or under ``source.annotations`` the files of ``epic-kitchens-100-annotations``:
``EPIC_100_train.csv`` and ``EPIC_100_validation.csv`` with 15 columns, ``EPIC_100_test_timestamps.csv``,
which has times but no narrations, and ``EPIC_100_video_info.csv``. Each action is a span whose task is its
narration; the start and stop times are used, not the frames, whose rate differs between videos.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ego2robot import config
from ego2robot.errors import UserError, VideoError
from ego2robot.sources.base import DEFAULTS, Candidate, Source, display_name, file_blob, find_files, storable
from ego2robot.sources.tables import Counted, csv_rows
from ego2robot.types import Span

VIDEOS = (".mp4",)
ACTIONS = re.compile(r"EPIC_100_(train|validation|test_timestamps)\.csv")
INFO = "EPIC_100_video_info.csv"
TIME = re.compile(r"(\d{1,3}):([0-5]\d):([0-5]\d(?:\.\d+)?)")
NEEDED = ("narration_id", "video_id", "start_timestamp", "stop_timestamp")
KEPT = (
    "narration_id",
    "participant_id",
    "narration_timestamp",
    "verb",
    "verb_class",
    "noun",
    "noun_class",
    "all_nouns",
    "all_noun_classes",
)
SEPARATOR = "\x1f"


@dataclass
class _Annotations:
    """What the CSVs say, by video: a span is (start, end, split, its fields as one text)."""

    spans: dict[str, list[tuple[float, float, str, str]]] = field(default_factory=dict)
    info: dict[str, Mapping[str, str]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


class EpicKitchens(Source):
    def candidates(
        self, path: str, skip: Path | None, options: config.Source = DEFAULTS
    ) -> Iterator[Candidate | VideoError]:
        videos = find_files(path, VIDEOS, skip, "videos")
        known = _Annotations()
        yield from _read(path, skip, options, known)
        first: dict[str, str] = {}
        for file in videos:
            name, video = display_name(file, path), file.stem
            if video in first:
                yield VideoError(name, f"a second {video}, besides {first[video]}", "remove one", "duplicate")
                continue
            first[video] = name
            try:
                blob = file_blob(file)
            except VideoError as error:
                yield error
                continue
            meta = {"video_id": video, "participant_id": video.partition("_")[0], **known.info.get(video, {})}
            spans = tuple(_span(*found) for found in known.spans.get(video, ()))
            problem = None
            if not spans:
                cause = f"no action of it in {', '.join(file.name for file in known.files)}"
                problem = VideoError(name, cause, "give the annotation file that has it", "metadata")
            yield Candidate(name, blob, meta, problem, spans)
        lost = {video: len(spans) for video, spans in known.spans.items() if video not in first}
        if lost:
            some = storable(", ".join(sorted(lost)[:3])) + (" …" if len(lost) > 3 else "")
            cause = (
                f"{sum(lost.values()):,} actions not used: their {len(lost):,} videos are not there ({some})"
            )
            yield VideoError(path, cause, "fetch the videos too, if they are wanted", "missing")


def _read(path: str, skip: Path | None, options: config.Source, into: _Annotations) -> Iterator[VideoError]:
    """Reads the annotations. Raises UserError where there are none at all."""
    video = Path(path).expanduser()
    where = options.annotations or (str(video.parent) if video.is_file() else path)
    named = Path(where).expanduser()
    try:
        found = [named] if named.is_file() else find_files(where, (".csv",), skip, "CSV files")
    except UserError as error:
        raise UserError(f"{_NO_ANNOTATIONS} ({error})") from None
    # The same file may lie in several places: the first is read.
    by_name = {file.name: file for file in reversed(found)}
    into.files = [file for name, file in sorted(by_name.items()) if ACTIONS.fullmatch(name)]
    if named.is_file():  # named outright: taken for actions whatever it is called
        into.files = [named]
        by_name = {file.name: file for file in named.parent.glob(INFO)}
    if not into.files:
        raise UserError(f"{where}: {_NO_ANNOTATIONS}")
    ids: set[str] = set()
    for file in into.files:
        bad = Counted(file)
        try:
            for line, row in csv_rows(file, NEEDED):
                if reason := _add(row, file, ids, into):
                    bad.add(reason, f"line {line}")
        except VideoError as error:
            yield error
        yield from bad.problems()
    for spans in into.spans.values():
        spans.sort()
    if INFO in by_name:
        try:
            for _, row in csv_rows(by_name[INFO], ("video_id",)):
                kept = {k: row[k] for k in ("duration", "fps", "resolution") if row.get(k)}
                into.info[row["video_id"]] = {f"annotated_{k}": storable(v) for k, v in kept.items()}
        except VideoError as error:
            yield error


_NO_ANNOTATIONS = (
    "no EPIC_100_train.csv, EPIC_100_validation.csv or EPIC_100_test_timestamps.csv; "
    "set source.annotations to the folder of epic-kitchens-100-annotations"
)


def _add(row: Mapping[str, str], file: Path, ids: set[str], into: _Annotations) -> str | None:
    """Takes over one action, or says why not."""
    if any(not row.get(name) for name in NEEDED):
        return "a field is missing"
    start, end = seconds(row["start_timestamp"]), seconds(row["stop_timestamp"])
    if start is None or end is None:
        return "its times are not HH:MM:SS.ss"
    if end <= start:
        return "it ends before it starts"
    if row["narration_id"] in ids:
        return "its narration_id was there before"
    ids.add(row["narration_id"])
    fields = SEPARATOR.join((row.get(name) or "").replace(SEPARATOR, " ") for name in (*KEPT, "narration"))
    split = match[1] if (match := ACTIONS.fullmatch(file.name)) else ""
    into.spans.setdefault(row["video_id"], []).append((start, end, split, fields))
    return None


def seconds(text: str) -> float | None:
    """``HH:MM:SS.ss`` as seconds; None for anything else."""
    match = TIME.fullmatch(text.strip())
    return 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3]) if match else None


def _span(start: float, end: float, split: str, fields: str) -> Span:
    *kept, narration = fields.split(SEPARATOR)
    meta = {name: storable(text) for name, text in zip(KEPT, kept, strict=True) if text}
    if split:
        meta["split"] = split.removesuffix("_timestamps")
    if narration:
        meta["task"] = storable(narration)
    return Span(start, end, meta)
