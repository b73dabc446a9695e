"""How far a run is and who works on it, from its files alone."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import StoredPlan

RECENT_S = 600.0  # a worker's rate is over so long
TAIL_BYTES = 1 << 18  # of a worker's metrics; holds the last ten minutes
GPU_S = 15.0
GPU_COLUMNS = ("index", "utilization.gpu", "utilization.decoder", "memory.used")


@dataclass(frozen=True)
class WorkerStatus:
    """One process that works on the run, or has.

    Attributes:
        clips_per_s: over the last ten minutes of its metrics; None before it measured any.
        slow: it works at less than half the median rate of those that work.
        event: ``progress``, ``stopped`` or ``done``.
        here: its sign of life is in the run directory.
        age_s: since its last line, by its clock and this machine's.
        gpus: what its machine's GPUs did, by ``nvidia-smi``: utilization and video engines, %.
    """

    name: str
    event: str
    here: bool
    clips: int
    clips_per_s: float | None
    slow: bool
    age_s: float
    rss_bytes: int
    stalls: dict[str, float]
    gpus: list[dict[str, float]]


@dataclass(frozen=True)
class Status:
    """The state of a run directory.

    Attributes:
        state: ``planning``, ``curating``, ``curated`` (every clip decided) or ``finished`` (report written).
        clips_per_s: of the workers that work now, else of the latest that did; None before any measured.
        eta_s: None when nothing is left, or no rate is known.
        stalls: "A waits for B" to the share of A's time, of the latest start; the largest first.
        refused: error class to number of units or videos in quarantine.
        retried: error class to number of units that failed and were tried again.
        workers: those that work now, the slowest first; where none does, the latest that did.
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
    retried: dict[str, int]
    embeddings: list[str]
    skills: int | None
    episodes: int | None
    workers: list[WorkerStatus]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def status(run: RunDir) -> Status:
    """Reads the plan, the ledger and the last metrics of the workers; no rows."""
    videos = units = units_done = clips = clips_done = 0
    decisions = run.counts("clips")
    clip_s = run.config.clips.stride_s
    if run.planned:
        plan = StoredPlan(run.plan_path)
        units, units_done = len(plan), sum(len(record.units) for record in run.records())
        clips, clips_done = int(plan.n_clips.sum()), sum(decisions.values())
        videos, clip_s = plan.videos(), plan.clip_s(clip_s)
    found = workers(run)
    rates = [worker.clips_per_s for worker in found if worker.clips_per_s]
    rate = sum(rates) if rates else None
    skills = run.skills()
    info = RunDir(run.config.export.path or run.path / "dataset").read_json("meta/info.json")
    finished = (run.path / "report.html").is_file() and clips_done == clips
    state = "planning" if not run.planned else "curating" if clips_done < clips else "curated"
    retried: dict[str, set[str]] = {}
    for record in run.records_and_notes():
        for unit, (_, kind, _) in record.info.get("failed", {}).items():
            retried.setdefault(kind, set()).add(unit)
    return Status(
        run=str(run.path),
        state="finished" if run.planned and finished else state,
        videos=videos,
        units=units,
        units_done=units_done,
        clips=clips,
        clips_done=clips_done,
        kept=decisions.get("kept", 0),
        dropped=decisions.get("dropped", 0),
        failed=decisions.get("failed", 0),
        clips_per_s=rate,
        video_hours_per_hour=rate * clip_s if rate else None,
        eta_s=(clips - clips_done) / rate if rate and clips > clips_done else None,
        stalls=_together([worker.stalls for worker in found]),
        refused=run.counts("quarantine"),
        retried={kind: len(failed) for kind, failed in sorted(retried.items())},
        embeddings=run.embeddings(),
        skills=skills["k"] if skills else None,
        episodes=info["total_episodes"] if info else None,
        workers=found,
    )


