"""The best kept clips of a run as a LeRobot dataset v3.0, without needing lerobot.

First it is decided which episodes there are, in which order, how long each is, what it is called and which
footage goes to which unit of work; then any number of processes decode, encode and write final video files,
a unit each; at the end the episodes get their numbers and their rows go into data and meta files. What comes
out does not depend on how many processes there were, or who did what.

A clip that cannot be read when its turn comes is left out. Nobody knows before; but numbers are given at the
end: the episodes after it close up, and no pointer ever leads to what is not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from ego2robot import __version__, config
from ego2robot.errors import UserError
from ego2robot.export import episode, privacy, video
from ego2robot.export.card import Facts, card, license_of
from ego2robot.export.choose import BATCH, Choice, choose, counted, licences, random_models
from ego2robot.export.episode import ActionName, Smooth
from ego2robot.export.files import Limits, cut
from ego2robot.export.footage import Footage
from ego2robot.export.lerobot_finish import Numbers, number, statistics, write_files
from ego2robot.export.lerobot_format import DATA_PATH, PROVENANCE, VIDEO_PATH, features, tasks_table
from ego2robot.export.lerobot_unit import Order, worker
from ego2robot.export.staging import Staging, Tell, check_target, key_of, remove_leftovers, work_off
from ego2robot.jobs.claims import Shard
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.types import FrameSpec

Schema = Literal["auto", "hands", "reference", "native"]
SCHEMAS: tuple[Schema, ...] = ("auto", "hands", "reference", "native")
CodecName = Literal["av1", "h264"]

# A dataset is cut into units of work of equal length, each a video file: so many that as many processes have
# something to do, but none shorter than it takes to make a process worth its start.
SHARES, MIN_UNIT_S = 64, 18.0


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        bytes: of all files together.
        skipped: (clip_id, reason) of chosen clips that could not be exported.
        warnings: one line each, for the user.
    """

    path: Path
    episodes: int
    frames: int
    tasks: int
    bytes: int
    skipped: list[tuple[str, str]]
    warnings: list[str]
    covered: int | None = None  # frames in which a face was covered; None: they were not looked for


def export_lerobot(
    run: RunDir,
    out: Path,
    top: int | None,
    schema: Schema = "hands",
    codec: CodecName = "av1",
    action: ActionName = "compensated",
    smooth: Smooth = "action",
    progress: Tell | None = None,
    limits: Limits | None = None,
    workers: int = 0,
    only_representatives: bool = False,
) -> ExportResult:
    """Writes the ``top`` best kept clips of a run (None: all) as a LeRobot dataset v3.0.

    Clips rank by ``label_score`` when they were labelled by real weights, else by ``hand_visibility``;
    ties by ``motion``, then by ``clip_id``. Episodes are stored by (video name, start). A clip that cannot
    be read any more is left out, with the reason; nothing takes its place. Interrupted or killed, the same
    call goes on with the units that are complete; they lie in ``<out>.partial-<key>``.

    Args:
        out: the dataset's folder; an earlier export in it is replaced, anything else refused.
        schema: ``hands``: state float32 [96], action float32 [4]; ``reference``: [4] and [2]. Both are
            2D pseudo-actions in shares of the picture. ``native``: what the dataset itself measured, see
            ``episode.native``; ``auto``: that where there is such a thing, else ``hands``.
        action: of ``hands``: ``compensated`` takes the camera's motion off the wrists', ``wrist`` does not.
        smooth: of ``hands``: what goes through a One-Euro filter: ``none``, the compensated ``action``, or
            ``all``, states too.
        progress: told (clips done, clips chosen).
        limits: when a new file begins; LeRobot's own by default.
        workers: child processes; 0: none, all is done in this one.
        only_representatives: leaves out clips that clustering marked as near-duplicates of a better one.

    Raises:
        UserError: ``out`` is in use by something else, the frame rate is not a whole number, the
            encoder is missing, or the disk is full. ``out`` is as it was.
    """
    export = _prepare(run, out, top, schema, codec, action, smooth, limits or Limits(), only_representatives)
    staging, order = Staging(export.order.out, export.order.key), export.order
    with staging.held():
        remove_leftovers(order.out)
        staging.plan(export.choice.table, export.starts)
        timeout_s = run.config.decode.timeout_s
        work_off(staging, worker, (order,), workers, timeout_s, progress or (lambda done, total: None))
        numbers = number(staging, order)
        data = write_files(staging, order, numbers, workers)
        skipped = _skipped(staging, numbers)
        _describe(run, staging, export, numbers, skipped)
        atomic.write_json(staging.dataset / "meta" / "stats.json", statistics(staging, order, numbers, data))
        found = _result(run, export, numbers, skipped)
        staging.publish()
    size = sum(path.stat().st_size for path in order.out.rglob("*") if path.is_file())
    return replace(found, bytes=size)


