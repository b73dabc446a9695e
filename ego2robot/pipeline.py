"""The main job: videos → clips → gates → embeddings → skills → dataset → report."""

from __future__ import annotations

import dataclasses
import os
import time
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ego2robot import config, models
from ego2robot.errors import UserError, VideoError
from ego2robot.export.lerobot import ExportResult, export_lerobot
from ego2robot.jobs import plan as planning
from ego2robot.jobs import triage
from ego2robot.jobs.embedding import Batches, PendingUnit, tables
from ego2robot.jobs.lane import lane
from ego2robot.jobs.pool import Event, Pool
from ego2robot.jobs.worker import SCORES, WAITS, Scoring, scoring
from ego2robot.progress import Progress, Show, Tell
from ego2robot.report import write_report
from ego2robot.skills import cluster
from ego2robot.stages import gate as gates
from ego2robot.stages import hand_motion, hands_torch
from ego2robot.stages.base import Embedder
from ego2robot.stages.clip import CLIP
from ego2robot.stages.labels import PromptLabels
from ego2robot.stages.videomae import VideoMAE
from ego2robot.store import atomic, schema
from ego2robot.store.rundir import RunDir, code_versions
from ego2robot.types import Unit

COMMIT_CLIPS, COMMIT_SECONDS = 512, 30.0  # a commit is due at either: bounds loss, and the number of files
METRICS_SECONDS = 2.0


@dataclass(frozen=True)
class Outcome:
    run: RunDir
    export: ExportResult | None
    report: Path
    warnings: tuple[str, ...] = ()


def run(cfg: config.Config, show: Show = lambda _: None, tell: Tell = lambda _: None) -> Outcome:
    """Runs a recipe from start to end, or goes on where an earlier start stopped.

    Args:
        show: called with the progress, at most some times a second.
        tell: called with single lines that matter: what was refused, what is missing.

    Raises:
        UserError: nothing can be done with this configuration; says why and what to do.
        KeyboardInterrupt: after everything that was complete is committed.
    """
    config.check_together(cfg)
    _device(cfg.device)
    # Where there are GPUs each has a process with models of its own; here only words are embedded.
    embedders, labels = load_embedders(cfg, "cpu", tell)
    run_dir = RunDir.create_or_resume(cfg.run_dir, cfg, fingerprint(cfg, embedders))
    with run_dir.alone():
        return _run(run_dir, embedders, labels, show, tell)


def _run(
    run_dir: RunDir, embedders: Sequence[Embedder], labels: PromptLabels | None, show: Show, tell: Tell
) -> Outcome:
    cfg = run_dir.config
    show(Progress("planning"))
    planned = planning.plan(run_dir, lambda n: show(Progress("planning", n)))
    run_dir.remove_leftovers()
    if planned.reused:
        tell(f"going on with this run's plan of {planned.videos} videos; the source is not listed again")
    for problem in planned.problems:
        tell(str(problem))
    planning.require_units(planned, cfg.source.path)
    gate = calibrate(run_dir, planned.units, show)

    def curate(units: Sequence[Unit]) -> None:
        score_and_embed(run_dir, units, gate, embedders, labels, show, tell)

    if cfg.decode.triage.enabled:
        triage.curate(run_dir, planned.units, curate, cfg.workers or len(os.sched_getaffinity(0)), show, tell)
    else:
        curate(planned.units)

    warnings: list[str] = []
    show(Progress("clustering"))
    found = cluster(run_dir, cfg.skills, cfg.seed, lambda step: show(Progress(f"clustering: {step}")))
    warnings += found["warnings"]
    exported = None
    if cfg.export.enabled:
        out = Path(cfg.export.path) if cfg.export.path else run_dir.path / "dataset"
        exported = export_lerobot(
            run_dir,
            out,
            cfg.export.top,
            cfg.export.schema,
            cfg.export.codec,
            cfg.export.action,
            cfg.export.smooth,
            progress=lambda done, total: show(Progress("exporting", done, total)),
        )
        warnings += exported.warnings
    show(Progress("reporting"))
    page = write_report(run_dir, progress=lambda done, total: show(Progress("reporting", done, total)))
    return Outcome(run_dir, exported, page, tuple(warnings))


