"""Proves that a run adds up, or says where it does not.

Part by part: the rows of some units are together in the parts of one commit, so that each is checked against
the plan's rows of its units alone, several at a time, and memory does not depend on the size of the run.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ego2robot.jobs.worker import SCORES
from ego2robot.stages import hand_motion
from ego2robot.store import atomic
from ego2robot.store.ledger import Record
from ego2robot.store.rundir import RunDir
from ego2robot.types import clip_id

TABLES = ("clips", "hands", "quarantine", "embeddings")
NAMED = 20  # clips that a problem names; of more it says how many
PLAN_COLUMNS = ["unit_id", "video_id", "duration_s", "sample_fps", "first", "length"]


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes:
        problems: one line each; empty when everything adds up.
        planned, kept, dropped, failed, left: clips; the first is the sum of the others.
        units_left: units that no worker has committed yet.
        files: checked files.
        rows: rows in them.
        broken: part to its units whose rows cannot be trusted; all of them where a file is damaged.
        strays: files of tables that no ledger record names.
    """

    problems: tuple[str, ...]
    planned: int
    kept: int
    dropped: int
    failed: int
    left: int
    units_left: int
    files: int
    rows: int
    broken: Mapping[str, frozenset[str]] = field(default_factory=dict)
    strays: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass
class _Found:
    """What the check of one commit found."""

    problems: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    decisions: Counter[str] = field(default_factory=Counter)
    files: int = 0
    rows: int = 0

    def say(self, text: str, units: Iterable[str | None] = ()) -> None:
        self.problems.append(text)
        self.broken.update(unit for unit in units if unit is not None)

    def each(self, clips: Sequence[str], text: str, owner: Mapping[str, str]) -> None:
        """One line for each of some clips; ``text`` has ``{}`` for the clip."""
        for clip in clips[:NAMED]:
            self.say(text.format(clip), [owner.get(clip)])
        self.broken.update(owner[clip] for clip in clips if clip in owner)
        if len(clips) > NAMED:
            self.say(text.format(f"… and {len(clips) - NAMED} more clips"))


def verify(run: RunDir, threads: int | None = None) -> Verdict:
    """Checks every invariant of a run directory. Reads everything once, changes nothing.

    Files: each one named by the ledger is there, with its checksum and row count, and no other part
    is. Units: each is committed once at most. Clips: each planned clip of a committed unit has exactly one
    row, inside its video, with a decision and, unless kept, a reason. Embeddings: exactly the kept clips, all
    finite, none zero (but hand_motion of a clip without hands).
    Hands: only clips that exist, finite.
    """
    if not run.planned:
        return Verdict(
            ("the plan is missing; run the same command again to make it",), 0, 0, 0, 0, 0, 0, 0, 0
        )
    plan = _Plan(pq.read_table(run.plan_path, columns=PLAN_COLUMNS))
    problems = [
        f"ledger/{n:08}.json: damaged; what it held is done again" for n in run.ledger.damaged
    ] + plan.problems()
    records = run.records()
    seen = Counter(unit for record in records for unit in record.units)
    broken: dict[str, frozenset[str]] = {}
    twice = {unit for unit, n in seen.items() if n > 1}
    problems += [f"ledger: unit {unit} is committed {seen[unit]} times" for unit in sorted(twice)]
    decisions: Counter[str] = Counter()
    files = rows = 0
    embeddings = run.embeddings()
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        for record, found in zip(
            records, pool.map(lambda one: _check(run.path, one, plan, embeddings), records), strict=True
        ):
            problems += found.problems
            found.broken |= twice & set(record.units)
            if found.broken:
                broken[record.part] = frozenset(found.broken)
            decisions += found.decisions
            files += found.files
            rows += found.rows
    named = {file for record in records for file in record.files}
    strays = sorted(
        relative
        for path in run.path.glob("**/part-*.parquet")
        if (relative := path.relative_to(run.path).as_posix()).split("/")[0] in TABLES
        and relative not in named
    )
    problems += [f"{stray}: no ledger record names it; `ego2robot repair` removes it" for stray in strays]
    done = plan.mask(seen)
    left, planned = int(plan.n_clips[~done].sum()), int(plan.n_clips.sum())
    total = decisions["kept"] + decisions["dropped"] + decisions["failed"] + left
    if total != planned:
        problems.append(f"clips: {planned} planned, but kept + dropped + failed + left = {total}")
    return Verdict(
        tuple(problems),
        planned,
        decisions["kept"],
        decisions["dropped"],
        decisions["failed"],
        left,
        int((~done).sum()),
        files,
        rows,
        broken,
        tuple(strays),
    )


