"""How far a run is, from its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc

from ego2robot.store.rundir import RunDir


@dataclass(frozen=True)
class Status:
    """The state of a run directory.

    Attributes:
        state: ``planning``, ``curating``, ``curated`` (every clip decided) or ``finished`` (report written).
        clips_per_s: of the latest start, None before it measured any.
        eta_s: None when nothing is left, or no rate is known.
        stalls: "A waits for B" to the share of A's time, of the latest start; the largest first.
        refused: error class to number of units or videos in quarantine.
    """

    run: str
    state: str
    videos: int
    units: int
    units_done: int
    clips: int
    clips_done: int
    kept: int
    dropped: int
    failed: int
    clips_per_s: float | None
    video_hours_per_hour: float | None
    eta_s: float | None
    stalls: dict[str, float]
    refused: dict[str, int]
    embeddings: list[str]
    skills: int | None
    episodes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def status(run: RunDir) -> Status:
    """Reads the plan, the ledger and the last metrics line of a run."""
    done_units = run.committed_units()
    videos = units = clips = clips_done = 0
    if run.planned:
        table = run.units().select(["unit_id", "video_id", "length"])
        lengths = pc.list_value_length(table["length"]).to_pylist()
        ids = table["unit_id"].to_pylist()
        videos, units, clips = pc.count_distinct(table["video_id"]).as_py(), len(ids), sum(lengths)
        clips_done = sum(n for unit, n in zip(ids, lengths, strict=True) if unit in done_units)
    decisions = _counts(run, "clips", "decision")
    metrics = [line for line in run.metrics() if "clips" in line]
    rate = video_rate = eta = None
    if metrics and metrics[-1]["elapsed_s"] > 0 and metrics[-1]["clips"]:
        rate = metrics[-1]["clips"] / metrics[-1]["elapsed_s"]
        video_rate = metrics[-1]["video_s"] / metrics[-1]["elapsed_s"]
        eta = (clips - clips_done) / rate if clips > clips_done else None
    skills = run.skills()
    info = RunDir(run.config.export.path or run.path / "dataset").read_json("meta/info.json")
    finished = (run.path / "report.html").is_file() and clips_done == clips
    state = "planning" if not run.planned else "curating" if clips_done < clips else "curated"
    return Status(
        run=str(run.path),
        state="finished" if run.planned and finished else state,
        videos=videos,
        units=units,
        units_done=len(done_units),
        clips=clips,
        clips_done=clips_done,
        kept=decisions.get("kept", 0),
        dropped=decisions.get("dropped", 0),
        failed=decisions.get("failed", 0),
        clips_per_s=rate,
        video_hours_per_hour=video_rate,
        eta_s=eta,
        stalls=stalls(metrics[-1]) if metrics else {},
        refused=_counts(run, "quarantine", "error_class"),
        embeddings=run.embeddings(),
        skills=skills["k"] if skills else None,
        episodes=info["total_episodes"] if info else None,
    )


def stalls(line: Mapping[str, Any]) -> dict[str, float]:
    """ "A waits for B" to the share of A's time, from a line of metrics; the largest first."""
    found = {}
    for name, seconds in (line.get("stall_seconds") or {}).items():
        threads = (line.get("threads") or {}).get(name.partition(" ")[0], 1)
        found[name] = min(1.0, seconds / max(threads * line["elapsed_s"], 1e-9))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _counts(run: RunDir, table: str, column: str) -> dict[str, int]:
    counted = run.table(table, [column])[column].value_counts().to_pylist()
    return {row["values"]: row["counts"] for row in sorted(counted, key=lambda row: str(row["values"]))}