def score_and_embed(
    run_dir: RunDir,
    units: Sequence[Unit],
    gate: gates.Gate,
    embedders: Sequence[Embedder],
    labels: PromptLabels | None,
    show: Show,
    tell: Tell,
) -> None:
    """Every unit that is not committed yet: children decode and gate, this process embeds and commits."""
    cfg = run_dir.config
    committed = run_dir.committed_units()
    todo = [unit for unit in units if unit.unit_id not in committed]
    meter = Meter(run_dir, units, committed, show)
    if not todo:
        return
    batches = {e.name: Batches(e, labels if e.name == "clip" else None, meter.seconds) for e in embedders}
    committer = Committer(run_dir, _schemas(cfg, embedders), meter)
    work = Scoring(cfg, gate, tuple(e.preprocess for e in embedders), hands_dtype=_hands_dtype(run_dir))
    pool, meter.threads = _pool(work, len(todo))
    active: dict[str, PendingUnit] = {}
    try:
        with closing(pool.run(todo)) as events:
            for event in meter.timed(events):
                unit = active.setdefault(event.task.unit_id, PendingUnit(event.task))
                _take(event, unit, batches, meter, tell)
                for key in [key for key, pending in active.items() if pending.complete]:
                    committer.add(active.pop(key))
                meter.tick()
        for batch in batches.values():
            batch.flush()
        for pending in active.values():
            committer.add(pending)
    finally:  # also on Ctrl-C: what is complete is kept
        committer.commit()
        meter.tick(event="stopped", force=True)
    meter.tick(event="done", force=True)


def _take(event: Event, unit: PendingUnit, batches: Mapping[str, Batches], meter: Meter, tell: Tell) -> None:
    """One event of the pool into the unit that it is about."""
    unit.attempt = event.attempt
    if event.kind == "item":
        for stage, seconds in event.value.seconds.items():
            meter.seconds[stage] += seconds
        clip = unit.add(event.value, list(batches))
        meter.clip(clip.row)
        for name, prepared in event.value.prepared.items():
            batches[name].add(clip, prepared)
        for name, vector in event.value.vectors.items():
            batches[name].accept(clip, vector)
    elif event.kind == "done":
        unit.end()
    elif event.kind == "error":
        unit.end("decode", event.value)
        tell(str(unit.refusals[-1][3]))
    elif event.again:  # crashed or hung: once more, from its start
        for batch in batches.values():
            batch.forget(unit.clips)
        for clip in unit.clips.values():
            meter.clip(clip.row, -1)
        unit.clips.clear()
        unit.refusals.clear()
    else:
        kind = "crash" if event.kind == "crashed" else "timeout"
        hint = "the rest of the video's clips are given up; check the file with `ffmpeg -v error -i`"
        unit.end("decode", VideoError(unit.unit.video.name, str(event.value), hint, kind))
        tell(str(unit.refusals[-1][3]))


def calibrate(run_dir: RunDir, units: Sequence[Unit], show: Show = lambda _: None) -> gates.Gate:
    """The thresholds of a run; quantiles are taken once, over the clips with the lowest ids, and kept."""
    path = run_dir.path / "plan" / "gate.json"
    stored = run_dir.read_json("plan/gate.json")
    if stored is not None:
        return gates.Gate(**stored)
    cfg = run_dir.config
    gate = gates.resolve(cfg.gate)
    if gates.needs_calibration(cfg.gate):
        ids = sorted(clip.clip_id for unit in units for clip in unit.clips)
        chosen = set(ids[: cfg.gate.calibrate_clips])
        sample = [
            Unit(unit.unit_id, unit.video, clips, unit.cost_s)
            for unit in units
            if (clips := tuple(clip for clip in unit.clips if clip.clip_id in chosen))
        ]
        scores: dict[str, dict[str, float]] = {}
        work = Scoring(cfg, None, hands_dtype=_hands_dtype(run_dir))
        pool, _ = _pool(work, len(sample))
        with closing(pool.run(sample)) as events:
            for event in events:
                if event.kind == "item" and event.value.scores:
                    scores[event.value.clip.clip_id] = event.value.scores
                    show(Progress("calibrating the gate", len(scores), len(chosen)))
        gate = gates.resolve(
            cfg.gate, {name: [s[name] for s in scores.values() if name in s] for name in SCORES}
        )
    atomic.write_json(path, {**gate.__dict__})
    return gate