class _Plan:
    """The plan's rows, found by unit."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self._ids = pa.array(self._table["unit_id"].combine_chunks(), pa.string())
        self._row = {unit: i for i, unit in enumerate(self._ids.to_pylist())}
        self.n_clips = pc.list_value_length(self._table["length"]).to_numpy().astype(np.int64)

    def problems(self) -> list[str]:
        return ["plan: unit ids are not unique"] if len(self._row) < len(self._ids) else []

    def mask(self, units: Iterable[str]) -> np.ndarray:
        found = np.zeros(len(self._ids), bool)
        found[[self._row[unit] for unit in units if unit in self._row]] = True
        return found

    def clips(self, units: Sequence[str]) -> tuple[dict[str, str], dict[str, float], list[str]]:
        """Each clip's unit, each clip's video's duration, and the units that are not in the plan."""
        owner: dict[str, str] = {}
        durations: dict[str, float] = {}
        rows = [self._row[unit] for unit in units if unit in self._row]
        for row in self._table.take(pa.array(rows, pa.int64())).to_pylist():
            for first, n in zip(row["first"], row["length"], strict=True):
                clip = clip_id(row["video_id"], first, n, row["sample_fps"])
                owner[clip], durations[clip] = row["unit_id"], row["duration_s"]
        return owner, durations, [unit for unit in units if unit not in self._row]


def _check(folder: Path, record: Record, plan: _Plan, embeddings: Sequence[str]) -> _Found:
    """Everything that one record names."""
    found = _Found()
    owner, durations, unknown = plan.clips(record.units)
    for unit in unknown:
        found.say(f"ledger: unit {unit} is not in the plan", [unit])
    whole = set()
    for relative, expected in record.files.items():
        problem = _file_problem(folder, relative, expected)
        if problem:
            found.say(problem, record.units or [""])
        else:
            whole.add(relative)
        found.files += 1
        found.rows += expected["rows"]
    clips = f"clips/part-{record.part}.parquet"
    if clips in record.files and clips not in whole:
        return found  # nothing can be said about the rest
    kept, handless = _check_clips(folder / clips if clips in whole else None, owner, durations, found)
    for name in embeddings:
        relative = f"embeddings/{name}/part-{record.part}.parquet"
        if relative in record.files and relative not in whole:
            continue
        may_be_zero = handless if name == hand_motion.NAME else frozenset()
        path = folder / relative if relative in whole else None
        _check_embedding(path, name, kept, may_be_zero, owner, found)
    hands = f"hands/part-{record.part}.parquet"
    if hands in whole:
        _check_hands(folder / hands, owner, found)
    return found


def _file_problem(folder: Path, relative: str, expected: Mapping[str, object]) -> str | None:
    path = folder / relative
    if not path.is_file():
        return f"{relative}: missing, though the ledger names it"
    try:
        if atomic.sha256(path) != expected["sha256"]:
            return f"{relative}: its checksum is not the ledger's; the file was changed or damaged"
        rows = pq.read_metadata(path).num_rows
    except OSError as error:
        return f"{relative}: cannot be read ({error.strerror or error})"
    if rows != expected["rows"]:
        return f"{relative}: {rows} rows, the ledger says {expected['rows']}"
    return None


