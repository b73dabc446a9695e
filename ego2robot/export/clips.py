"""Chosen clips as small videos with what is known of them, for WebDataset shards and plain folders."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from ego2robot import __version__, config
from ego2robot.errors import UserError
from ego2robot.export import card, privacy, video
from ego2robot.export.card import license_of
from ego2robot.export.choose import Choice, choose, licences, random_models
from ego2robot.export.files import cut
from ego2robot.export.footage import Begun, Footage, Row
from ego2robot.export.lerobot import MIN_UNIT_S, SHARES
from ego2robot.export.privacy import Privacy, Stripper
from ego2robot.export.staging import (
    Item,
    Staging,
    Task,
    Tell,
    check_target,
    key_of,
    unwritable,
    work_off,
)
from ego2robot.jobs.claims import Shard
from ego2robot.jobs.pool import Work
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.types import FrameSpec

Kind = Literal["webdataset", "parquet"]
PROVENANCE = "ego2robot.json"
GOP = 30  # frames from keyframe to keyframe: these videos are read from their beginning
KEY_VALUES = pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))
# What is said of a clip, beside its pictures. ``fps`` is that of the video made of it.
FIELDS = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_id", pa.string()),
        ("video_name", pa.string()),  # not "video": of a folder of videos that is the pictures
        ("source", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("n_frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("task", pa.string()),
        ("skill_id", pa.int64()),
        ("skill", pa.string()),
        ("motion", pa.float32()),
        ("hand_visibility", pa.float32()),
        ("label", pa.string()),
        ("label_score", pa.float32()),
        ("labels", pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))),
        ("meta", KEY_VALUES),
    ]
)


@dataclass(frozen=True)
class Order:
    """What was asked for; decides, with the run, every byte that comes out. Pickles."""

    run: Path
    out: Path
    key: str
    kind: Kind
    fps: Fraction
    spec: FrameSpec
    codec: str
    hands: bool
    privacy: Privacy


@dataclass(frozen=True)
class Prepared:
    """An export of clips that is decided.

    Attributes:
        starts: rows of the choice at which a unit of work begins.
    """

    order: Order
    choice: Choice
    starts: list[int]
    staging: Staging


@dataclass(frozen=True)
class ClipsResult:
    """What was written.

    Attributes:
        files: shards, or videos.
        bytes: of all files together.
        skipped: (clip_id, reason) of chosen clips that could not be exported.
    """

    path: Path
    clips: int
    files: int
    bytes: int
    skipped: list[tuple[str, str]]
    warnings: list[str]
    covered: int | None = None  # frames in which a face was covered; None: they were not looked for


def prepare(
    run: RunDir, out: Path, kind: Kind, top: int | None, codec: str, hands: bool, only_representatives: bool
) -> Prepared:
    """Decides what is exported, before anything is decoded.

    Raises:
        UserError: ``out`` is in use by something else, or the encoder is missing.
    """
    if top is not None and top < 1:
        raise UserError(f"top={top}: at least one clip must be asked for")
    video.check_codec(codec)
    out = Path(out).expanduser().resolve()
    check_target(out, PROVENANCE)
    frames, fps = run.config.frames, Fraction(run.config.clips.sample_fps).limit_denominator(1000)
    spec = FrameSpec(frames.height, frames.width, frames.fit)
    choice = choose(run, top, True, only_representatives)
    order = Order(run.path.resolve(), out, "", kind, fps, spec, codec, hands, privacy.of_run(run))
    lengths = choice.table["n_frames"].to_numpy()
    unit = min(max(int(lengths.sum()) / SHARES, MIN_UNIT_S * float(fps)), video.MAX_FILE_S * float(fps))
    units = cut(lengths, unit)
    starts = [i for i in range(len(units)) if i == 0 or units[i] != units[i - 1]]
    decides = {**asdict(order), "run": "", "out": "", "codec": asdict(video.CODECS[codec])}
    key = key_of(run, kind, decides, choice.table, starts)
    return Prepared(replace(order, key=key), choice, starts, Staging(out, key))


@dataclass(frozen=True)
class Encoded:
    """A clip that is ready to be stored: an MP4, its fields, and its landmarks as a Parquet file."""

    row: Row
    mp4: bytes
    fields: dict[str, Any]
    hands: bytes | None


def worker(order: Order, store: Callable[[Order, Staging, int], Store]) -> Callable[[Task], Iterator[Item]]:
    """The work of a child process, or of this one: does one unit after the other.

    Args:
        store: begins the storing of a unit.
    """
    torch.set_num_threads(1)  # one process per core; threads of several would only fight
    run = RunDir.open(order.run)
    staging = Staging(order.out, order.key)
    footage = Footage(run, order.spec)
    cover, strip = order.privacy.cover(), order.privacy.stripper

    def do(task: Task) -> Iterator[Item]:
        try:
            rows = staging.rows(task.unit).to_pylist(maps_as_pydicts="lossy")
            footage.expect(rows)
            staging.path(task.unit, "").parent.mkdir(parents=True, exist_ok=True)
            failed, covered, number = {}, 0, staging.starts[task.unit] - 1
            with store(order, staging, task.unit) as storing:
                for read in footage.read(rows, dict(task.avoid)):
                    if isinstance(read, Begun):
                        yield Item(read.video_id)
                        continue
                    (row, found), number = read, number + 1
                    if isinstance(found, str):
                        failed[str(number)] = found
                    else:
                        covered += cover(found)
                        pictures = found.frames_THWC.cpu().numpy()
                        mp4 = video.encode_episode(pictures, order.fps, video.CODECS[order.codec], GOP)
                        hands = _parquet(_hands(footage.hand_rows(row), strip)) if order.hands else None
                        shown = told(row, strip)
                        storing.add(Encoded(shown, mp4, fields(shown, order), hands))
                    yield Item()
            staging.commit(task.unit, {"failed": failed, "covered": covered, **storing.record()})
        except OSError as error:
            raise unwritable(order.out, error) from None

    return do


def share(
    run: RunDir,
    prepared: Prepared,
    factory: Callable[..., Work],
    shard: Shard,
    workers: int,
    progress: Tell | None,
) -> int:
    """Does a share of the units; returns how many are left to other shards.

    Args:
        factory: from an :class:`Order` to what :func:`worker` gives.
    """
    staging = prepared.staging
    if staging.published(PROVENANCE):
        return 0
    with staging.held(shared=True):
        work_on(run, prepared, factory, workers, progress, shard)
        return staging.n_left


def work_on(
    run: RunDir,
    prepared: Prepared,
    factory: Callable[..., Work],
    workers: int,
    progress: Tell | None,
    shard: Shard | None = None,
) -> None:
    """Does the units that are not done yet, all or a share of them; the staging folder is held.

    Args:
        factory: from an :class:`Order` to what :func:`worker` gives.
    """
    prepared.staging.plan(prepared.choice.table, prepared.starts)
    timeout_s, tell = run.config.decode.timeout_s, progress or (lambda done, total: None)
    work_off(prepared.staging, factory, (prepared.order,), workers, timeout_s, tell, shard)


class Store:
    """Stores the clips of one unit. A context manager: all is on disk once it is left."""

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        return None

    def add(self, clip: Encoded) -> None:
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What the end of the export needs to know, for JSON."""
        raise NotImplementedError