def export_lerobot_shard(
    run: RunDir,
    out: Path,
    top: int | None,
    shard: Shard,
    schema: Schema = "hands",
    codec: CodecName = "av1",
    action: ActionName = "compensated",
    smooth: Smooth = "action",
    progress: Tell | None = None,
    limits: Limits | None = None,
    workers: int = 0,
    only_representatives: bool = False,
) -> int:
    """Does a share of the units of an :func:`export_lerobot` with the same arguments, which then ends it.

    Returns:
        The number of units that are left to other shards.
    """
    export = _prepare(run, out, top, schema, codec, action, smooth, limits or Limits(), only_representatives)
    staging, order = Staging(export.order.out, export.order.key), export.order
    if staging.published(PROVENANCE):
        return 0
    with staging.held(shared=True):
        staging.plan(export.choice.table, export.starts)
        timeout_s = run.config.decode.timeout_s
        work_off(staging, worker, (order,), workers, timeout_s, progress or (lambda done, total: None), shard)
        return staging.n_left


# -- before -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Export:
    """An export that is decided.

    Attributes:
        starts: rows of the choice at which a unit begins.
    """

    order: Order
    choice: Choice
    starts: list[int]


def _prepare(
    run: RunDir, out: Path, top: int | None, schema: Schema, codec: CodecName, action: ActionName,
    smooth: Smooth, limits: Limits, only_representatives: bool,
) -> _Export:  # fmt: skip
    fps = _whole(run.config.clips.sample_fps)
    if top is not None and top < 1:
        raise UserError(f"top={top}: at least one episode must be asked for")
    if schema not in SCHEMAS:
        raise UserError(f"schema={schema!r}: should be one of {', '.join(SCHEMAS)}")
    video.check_codec(codec)
    out = Path(out).expanduser().resolve()
    check_target(out, PROVENANCE)
    frames = run.config.frames
    spec = FrameSpec(frames.height, frames.width, frames.fit)
    choice = choose(run, top, False, only_representatives)
    layout = episode.layout_of(schema, Footage(run, spec), _one_a_video(choice.table), run.config.source)
    if layout.schema == "native":
        choice = choose(run, top, True, only_representatives)
    table = choice.table
    order = Order(
        run.path.resolve(), out, "", fps, spec, layout, codec, action, smooth, limits, privacy.of_run(run)
    )
    lengths = table["n_frames"].to_numpy()
    files = cut(lengths, unit_frames(int(lengths.sum()), fps, spec, limits))
    starts = [i for i in range(len(files)) if i == 0 or files[i] != files[i - 1]]
    decides = {**asdict(order), "run": "", "out": "", "codec": asdict(video.CODECS[codec])}
    return _Export(replace(order, key=key_of(run, "lerobot", decides, table, starts)), choice, starts)


def unit_frames(total: int, fps: int, spec: FrameSpec, limits: Limits) -> int:
    """The most frames of a unit of work, which is a video file: from the settings alone.

    It holds what should stay below ``limits.video_bytes``, is no longer than LeRobot's float32 times allow,
    and no longer than leaves ``SHARES`` processes something to do. Footage that takes more bytes than
    expected makes two files of a unit; also that depends on the pictures alone.
    """
    expected = limits.video_bytes / (video.EXPECTED_BYTES * spec.width * spec.height)
    fair = max(total / SHARES, MIN_UNIT_S * fps)
    return max(1, int(min(expected, fair, video.MAX_FILE_S * fps)))


def most_units(cfg: config.Config) -> int:
    """About how many units of work ``export.top`` clips make at most, before there are any clips."""
    clips, frames = cfg.clips, cfg.frames
    longest_s = clips.duration_s if clips.policy == "windows" else max(clips.duration_s, clips.max_s)
    fps = _whole(clips.sample_fps)
    total = math.ceil(cfg.export.top * longest_s * fps)
    spec = FrameSpec(frames.height, frames.width, frames.fit)
    return min(cfg.export.top, math.ceil(total / unit_frames(total, fps, spec, Limits())))


def _one_a_video(table: pa.Table) -> list[dict[str, Any]]:
    """A chosen clip of each of the first videos."""
    firsts: dict[str, dict[str, Any]] = {}
    for batch in table.to_batches(BATCH):
        for row in batch.to_pylist(maps_as_pydicts="lossy"):
            firsts.setdefault(row["video_id"], row)
            if len(firsts) == episode.VIDEOS_ASKED:
                return list(firsts.values())
    return list(firsts.values())


def _whole(fps: float) -> int:
    if fps != int(fps):
        raise UserError(
            f"clips.sample_fps={fps:g}: a LeRobot dataset has a whole number of frames a second; "
            "make a run with a whole clips.sample_fps to export it"
        )
    return int(fps)