def load_embedders(cfg: config.Config, device: str, tell: Tell) -> tuple[list[Embedder], PromptLabels | None]:
    """The models of a recipe. Raises UserError when weights cannot be found."""
    embedders: list[Embedder] = []
    labels = None
    if cfg.embed.videomae.weights != "none":
        embedders.append(VideoMAE.load(cfg.embed.videomae, device, cfg.seed))
    if cfg.embed.clip.weights != "none":
        clip = CLIP.load(cfg.embed.clip, device, cfg.seed)
        embedders.append(clip)
        labels = PromptLabels(clip, cfg.labels.prompts, cfg.labels.top_k)
    for embedder in embedders:
        if embedder.random:
            tell(f"{embedder.name}: random weights, as asked for; its vectors and labels mean nothing")
    if cfg.hands.detector != "none":
        models.hand_networks(cfg.hands.detector, pull_if_missing=True)
    return embedders, labels


def fingerprint(cfg: config.Config, embedders: Sequence[Embedder]) -> dict[str, object]:
    """What decides a run's rows besides its configuration."""
    return {
        "rows_version": 2,  # raised when the same configuration would give other rows
        **{e.name: {"weights": e.weights, "sha256": e.fingerprint, "random": e.random} for e in embedders},
        "hands": _hands_fingerprint(cfg),
        "made_with": code_versions(),
    }