def token() -> str:
    """Sets the files of a process apart from those of another that does the same unit and may be killed."""
    return secrets.token_hex(4)


def told(row: Row, strip: Stripper | None) -> Row:
    """A chosen clip as the dataset tells of it: with pseudonyms where names are not asked for."""
    if strip is None:
        return row
    return {
        **row,
        "clip_id": strip.clip(row["clip_id"]),
        "video_id": strip.clip(row["video_id"]),
        "name": strip.video(row["name"]),
        "meta": strip.meta(dict(row["meta"] or ())),
    }


def _hands(table: pa.Table, strip: Stripper | None) -> pa.Table:
    if strip is None:
        return table
    place = table.schema.get_field_index("clip_id")
    ids = pa.array([strip.clip(clip_id) for clip_id in table["clip_id"].to_pylist()], pa.string())
    return table.set_column(place, table.schema.field(place), ids)


def fields(row: Row, order: Order) -> dict[str, Any]:
    """The cells of ``FIELDS`` for a chosen clip."""
    own = {
        "video_name": row["name"],
        "fps": float(order.fps),
        "width": order.spec.width,
        "height": order.spec.height,
        "labels": [dict(label) for label in row["labels"] or ()],
        "meta": [{"key": key, "value": value} for key, value in dict(row["meta"] or ()).items()],
    }
    return {name: own[name] if name in own else row[name] for name in FIELDS.names}


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


