"""The main job: videos → clips → gates → embeddings → skills → dataset → report."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from ego2robot import config, models, remote
from ego2robot.errors import UserError
from ego2robot.export.lerobot import ExportResult, export_lerobot
from ego2robot.jobs import plan as planning
from ego2robot.jobs import triage
from ego2robot.jobs.claims import Shard
from ego2robot.jobs.drain import Drain
from ego2robot.jobs.lane import lane
from ego2robot.jobs.pool import Pool
from ego2robot.jobs.repair import Mended, drop_broken
from ego2robot.jobs.verify import Verdict, verify
from ego2robot.jobs.work import Member, settle, together
from ego2robot.jobs.work import work as share_work
from ego2robot.jobs.worker import SCORES, Scoring, scoring
from ego2robot.progress import Progress, Show, Tell, paced
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
from ego2robot.store.units import units_from_table
from ego2robot.types import Unit


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
    run_dir, embedders, labels = _opened(cfg, tell)
    with run_dir.alone(), Member(run_dir) as member:
        show(Progress("planning"))
        planned = planning.plan(run_dir, lambda n: show(Progress("planning", n)))
        if planned.reused:
            tell(f"going on with this run's plan of {planned.videos} videos; the source is not listed again")
        _check_plan(planned, cfg, tell)
        _curate(run_dir, embedders, labels, show, tell, member)
        settle(run_dir, member)
        return _finish(run_dir, show)


def plan(cfg: config.Config, show: Show = lambda _: None, tell: Tell = lambda _: None) -> planning.Planned:
    """Makes the run directory of a recipe and its plan; where there is one, adds the videos that are new."""
    run_dir, _, _ = _opened(cfg, tell)
    with run_dir.alone():
        planned = planning.plan(run_dir, lambda n: show(Progress("planning", n)), add=True)
    _check_plan(planned, cfg, tell)
    return planned


def work(
    path: Path,
    overrides: Sequence[str] = (),
    shard: Shard | None = None,
    drain: Drain | None = None,
    show: Show = lambda _: None,
    tell: Tell = lambda _: None,
) -> RunDir:
    """Works on a planned run, with as many others as there are, until every unit is committed.

    Args:
        overrides: ``key=value`` of what may differ between the processes of a run, such as ``workers=4``.

    Raises:
        Drained: it was asked to stop before.
        UserError: there is no plan, or this machine would make other rows.
    """
    opened = RunDir.open(path)
    if not opened.planned:
        raise UserError(f"{path}: no plan yet; make it with `ego2robot plan RECIPE run_dir={path}`")
    tree = config.apply(config.to_dict(opened.config), [*overrides, f"run_dir={path}"])
    run_dir, embedders, labels = _opened(config.build(tree, "command line"), tell)
    with Member(run_dir) as member:
        _curate(run_dir, embedders, labels, show, tell, member, shard, drain)
        settle(run_dir, member)
    return run_dir


def repair(
    path: Path, overrides: Sequence[str] = (), show: Show = lambda _: None, tell: Tell = lambda _: None
) -> tuple[Mended, Verdict]:
    """Drops exactly what ``verify`` finds broken in a run, does it again, and verifies.

    Raises:
        UserError: another process works on the run.
    """
    run_dir = RunDir.open(path)
    show(Progress("verifying"))
    verdict = verify(run_dir)
    with run_dir.alone(), Member(run_dir) as member:
        member.require_alone(tell)
        mended = drop_broken(run_dir, verdict)
    for problem in verdict.problems:
        tell(problem)
    if mended.units or mended.parts:
        work(path, overrides, show=show, tell=tell)
    show(Progress("verifying"))
    return mended, verify(run_dir)


def _opened(cfg: config.Config, tell: Tell) -> tuple[RunDir, list[Embedder], PromptLabels | None]:
    config.check_together(cfg)
    remote.configure(cfg.source.cache_gib)
    _device(cfg.device)
    # Where there are GPUs each has a process with models of its own; here only words are embedded.
    embedders, labels = load_embedders(cfg, "cpu", tell)
    return RunDir.create_or_resume(cfg.run_dir, cfg, fingerprint(cfg, embedders)), embedders, labels


def _check_plan(planned: planning.Planned, cfg: config.Config, tell: Tell) -> None:
    for problem in planned.problems:
        tell(str(problem))
    planning.require_units(planned, cfg.source.path)


def _curate(
    run_dir: RunDir,
    embedders: Sequence[Embedder],
    labels: PromptLabels | None,
    show: Show,
    tell: Tell,
    member: Member,
    shard: Shard | None = None,
    drain: Drain | None = None,
) -> None:
    """Rows for every clip of the plan, together with whoever else works on this run."""
    gate = calibrate(run_dir, member, show)

    def curate(units: Sequence[Unit] | None) -> None:
        more = (member, shard, drain)
        score_and_embed(run_dir, units, gate, embedders, labels, show, tell, *more)

    cfg = run_dir.config
    if not cfg.decode.triage.enabled:
        curate(None)
        return
    workers = cfg.workers or len(os.sched_getaffinity(0))
    together(
        run_dir,
        member,
        lambda units, decode: triage.curate(run_dir, units, decode, workers, show, tell),
        curate,
        drain,
    )


def _finish(run_dir: RunDir, show: Show) -> Outcome:
    """What is made of the rows: skills, the dataset, the report."""
    cfg = run_dir.config
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
            progress=paced("exporting", show),
            workers=cfg.workers or len(os.sched_getaffinity(0)),
        )
        warnings += exported.warnings
    show(Progress("reporting"))
    page = write_report(run_dir, progress=lambda done, total: show(Progress("reporting", done, total)))
    return Outcome(run_dir, exported, page, tuple(warnings))


def score_and_embed(
    run_dir: RunDir,
    units: Sequence[Unit] | None,
    gate: gates.Gate,
    embedders: Sequence[Embedder],
    labels: PromptLabels | None,
    show: Show,
    tell: Tell,
    member: Member | None = None,
    shard: Shard | None = None,
    drain: Drain | None = None,
) -> None:
    """Some units of the plan (None: all) that are not committed yet: children decode and gate, this process
    embeds and commits. Returns when all are committed, by whomever.

    Raises:
        Drained: it was asked to stop before.
    """
    cfg = run_dir.config
    scoring_work = Scoring(
        cfg, gate, tuple(e.preprocess for e in embedders), hands_dtype=_hands_dtype(run_dir)
    )
    only = None if units is None else [unit.unit_id for unit in units]
    with nullcontext(member) if member else Member(run_dir) as who:
        share_work(
            run_dir, lambda n: _pool(scoring_work, n), _schemas(cfg, embedders), embedders, labels,
            show, tell, who, shard, drain, only,
        )  # fmt: skip


def calibrate(run_dir: RunDir, member: Member, show: Show = lambda _: None) -> gates.Gate:
    """The thresholds of a run; quantiles are taken once, over the clips with the lowest ids, and kept.

    One process does it; the others wait for it, or take over when it dies.
    """
    path = run_dir.path / "plan" / "gate.json"
    while (stored := run_dir.read_json("plan/gate.json")) is None:
        with member.duty("gate") as mine:
            if mine and not path.is_file():
                atomic.write_json(path, {**_calibrated(run_dir, show).__dict__})
        if not mine:
            show(Progress("waiting for the gate's calibration"))
            member.wait()
    return gates.Gate(**stored)


def _calibrated(run_dir: RunDir, show: Show) -> gates.Gate:
    cfg = run_dir.config
    if not gates.needs_calibration(cfg.gate):
        return gates.resolve(cfg.gate)
    units = units_from_table(run_dir.units())
    ids = sorted(clip.clip_id for unit in units for clip in unit.clips)
    chosen = set(ids[: cfg.gate.calibrate_clips])
    sample = [
        Unit(unit.unit_id, unit.video, clips, unit.cost_s)
        for unit in units
        if (clips := tuple(clip for clip in unit.clips if clip.clip_id in chosen))
    ]
    scores: dict[str, dict[str, float]] = {}
    pool, _ = _pool(Scoring(cfg, None, hands_dtype=_hands_dtype(run_dir)), len(sample))
    with closing(pool.run(sample)) as events:
        for event in events:
            if event.kind == "item" and event.value.scores:
                scores[event.value.clip.clip_id] = event.value.scores
                show(Progress("calibrating the gate", len(scores), len(chosen)))
    return gates.resolve(cfg.gate, {name: [s[name] for s in scores.values() if name in s] for name in SCORES})


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
        "rows_version": 3,  # raised when the same configuration would give other rows
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
    pool = Pool(lane, args, gpus, cfg.decode.timeout_s, backlog=256, width=cfg.decode.streams, fresh=True)
    return pool, threads