# -- after ------------------------------------------------------------------------------------------


def _skipped(staging: Staging, numbers: Numbers) -> list[tuple[str, str]]:
    rows = sorted(numbers.skipped)
    ids = staging.table(["clip_id"])["clip_id"].take(pa.array(rows, pa.int64())).to_pylist()
    return [(clip_id, numbers.skipped[row]) for clip_id, row in zip(ids, rows, strict=True)]


def _told(
    staging: Staging, order: Order, numbers: Numbers, skipped: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """What was left out and why, as the dataset says it: without names where those are not asked for."""
    strip = order.privacy.stripper
    if strip is None:
        return list(skipped)
    names = staging.table(["name"])["name"].take(pa.array(sorted(numbers.skipped), pa.int64())).to_pylist()
    return [
        (strip.clip(clip_id), strip.line(reason, name))
        for (clip_id, reason), name in zip(skipped, names, strict=True)
    ]


def _describe(
    run: RunDir, staging: Staging, export: _Export, numbers: Numbers, skipped: Sequence[tuple[str, str]]
) -> None:
    """Writes what describes the whole dataset, but for its statistics."""
    order, layout, episodes = export.order, export.order.layout, len(numbers.table)
    info = {
        "codebase_version": "v3.0",
        "robot_type": layout.robot_type,
        "total_episodes": episodes,
        "total_frames": numbers.frames,
        "total_tasks": len(numbers.tasks),
        "chunks_size": order.limits.chunk_files,
        "data_files_size_in_mb": max(1, order.limits.data_bytes >> 20),
        "video_files_size_in_mb": max(1, order.limits.video_bytes >> 20),
        "fps": order.fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features(layout, order.spec, order.fps, order.codec),
    }
    atomic.write_json(staging.dataset / "meta" / "info.json", info)
    atomic.write_parquet(staging.dataset / "meta" / "tasks.parquet", tasks_table(numbers.tasks))
    randoms = random_models(run)
    provenance = {
        "made_by": "ego2robot",
        "version": __version__,
        "key": order.key,
        "schema": layout.schema,
        "codec": order.codec,
        "action": order.action,
        "smooth": order.smooth,
        "pseudo_actions": layout.schema != "native",
        "ranked_by": export.choice.ranked_by,
        "random_weights": randoms,
        "skipped": [
            {"clip_id": clip_id, "reason": reason}
            for clip_id, reason in _told(staging, order, numbers, skipped)
        ],
        "fingerprint": run.fingerprint,
        "faces_covered_in_frames": numbers.covered if order.privacy.blur_faces else None,
        "names_stripped": order.privacy.salt is not None,
        "config": privacy.public_config(config.to_dict(run.config), order.privacy.salt is not None),
    }
    atomic.write_json(staging.dataset / PROVENANCE, provenance)
    made = export.choice.table.take(numbers.table["row"].combine_chunks())
    facts = Facts(
        schema=layout.schema,
        action=order.action if layout.schema == "hands" else layout.schema,
        codec=order.codec,
        fps=order.fps,
        height=order.spec.height,
        width=order.spec.width,
        frames=numbers.frames,
        tasks=counted(made["task"]),
        videos=counted(made["name"]),
        kept=export.choice.kept,
        considered=export.choice.planned,
        hand_frames=numbers.hand_frames,
        skipped=len(skipped),
        ranked_by=f"`{export.choice.ranked_by}`",
        random_models=randoms,
        license=license_of(licences(made)),
        version=__version__,
        units=layout.units,
        blurred=numbers.covered if order.privacy.blur_faces else None,
        stripped=order.privacy.salt is not None,
    )
    atomic.write_text(staging.dataset / "README.md", card(facts))


def _result(run: RunDir, export: _Export, numbers: Numbers, skipped: list[tuple[str, str]]) -> ExportResult:
    episodes, chosen = len(numbers.table), export.choice.table.num_rows
    found = []
    if not episodes:
        cause = "no clip was kept" if not chosen else "none of the chosen clips could be read"
        found.append(f"the dataset is empty: {cause}; lower the gate's thresholds or add footage")
    elif skipped:
        found.append(f"{len(skipped)} of {chosen} chosen clips were left out: {skipped[0][1]}")
    if episodes and not numbers.hand_frames and export.order.layout.schema != "native":
        found.append("no hand is seen in any episode: states and actions are all zero")
    if randoms := random_models(run):
        found.append(f"random weights: {', '.join(randoms)}; their labels and skills mean nothing")
    covered = numbers.covered if export.order.privacy.blur_faces else None
    tasks = len(numbers.tasks)
    return ExportResult(export.order.out, episodes, numbers.frames, tasks, 0, skipped, found, covered)