# -- after ------------------------------------------------------------------------------------------


def skipped(prepared: Prepared, failed: Mapping[int, str]) -> list[tuple[str, str]]:
    """(clip_id, reason) of plan rows that could not be exported."""
    rows = sorted(failed)
    ids = prepared.choice.table["clip_id"].take(pa.array(rows, pa.int64())).to_pylist()
    return [(clip_id, failed[row]) for clip_id, row in zip(ids, rows, strict=True)]


def covered(prepared: Prepared) -> int | None:
    """Frames in which a face was covered; None: they were not looked for."""
    staging = prepared.staging
    if not prepared.order.privacy.blur_faces:
        return None
    return sum(staging.record(unit)["covered"] for unit in range(staging.n_units))


def _public(prepared: Prepared, left_out: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """What was left out and why, without names where those are not asked for."""
    strip = prepared.order.privacy.stripper
    if strip is None:
        return list(left_out)
    table = prepared.choice.table
    names = dict(zip(table["clip_id"].to_pylist(), table["name"].to_pylist(), strict=True))
    return [(strip.clip(clip_id), strip.line(reason, names[clip_id])) for clip_id, reason in left_out]


def describe(
    run: RunDir,
    prepared: Prepared,
    left_out: Sequence[tuple[str, str]],
    head: Mapping[str, Any],
    loading: str,
) -> None:
    """Writes the provenance and README.md of a dataset of clips."""
    order, choice, staging = prepared.order, prepared.choice, prepared.staging
    randoms = random_models(run)
    n = choice.table.num_rows - len(left_out)
    provenance = {
        "made_by": "ego2robot",
        "version": __version__,
        "key": order.key,
        "form": order.kind,
        "clips": n,
        "codec": order.codec,
        "ranked_by": choice.ranked_by,
        "random_weights": randoms,
        "skipped": [
            {"clip_id": clip_id, "reason": reason} for clip_id, reason in _public(prepared, left_out)
        ],
        "faces_covered_in_frames": covered(prepared),
        "names_stripped": order.privacy.salt is not None,
        "fingerprint": run.fingerprint,
        "config": privacy.public_config(config.to_dict(run.config), order.privacy.salt is not None),
    }
    atomic.write_json(staging.dataset / PROVENANCE, provenance)
    licence = license_of(licences(choice.table))
    front = {"license": licence.lower() if licence else "other", "tags": ["egocentric", "hands"], **head}
    note = (
        f"\n\n> **Random weights.** {', '.join(randoms)}: labels and skills mean nothing." if randoms else ""
    )
    text = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# First-person hand work as clips\n\n"
        f"Made by ego2robot {__version__}: {n:,} of {choice.kept:,} kept clips "
        f"({choice.planned:,} planned), {order.spec.height} × {order.spec.width} pixels at "
        f"{float(order.fps):g} frames/s, {order.codec.upper()}.{note}\n\n{loading}\n"
    )
    if not n:
        text += f"\n{card.EMPTY} No clip could be exported; the files only show the format.\n"
    ids, lengths = choice.table["clip_id"].to_pylist(), choice.table["n_frames"].to_pylist()
    missing = {clip_id for clip_id, _ in left_out}
    frames = sum(k for clip_id, k in zip(ids, lengths, strict=True) if clip_id not in missing)
    text += f"\n## Privacy\n\n{card.privacy(covered(prepared), frames, order.privacy.salt is not None)}\n"
    said = (
        f"The footage is under `{card.inline(licence)}`, as its source says."
        if licence
        else ("Unknown, or it differs from video to video: ask whoever recorded them.")
    )
    text += f"\n## Licence\n\n{said}\n"
    atomic.write_text(staging.dataset / "README.md", text)


def warnings(run: RunDir, prepared: Prepared, left_out: Sequence[tuple[str, str]]) -> list[str]:
    found, chosen = [], prepared.choice.table.num_rows
    if chosen == len(left_out):
        cause = "no clip was kept" if not chosen else "none of the chosen clips could be read"
        found.append(f"the dataset is empty: {cause}; lower the gate's thresholds or add footage")
    elif left_out:
        found.append(f"{len(left_out)} of {chosen} chosen clips were left out: {left_out[0][1]}")
    if randoms := random_models(run):
        found.append(f"random weights: {', '.join(randoms)}; their labels and skills mean nothing")
    return found