def _hands_fingerprint(cfg: config.Config) -> dict[str, str] | None:
    """The hand networks and what they compute in: what this machine is fast in, once for a whole run."""
    if cfg.hands.detector == "none":
        return None
    dtype = torch.float32
    if cfg.hands.precision != "float32":
        dtype = hands_torch.default_dtype(_device(cfg.device))
    if cfg.hands.precision == "half" and dtype == torch.float32:
        dtype = torch.bfloat16
    frozen = RunDir(cfg.run_dir).fingerprint.get("hands")
    if cfg.hands.precision == "auto" and isinstance(frozen, dict) and "dtype" in frozen:
        return {"networks": models.fingerprint(cfg.hands.detector), "dtype": frozen["dtype"]}
    return {
        "networks": models.fingerprint(cfg.hands.detector),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _hands_dtype(run_dir: RunDir) -> torch.dtype:
    hands = run_dir.fingerprint.get("hands")
    return typing.cast(torch.dtype, getattr(torch, hands["dtype"])) if hands else torch.float32


def _schemas(cfg: config.Config, embedders: Sequence[Embedder]) -> dict[str, pa.Schema]:
    found = {e.name: schema.embedding(e.dim, e.name, e.weights, e.random) for e in embedders}
    if cfg.embed.hand_motion and cfg.hands.detector != "none":
        found[hand_motion.NAME] = schema.embedding(hand_motion.DIM, hand_motion.NAME, "none needed", False)
    return found


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU; run `ego2robot doctor`, or use device=cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _pool(work: Scoring, n_units: int) -> tuple[Pool, dict[str, int]]:
    """Children that score: one per core, or one per GPU; and how many threads each stage has in them."""
    cfg = work.cfg
    if _device(cfg.device) == "cpu":
        n = min(cfg.workers or len(os.sched_getaffinity(0)), n_units)
        return Pool(scoring, (work,), n, cfg.decode.timeout_s), {"decode": n, "embed": 1}
    gpus = torch.cuda.device_count()
    if cfg.gpus > gpus:
        raise UserError(f"gpus={cfg.gpus}: torch sees {gpus} here; use gpus=0 for all")
    gpus = min(cfg.gpus or gpus, n_units)
    args = [(dataclasses.replace(work, device=f"cuda:{i}"),) for i in range(gpus)]
    threads = {"decode": gpus * cfg.decode.streams, "score": gpus, "embed": gpus, "write": 1}
    pool = Pool(lane, args, gpus, cfg.decode.timeout_s, backlog=256, width=cfg.decode.streams)
    return pool, threads


class Committer:
    """Collects complete units and commits them in parts that are neither tiny nor huge."""

    def __init__(self, run_dir: RunDir, schemas: Mapping[str, pa.Schema], meter: Meter) -> None:
        self._run, self._schemas, self._meter = run_dir, schemas, meter
        self._units: list[PendingUnit] = []
        self._clips = 0
        self._since = time.monotonic()

    def add(self, unit: PendingUnit) -> None:
        self._units.append(unit)
        self._clips += len(unit.clips)
        if self._clips >= COMMIT_CLIPS or time.monotonic() - self._since >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        units, self._units, self._clips = self._units, [], 0
        self._since = time.monotonic()
        if units:
            info = {
                "clips": sum(len(u.clips) for u in units),
                "attempts": {u.unit.unit_id: u.attempt for u in units if u.attempt > 1},
                "at": time.time(),
            }
            began = time.perf_counter()
            self._run.commit([u.unit.unit_id for u in units], tables(units, self._schemas), info)
            self._meter.seconds["write"] += time.perf_counter() - began


class Meter:
    """Counts, rates and stage seconds; writes ``metrics/`` and feeds whoever shows the progress."""

    def __init__(self, run_dir: RunDir, units: Sequence[Unit], committed: set[str], show: Show) -> None:
        self._run, self._show = run_dir, show
        self.total = sum(len(unit.clips) for unit in units)
        self._before = sum(len(unit.clips) for unit in units if unit.unit_id in committed)
        self._kept_before = run_dir.dataset("clips").count_rows(filter=pc.field("decision") == "kept")
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.threads: dict[str, int] = {}  # of each stage that may wait
        self._clips = self._kept = 0
        self._video_s = 0.0
        self._began = self._shown = self._written = time.monotonic()
        self._process = psutil.Process()

    def clip(self, row: Mapping[str, object], sign: int = 1) -> None:
        self._clips += sign
        self._kept += sign * (row["decision"] == "kept")
        # The source video that a clip stands for: from its start to the next one's.
        self._video_s += sign * self._run.config.clips.stride_s

    def timed(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events; the time that they let this process wait is measured."""
        waiter = "write" if "write" in self.threads else "embed"
        began = time.perf_counter()
        for event in events:
            self.seconds[f"{waiter}{WAITS}decode"] += time.perf_counter() - began
            yield event
            began = time.perf_counter()

    def tick(self, event: str = "progress", force: bool = False) -> None:
        now = time.monotonic()
        elapsed = max(now - self._began, 1e-9)
        if force or now - self._shown >= 0.2:
            self._shown = now
            rate = self._clips / elapsed
            left = self.total - self._before - self._clips
            self._show(
                Progress(
                    "curating",
                    self._before + self._clips,
                    self.total,
                    self._kept_before + self._kept,
                    rate,
                    self._video_s / elapsed,
                    left / rate if rate else None,
                )
            )
        if force or now - self._written >= METRICS_SECONDS:
            self._written = now
            self._run.add_metrics(
                {
                    "event": event,
                    "clips": self._clips,
                    "kept": self._kept,
                    "video_s": round(self._video_s, 3),
                    "elapsed_s": round(elapsed, 3),
                    "stage_seconds": self._rounded(waits=False),
                    "stall_seconds": self._rounded(waits=True),
                    "threads": self.threads,
                    "rss_bytes": sum(_resident(self._process)),
                }
            )

    def _rounded(self, waits: bool) -> dict[str, float]:
        return {k: round(v, 3) for k, v in sorted(self.seconds.items()) if (WAITS in k) == waits}


def _resident(process: psutil.Process) -> Iterator[int]:
    for one in (process, *process.children(recursive=True)):
        try:
            yield one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