def _batches(path: Path | None, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if path is not None:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(1 << 15, columns=list(columns))


def _check_clips(
    path: Path | None, owner: Mapping[str, str], durations: Mapping[str, float], found: _Found
) -> tuple[frozenset[str], frozenset[str]]:
    """The rows of ``clips``. Returns the clips that were kept, and those in which no hand was seen."""
    seen: Counter[str] = Counter()
    kept: set[str] = set()
    handless: set[str] = set()
    columns = ["clip_id", "decision", "reason", "start_s", "end_s", "n_frames", *SCORES]
    for batch in _batches(path, columns):
        ids = batch["clip_id"].to_pylist()
        seen.update(ids)
        found.decisions.update(batch["decision"].to_pylist())
        names = np.array(ids, object)

        def pick(mask: object, names: np.ndarray = names) -> list[str]:
            return list(names[np.asarray(mask, bool)])

        is_kept = np.asarray(pc.equal(batch["decision"], "kept"))
        kept.update(pick(is_kept))
        seen_hand = pc.fill_null(pc.greater(batch["hand_visibility"], 0), False)
        handless.update(pick(~np.asarray(seen_hand)))
        rows = zip(ids, batch["decision"].to_pylist(), batch["reason"].to_pylist(), strict=True)
        for clip, decision, reason in rows:
            if decision not in ("kept", "dropped", "failed"):
                found.say(f"clips: {clip} has the decision {decision!r}", [owner.get(clip)])
            if (decision == "kept") != (reason is None):
                found.say(f"clips: {clip} is {decision} with the reason {reason!r}", [owner.get(clip)])
        start, end = (batch[name].to_numpy() for name in ("start_s", "end_s"))
        step = (end - start) / np.maximum(batch["n_frames"].to_numpy(), 1)
        length = np.array([durations.get(clip, math.inf) for clip in ids])
        inside = (start >= 0) & (start < end) & (end <= length + step + 1e-6)
        for at in np.flatnonzero(~inside):
            text = f"clips: {ids[at]} spans {start[at]} to {end[at]} s of a {length[at]:.3f} s video"
            found.say(text, [owner.get(ids[at])])
        for score in SCORES:
            values = batch[score].to_numpy(zero_copy_only=False)
            there = np.asarray(batch[score].is_valid())
            limit = math.inf if score == "camera_motion" else 1
            for at in np.flatnonzero(there & ~((values >= 0) & (values <= limit))):
                found.say(f"clips: {ids[at]} has {score} {values[at]}", [owner.get(ids[at])])
        unmoved = is_kept & np.asarray(batch["motion"].is_null())
        found.each(pick(unmoved), "clips: {} is kept without a motion score", owner)
    found.each([c for c, n in seen.items() if n > 1], "clips: {} occurs twice", owner)
    found.each([c for c in seen if c not in owner], "clips: {} is not in the plan of its units", owner)
    found.each(
        [c for c in owner if c not in seen], "clips: {} was planned and committed and has no row", owner
    )
    return frozenset(kept), frozenset(handless)


def _check_embedding(
    path: Path | None,
    name: str,
    kept: frozenset[str],
    may_be_zero: frozenset[str],
    owner: Mapping[str, str],
    found: _Found,
) -> None:
    seen: Counter[str] = Counter()
    for batch in _batches(path, ["clip_id", "embedding"]):
        ids = batch["clip_id"].to_pylist()
        seen.update(ids)
        vectors = np.asarray(batch["embedding"].flatten()).reshape(len(ids), -1).astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1)
        for at in np.flatnonzero(~np.isfinite(norms) | (norms == 0)):
            if norms[at] != 0 or ids[at] not in may_be_zero:
                found.say(f"embeddings/{name}: {ids[at]} has norm {norms[at]}", [owner.get(ids[at])])
    here = f"embeddings/{name}: "
    found.each([c for c, n in seen.items() if n > 1], here + "{} occurs twice", owner)
    found.each(sorted(seen.keys() - kept), here + "{} is no kept clip", owner)
    found.each(sorted(kept - seen.keys()), here + "kept clip {} has no vector", owner)


def _check_hands(path: Path, owner: Mapping[str, str], found: _Found) -> None:
    strange: set[str] = set()
    broken: set[str] = set()
    for batch in _batches(path, ["clip_id", "landmarks", "box"]):
        ids = np.array(batch["clip_id"].to_pylist(), object)
        strange.update(set(ids) - owner.keys())
        for column in ("landmarks", "box"):
            values = np.asarray(batch[column].flatten()).reshape(len(ids), -1)
            broken.update(ids[~np.isfinite(values).all(axis=1)])
    found.each(sorted(strange), "hands: clip {} has no row in clips", owner)
    found.each(sorted(broken), "hands: clip {} has landmarks that are not finite", owner)
