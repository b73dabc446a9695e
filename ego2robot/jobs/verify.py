"""Proves that a run adds up, or says where it does not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from ego2robot.jobs.worker import SCORES
from ego2robot.stages import hand_motion
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_from_table


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes:
        problems: one line each; empty when everything adds up.
        planned, kept, dropped, failed, left: clips; the first is the sum of the others.
        units_left: units that no worker has committed yet.
        files: checked files.
        rows: rows in them.
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

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(run: RunDir) -> Verdict:
    """Checks every invariant of a run directory. Reads everything once, changes nothing.

    Files: each one named by the ledger is there, with its checksum and row count, and no other part
    is. Clips: each planned clip of a committed unit has exactly one row, inside its video, with a
    decision and, unless kept, a reason. Embeddings: exactly the kept clips, all finite, none zero
    (but hand_motion of a clip without hands).
    Hands: only clips that exist, finite.
    """
    if not run.planned:
        return Verdict(("the plan is missing; run the same command again to make it",), *[0] * 8)
    problems: list[str] = []
    units = {unit.unit_id: unit for unit in units_from_table(run.units())}
    seen: Counter[str] = Counter()
    n_files = n_rows = 0
    named = set()
    whole: set[str] = set()
    for record in run.records():
        seen.update(record.units)
        for relative, expected in record.files.items():
            named.add(relative)
            problem = _file_problem(run, relative, expected)
            if problem:
                problems.append(problem)
            else:
                whole.add(relative)
            n_files += 1
            n_rows += expected["rows"]
    problems += [f"ledger: unit {u} is committed {n} times" for u, n in seen.items() if n > 1]
    problems += [f"ledger: unit {u} is not in the plan" for u in seen if u not in units]
    for path in sorted(run.path.glob("**/part-*.parquet")):
        relative = path.relative_to(run.path).as_posix()
        if relative.split("/")[0] in ("clips", "hands", "quarantine", "embeddings") and relative not in named:
            problems.append(f"{relative}: no ledger record names it; run the job again to remove it")

    planned = {c.clip_id: u for u in units.values() for c in u.clips}
    if len(planned) != sum(len(u.clips) for u in units.values()):
        problems.append("plan: clip ids are not unique")
    decisions: dict[str, str] = {}
    handless: set[str] = set()
    for row in _rows(run, "clips", whole):
        clip, unit = row["clip_id"], planned.get(row["clip_id"])
        if clip in decisions:
            problems.append(f"clips: {clip} occurs twice")
        decisions[clip] = row["decision"]
        if not row["hand_visibility"]:
            handless.add(clip)
        if unit is None:
            problems.append(f"clips: {clip} is not in the plan")
            continue
        if unit.unit_id not in seen:
            problems.append(f"clips: {clip} belongs to unit {unit.unit_id}, which is not committed")
        problems += _row_problems(row, unit.video.info.duration_s if unit.video.info else 0.0)
    missing = [c for c, unit in planned.items() if unit.unit_id in seen and c not in decisions]
    problems += [f"clips: {c} was planned and committed and has no row" for c in missing]

    kept = {c for c, decision in decisions.items() if decision == "kept"}
    for name in run.embeddings():
        may_be_zero = handless if name == hand_motion.NAME else set()
        problems += _embedding_problems(run, name, kept, may_be_zero, whole)
    for row in _rows(run, "hands", whole, ["clip_id", "landmarks", "box"]):
        if row["clip_id"] not in decisions:
            problems.append(f"hands: clip {row['clip_id']} has no row in clips")
        if not np.isfinite(row["landmarks"]).all() or not np.isfinite(row["box"]).all():
            problems.append(f"hands: clip {row['clip_id']} has landmarks that are not finite")
    count = Counter(decisions.values())
    units_left = sum(unit not in seen for unit in units)
    left = sum(len(unit.clips) for unit in units.values() if unit.unit_id not in seen)
    total = count["kept"] + count["dropped"] + count["failed"] + left
    if total != len(planned):
        problems.append(f"clips: {len(planned)} planned, but kept + dropped + failed + left = {total}")
    return Verdict(
        tuple(problems),
        len(planned),
        count["kept"],
        count["dropped"],
        count["failed"],
        left,
        units_left,
        n_files,
        n_rows,
    )


def _file_problem(run: RunDir, relative: str, expected: object) -> str | None:
    assert isinstance(expected, dict)
    path = run.path / relative
    if not path.is_file():
        return f"{relative}: missing, though the ledger names it"
    if atomic.sha256(path) != expected["sha256"]:
        return f"{relative}: its checksum is not the ledger's; the file was changed or damaged"
    rows = pq.read_metadata(path).num_rows
    if rows != expected["rows"]:
        return f"{relative}: {rows} rows, the ledger says {expected['rows']}"
    return None


def _rows(run: RunDir, name: str, whole: set[str], columns: list[str] | None = None) -> Iterator[dict]:
    """The rows of a table's undamaged files, one file's batch at a time."""
    for relative in sorted(r for r in whole if r.startswith(name + "/")):
        with pq.ParquetFile(run.path / relative) as file:
            for batch in file.iter_batches(4096, columns=columns):
                yield from batch.to_pylist()


def _row_problems(row: dict, duration_s: float) -> list[str]:
    clip, found = row["clip_id"], []
    if row["decision"] not in ("kept", "dropped", "failed"):
        found.append(f"clips: {clip} has the decision {row['decision']!r}")
    if (row["decision"] == "kept") != (row["reason"] is None):
        found.append(f"clips: {clip} is {row['decision']} with the reason {row['reason']!r}")
    step = (row["end_s"] - row["start_s"]) / max(row["n_frames"], 1)
    if not 0 <= row["start_s"] < row["end_s"] <= duration_s + step + 1e-6:
        found.append(
            f"clips: {clip} spans {row['start_s']} to {row['end_s']} s of a {duration_s:.3f} s video"
        )
    for score in SCORES:
        value = row[score]
        limit = math.inf if score == "camera_motion" else 1
        if value is not None and not 0 <= value <= limit:
            found.append(f"clips: {clip} has {score} {value}")
    if row["decision"] == "kept" and row["motion"] is None:
        found.append(f"clips: {clip} is kept without a motion score")
    return found


def _embedding_problems(
    run: RunDir, name: str, kept: set[str], may_be_zero: set[str], whole: set[str]
) -> list[str]:
    found: list[str] = []
    ids: set[str] = set()
    for relative in sorted(r for r in whole if r.startswith(f"embeddings/{name}/")):
        with pq.ParquetFile(run.path / relative) as file:
            for batch in file.iter_batches(4096):
                clip_ids = batch.column("clip_id").to_pylist()
                column = batch.column("embedding")
                vectors = np.asarray(column.flatten()).reshape(len(clip_ids), -1).astype(np.float32)
                norms = np.linalg.norm(vectors, axis=1)
                for clip, norm in zip(clip_ids, norms, strict=True):
                    if clip in ids:
                        found.append(f"embeddings/{name}: {clip} occurs twice")
                    if not np.isfinite(norm) or (norm == 0 and clip not in may_be_zero):
                        found.append(f"embeddings/{name}: {clip} has norm {norm}")
                    ids.add(clip)
    found += [f"embeddings/{name}: {c} is no kept clip" for c in sorted(ids - kept)]
    found += [f"embeddings/{name}: kept clip {c} has no vector" for c in sorted(kept - ids)]
    return found