def workers(run: RunDir) -> list[WorkerStatus]:
    """Those whose sign of life is there; where there is none, the one whose metrics are the latest."""
    here = {path.name.rpartition(".")[0] for path in (run.path / "workers").glob("*.*")}
    files = {path.stem: path for path in (run.path / "metrics").glob("*.jsonl")}
    chosen = [files[name] for name in here if name in files]
    if not chosen and files:
        chosen = [max(files.values(), key=lambda path: path.stat().st_mtime_ns)]
    found = [one for path in chosen if (one := _worker(path, path.stem in here)) is not None]
    rates = sorted(one.clips_per_s for one in found if one.clips_per_s)
    limit = rates[len(rates) // 2] / 2 if rates else 0.0
    found = [
        WorkerStatus(**{**one.__dict__, "slow": one.clips_per_s is not None and one.clips_per_s < limit})
        for one in found
    ]
    return sorted(found, key=lambda one: (one.clips_per_s is None, one.clips_per_s or 0.0, one.name))


def _worker(path: Path, here: bool) -> WorkerStatus | None:
    lines = [line for line in _tail(path) if "clips" in line and "elapsed_s" in line]
    if not lines:
        return None
    last = lines[-1]
    first = next(line for line in lines if last["elapsed_s"] - line["elapsed_s"] <= RECENT_S)
    clips, seconds = last["clips"], last["elapsed_s"]
    if last["clips"] > first["clips"]:
        clips, seconds = last["clips"] - first["clips"], last["elapsed_s"] - first["elapsed_s"]
    return WorkerStatus(
        name=path.stem,
        event=str(last.get("event", "")),
        here=here,
        clips=int(last["clips"]),
        clips_per_s=clips / seconds if clips and seconds > 0 else None,
        slow=False,
        age_s=max(0.0, time.time() - float(last.get("time", 0.0))),
        rss_bytes=int(last.get("rss_bytes") or 0),
        stalls=stalls(last),
        gpus=list(last.get("gpus") or ()),
    )


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last lines of a worker's metrics, whole ones only."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def stalls(line: Mapping[str, Any]) -> dict[str, float]:
    """ "A waits for B" to the share of A's time, from a line of metrics; the largest first."""
    found = {}
    for name, seconds in (line.get("stall_seconds") or {}).items():
        threads = (line.get("threads") or {}).get(name.partition(" ")[0], 1)
        found[name] = min(1.0, seconds / max(threads * line["elapsed_s"], 1e-9))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _together(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean share of each stall over the workers; the largest first."""
    names = {name for one in each for name in one}
    means = {name: sum(one.get(name, 0.0) for one in each) / len(each) for name in names}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))


# -- for other programs ---------------------------------------------------------------------------

HELP = {
    "units": "Units of work in the plan.",
    "units_done": "Units that are committed.",
    "clips": "Clips in the plan.",
    "clips_done": "Clips that are committed.",
    "clips_kept": "Clips that passed the gate.",
    "clips_per_second": "Clips committed a second by all workers, since the one that writes this began.",
    "workers": "Processes that work on the run.",
    "units_retried": "Units that failed and were tried again.",
}


def write_prometheus(
    run: RunDir, gauges: Mapping[str, float], gpus: Sequence[Mapping[str, float]] = ()
) -> None:
    """``metrics/ego2robot.prom``, for the textfile collector of Prometheus' node exporter."""
    label = str(run.path.resolve()).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    lines = []
    for name, value in gauges.items():
        lines += [f"# HELP ego2robot_{name} {HELP[name]}", f"# TYPE ego2robot_{name} gauge"]
        lines.append(f'ego2robot_{name}{{run="{label}"}} {float(value):g}')
    for column in GPU_COLUMNS[1:] if gpus else ():
        name = f"ego2robot_gpu_{column.replace('.', '_')}"
        lines += [f"# HELP {name} By nvidia-smi, of the machine that writes this.", f"# TYPE {name} gauge"]
        lines += [f'{name}{{run="{label}",gpu="{gpu["index"]:g}"}} {gpu[column]:g}' for gpu in gpus
                  if column in gpu]  # fmt: skip
    atomic.write_text(run.path / "metrics" / "ego2robot.prom", "\n".join(lines) + "\n")


class GpuWatch:
    """What this machine's GPUs do, asked of ``nvidia-smi`` now and then in a thread of its own."""

    def __init__(self) -> None:
        self.latest: list[dict[str, float]] = []
        if shutil.which("nvidia-smi"):
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.latest = gpus()
            time.sleep(GPU_S)


def gpus() -> list[dict[str, float]]:
    """Each GPU's ``GPU_COLUMNS``, % and MiB; columns that its driver does not know are left out."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_COLUMNS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for row in csv.reader(done.stdout.splitlines() if done.returncode == 0 else []):
        values = {}
        for name, text in zip(GPU_COLUMNS, row, strict=False):
            try:
                values[name] = float(text)
            except ValueError:  # [N/A]
                continue
        if "index" in values:
            found.append(values)
    return found
