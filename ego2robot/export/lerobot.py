"""The best kept clips of a run as a LeRobot dataset v3.0, without needing lerobot.

Layout and names follow lerobot 0.4.4 (``lerobot/datasets/utils.py`` and ``lerobot_dataset.py``). One pass
per video: decode, encode, append. Everything is written aside and renamed into place at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ego2robot import __version__, config, decode
from ego2robot.decode import policy
from ego2robot.errors import UserError, VideoError
from ego2robot.export import stats, video
from ego2robot.export.card import Facts, card, license_of
from ego2robot.export.files import Limits, Place, TableFiles
from ego2robot.sources.base import identity
from ego2robot.stages import camera, tracks
from ego2robot.stages.one_euro import OneEuro
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_from_table
from ego2robot.types import SIDES, Clip, ClipFrames, FrameSpec, Hand, Video

Schema = Literal["hands", "reference"]
ActionName = Literal["compensated", "wrist"]
Smooth = Literal["none", "action", "all"]
CodecName = Literal["av1", "h264"]

VIDEO_KEY = "observation.images.top"
STATE, ACTION = "observation.state", "action"
PROVENANCE = "meta/ego2robot.json"
UNLABELLED = "unlabelled hand manipulation"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CONTINUES_S = 2.0  # clips of one video that are no further apart share their hands' identities
GROUP_FRAMES, GROUP_EPISODES = 4096, 256  # rows of a row group
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
# MediaPipe's 21 hand landmarks, in its order.
LANDMARKS = (
    "wrist",
    *(f"thumb_{joint}" for joint in ("cmc", "mcp", "ip", "tip")),
    *(f"{f}_{j}" for f in ("index", "middle", "ring", "pinky") for j in ("mcp", "pip", "dip", "tip")),
)
BOX = ("x_min", "y_min", "x_max", "y_max")
NAMES: dict[Schema, tuple[list[str], list[str]]] = {
    "hands": (
        [
            f"{side}.{part}"
            for side in SIDES
            for part in (
                "visible",
                "interpolated",
                *(f"box.{name}" for name in BOX),
                *(f"{landmark}.{axis}" for landmark in LANDMARKS for axis in "xy"),
            )
        ],
        [f"{side}.wrist.{axis}" for side in SIDES for axis in ("dx", "dy")],
    ),
    "reference": ([f"hand.box.{name}" for name in BOX], ["wrist.dx", "wrist.dy"]),
}


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


@dataclass(frozen=True)
class Chosen:
    """A clip on its way to becoming an episode: its row of ``clips``, its task, its skill."""

    row: Mapping[str, Any]
    task: str
    skill_id: int | None
    skill: str | None


def export_lerobot(
    run: RunDir,
    out: Path,
    top: int,
    schema: Schema = "hands",
    codec: CodecName = "av1",
    action: ActionName = "compensated",
    smooth: Smooth = "action",
    progress: Callable[[int, int], None] | None = None,
    limits: Limits | None = None,
) -> ExportResult:
    """Writes the ``top`` best kept clips of a run as a LeRobot dataset v3.0.

    Clips rank by ``label_score`` when they were labelled by real weights, else by ``hand_visibility``;
    ties by ``motion``, then by ``clip_id``. Episodes are stored by (video name, start). A clip that cannot
    be read any more is left out, with the reason; nothing takes its place.

    Args:
        out: the dataset's folder; an earlier export in it is replaced, anything else refused.
        schema: ``hands``: state float32 [96], action float32 [4]; ``reference``: [4] and [2]. Both are
            2D pseudo-actions in shares of the picture.
        action: of ``hands``: ``compensated`` takes the camera's motion off the wrists', ``wrist`` does not.
        smooth: of ``hands``: what goes through a One-Euro filter: ``none``, the compensated ``action``, or
            ``all``, states too.
        progress: told (clips done, clips chosen).
        limits: when a new file begins; LeRobot's own by default.

    Raises:
        UserError: ``out`` is in use by something else, the frame rate is not a whole number, the
            encoder is missing, or the disk is full. Nothing is left behind, ``out`` is as it was.
    """
    fps = _whole(run.config.clips.sample_fps)
    _check_arguments(top, schema, codec)
    out = Path(out).expanduser().resolve()
    _check_target(out)
    picks, ranked_by, counts = choose(run, top)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        aside = _sibling(out, "tmp")
        try:
            aside.mkdir()
            spec = FrameSpec(run.config.frames.height, run.config.frames.width, run.config.frames.fit)
            job = _Job(run, aside, fps, spec, schema, codec, action, smooth, limits or Limits())
            job.write(picks, progress)
            job.finish(ranked_by, counts)
            _publish(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        cause = error.strerror or str(error)
        raise UserError(
            f"{out}: the dataset cannot be written ({cause}); make room or choose another folder"
        ) from None
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return ExportResult(
        out, job.episodes, job.frames, len(job.tasks), size, job.skipped, job.warnings(len(picks))
    )


# -- choosing -------------------------------------------------------------------------------------


def choose(run: RunDir, top: int) -> tuple[list[Chosen], str, dict[str, int]]:
    """The ``top`` best kept clips in storing order, what they were ranked by, and clip counts.

    Returns:
        The clips; ``"label_score"`` or ``"hand_visibility"``; ``{"planned": …, "kept": …}``.
    """
    clips = run.dataset("clips")
    columns = ["clip_id", "video_id", "source", "name", "start_s", "end_s", "motion"]
    columns += ["hand_visibility", "label", "label_score", "meta"]
    kept = clips.to_table(columns, filter=ds.field("decision") == "kept")
    labelled = pc.count(kept["label_score"]).as_py() > 0 and "clip" not in random_models(run)
    ranked_by = "label_score" if labelled else "hand_visibility"
    order = [(ranked_by, "descending"), ("motion", "descending"), ("clip_id", "ascending")]
    best = kept.take(pc.sort_indices(kept, order)[:top])
    best = best.take(pc.sort_indices(best, [("name", "ascending"), ("start_s", "ascending")]))
    skills, meaningful = _skills(run, best["clip_id"])
    picks = []
    for row in best.to_pylist():
        row["meta"] = dict(row["meta"] or ())
        skill_id, skill = skills.get(row["clip_id"], (None, None))
        task = _task(row, labelled, skill if meaningful else None)
        picks.append(Chosen(row, task, skill_id, skill))
    return picks, ranked_by, {"planned": clips.count_rows(), "kept": kept.num_rows}


def random_models(run: RunDir) -> list[str]:
    """The embeddings of a run that were made with random weights."""
    return [
        name
        for name in run.embeddings()
        if (run.dataset(f"embeddings/{name}").schema.metadata or {}).get(b"random") == b"true"
    ]


def _task(row: Mapping[str, Any], labelled: bool, skill: str | None) -> str:
    """What the episode shows, in words. A label or a skill by random weights says nothing."""
    text = ((row["label"] if labelled else None) or row["meta"].get("task") or "").strip()
    return text or (f"{UNLABELLED} ({skill})" if skill else UNLABELLED)


def _skills(run: RunDir, clip_ids: pa.ChunkedArray) -> tuple[dict[str, tuple[int, str]], bool]:
    """The number and name of each clip's skill, and whether skills mean something (no random weights)."""
    found = run.skills()
    if not found:
        return {}, False
    names = {skill["skill"]: skill["name"] for skill in found["skills"]}
    rows = ds.dataset(run.path / "skills" / "assignment.parquet").to_table(
        ["clip_id", "skill"], filter=ds.field("clip_id").isin(clip_ids.combine_chunks())
    )
    skills = {row["clip_id"]: (row["skill"], names[row["skill"]]) for row in rows.to_pylist()}
    return skills, not found["random"]


# -- writing --------------------------------------------------------------------------------------


@dataclass
class _Job:
    """One export on its way: open files, and what the dataset adds up to so far."""

    run: RunDir
    folder: Path
    fps: int
    spec: FrameSpec
    schema: Schema
    codec: CodecName
    action: ActionName
    smooth: Smooth
    limits: Limits
    episodes: int = 0
    frames: int = 0
    hand_frames: int = 0
    tasks: dict[str, int] = field(default_factory=dict)  # text → task_index
    task_counts: Counter[str] = field(default_factory=Counter)
    video_counts: Counter[str] = field(default_factory=Counter)
    licenses: set[tuple[str, str | None]] = field(default_factory=set)  # source, its own licence field
    skipped: list[tuple[str, str]] = field(default_factory=list)
    pixels: stats.PixelHistogram = field(default_factory=stats.PixelHistogram)
    data_paths: list[Path] = field(default_factory=list)
    before: tuple[Clip, tracks.Followed] | None = None  # the latest episode's hands

    def write(self, picks: Sequence[Chosen], progress: Callable[[int, int], None] | None) -> None:
        """Decodes, encodes and appends every chosen clip, video by video."""
        features = self.features()
        with ExitStack() as stack:
            self._data = stack.enter_context(
                TableFiles(self.folder / "data", data_schema(features), self.limits, GROUP_FRAMES)
            )
            self._table = stack.enter_context(
                TableFiles(
                    self.folder / "meta" / "episodes", episode_schema(features), self.limits, GROUP_EPISODES
                )
            )
            self._videos = stack.enter_context(
                video.VideoFiles(self.folder / "videos" / VIDEO_KEY, self.fps, self.limits)
            )
            footage = _Footage(self.run, self.spec, picks)
            for done, (pick, found) in enumerate(footage.read(), start=1):
                if isinstance(found, str):
                    self.skipped.append((pick.row["clip_id"], found))
                else:
                    self._add(pick, found, footage.hands(pick))
                if progress:
                    progress(done, len(picks))
        self.data_paths = self._data.paths

    def features(self) -> dict[str, dict[str, Any]]:
        """``features`` of info.json, in LeRobot's order."""
        state, action = NAMES[self.schema]
        picture = {
            "dtype": "video",
            "shape": [self.spec.height, self.spec.width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": self.spec.height,
                "video.width": self.spec.width,
                "video.codec": video.CODECS[self.codec].name,
                "video.pix_fmt": video.PIX_FMT,
                "video.is_depth_map": False,
                "video.fps": self.fps,
                "video.channels": 3,
                "has_audio": False,
            },
        }
        return {
            VIDEO_KEY: picture,
            STATE: {"dtype": "float32", "shape": [len(state)], "names": state},
            ACTION: {"dtype": "float32", "shape": [len(action)], "names": action},
            **{name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in INDEX_FEATURES.items()},
        }

    def _add(self, pick: Chosen, found: ClipFrames, hands: list[Hand]) -> None:
        """Appends one episode to video, data and meta/episodes."""
        n = len(found.frames_THWC)
        task_index = self.tasks.setdefault(pick.task, len(self.tasks))
        state, action, seen = self._state_and_action(found, hands)
        columns: dict[str, np.ndarray] = {
            STATE: state,
            ACTION: action,
            "timestamp": (np.arange(n) / self.fps).astype(np.float32),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, self.episodes),
            "index": self.frames + np.arange(n),
            "task_index": np.full(n, task_index),
        }
        mp4 = video.encode_episode(found.frames_THWC.cpu().numpy(), self.fps, video.CODECS[self.codec])
        segment = self._videos.add(mp4, n)
        data_place = self._data.place()
        self._data.add(_data_table(columns))
        pixels = stats.PixelHistogram()
        pixels.add(found.frames_THWC)
        summary = {VIDEO_KEY: pixels.statistics()}
        summary |= {name: stats.vector_statistics(values) for name, values in columns.items()}
        self._table.add(self._episode_row(pick, n, data_place, segment, summary))
        self.pixels.merge(pixels)
        self.episodes += 1
        self.frames += n
        self.hand_frames += seen
        self.task_counts[pick.task] += 1
        self.video_counts[pick.row["name"]] += 1
        self.licenses.add((pick.row["source"], pick.row["meta"].get("license")))

    def _state_and_action(
        self, found: ClipFrames, hands: Sequence[Hand]
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """State float32 [n, 96 or 4], action float32 [n, 4 or 2], and the number of frames with a hand."""
        n = len(found.frames_THWC)
        aspect = self.spec.width / self.spec.height
        asked = self.run.config.hands
        dealt = self._follow(found.clip, hands, n, aspect)
        seen = int(np.logical_or.reduce([dealt.tracks[side].visible for side in SIDES]).sum())
        if self.schema == "reference":
            return tracks.reference_state(hands, n), tracks.reference_action(hands, n), seen
        shown = dealt.tracks
        if self.smooth == "all":
            shown = tracks.tracks_of(dealt, n, asked.max_gap, self.fps, aspect, OneEuro())
        if self.action == "wrist":
            action = tracks.wrist_action(shown)
        else:
            path = camera.camera_path(found, hands)
            filter_ = None if self.smooth == "none" else OneEuro()
            action = camera.compensated_wrist_action(dealt.tracks, path, filter_, self.fps)
        return state_of(shown), action, seen

    def _follow(self, clip: Clip, hands: Sequence[Hand], n: int, aspect: float) -> tracks.Followed:
        """Both hands of a clip; where it goes on from the episode before it, so do they."""
        asked = self.run.config.hands
        looked = range(n) if asked.dense else range(0, n, asked.every)
        followed = None
        if self.before and self.before[0].video_id == clip.video_id:
            earlier, dealt = self.before
            offset = clip.first - earlier.first
            if 0 <= offset <= earlier.n_frames + CONTINUES_S * clip.sample_fps:
                followed = tracks.continue_tracks(
                    dealt, hands, n, offset, max_gap=asked.max_gap, looked=looked, fps=self.fps, aspect=aspect
                )
        followed = followed or tracks.follow(
            hands, n, max_gap=asked.max_gap, looked=looked, fps=self.fps, aspect=aspect
        )
        self.before = clip, followed
        return followed

    def _episode_row(
        self,
        pick: Chosen,
        n: int,
        data: Place,
        segment: video.Segment,
        summary: Mapping[str, stats.Statistics],
    ) -> pa.Table:
        own = self._table.place()
        row = pick.row
        cells: dict[str, Any] = {
            "episode_index": self.episodes,
            "tasks": [pick.task],
            "length": n,
            "data/chunk_index": data.chunk,
            "data/file_index": data.file,
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + n,
            f"videos/{VIDEO_KEY}/chunk_index": segment.place.chunk,
            f"videos/{VIDEO_KEY}/file_index": segment.place.file,
            f"videos/{VIDEO_KEY}/from_timestamp": segment.from_s,
            f"videos/{VIDEO_KEY}/to_timestamp": segment.to_s,
            "clip_id": row["clip_id"],
            "video": row["name"],
            "start_s": row["start_s"],
            "end_s": row["end_s"],
            "skill_id": pick.skill_id,
            "skill": pick.skill,
            "motion": row["motion"],
            "hand_visibility": row["hand_visibility"],
            "label": row["label"],
            "label_score": row["label_score"],
            "meta/episodes/chunk_index": own.chunk,
            "meta/episodes/file_index": own.file,
        }
        for feature, values in summary.items():
            cells |= {f"stats/{feature}/{name}": value.tolist() for name, value in values.items()}
        return pa.Table.from_pylist([cells], schema=episode_schema(self.features()))

    def finish(self, ranked_by: str, counts: Mapping[str, int]) -> None:
        """Writes what describes the whole dataset, once its files are complete."""
        features = self.features()
        atomic.write_json(self.folder / "meta" / "info.json", self._info(features))
        atomic.write_json(self.folder / "meta" / "stats.json", self._statistics(features))
        atomic.write_parquet(self.folder / "meta" / "tasks.parquet", tasks_table(self.tasks))
        randoms = random_models(self.run)
        provenance = {
            "made_by": "ego2robot",
            "version": __version__,
            "schema": self.schema,
            "codec": self.codec,
            "action": self.action,
            "smooth": self.smooth,
            "pseudo_actions": True,
            "ranked_by": ranked_by,
            "random_weights": randoms,
            "skipped": [{"clip_id": clip_id, "reason": reason} for clip_id, reason in self.skipped],
            "fingerprint": self.run.fingerprint,
            "config": _public(self.run.config),
        }
        atomic.write_json(self.folder / PROVENANCE, provenance)
        facts = Facts(
            schema=self.schema,
            action=self.action if self.schema == "hands" else "reference",
            codec=self.codec,
            fps=self.fps,
            height=self.spec.height,
            width=self.spec.width,
            frames=self.frames,
            tasks=self.task_counts,
            videos=self.video_counts,
            kept=counts["kept"],
            considered=counts["planned"],
            hand_frames=self.hand_frames,
            skipped=len(self.skipped),
            ranked_by=f"`{ranked_by}`",
            random_models=randoms,
            license=license_of(self.licenses),
            version=__version__,
        )
        atomic.write_text(self.folder / "README.md", card(facts))

    def _info(self, features: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "codebase_version": "v3.0",
            "robot_type": "human_hands",
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": self.limits.chunk_files,
            "data_files_size_in_mb": max(1, self.limits.data_bytes >> 20),
            "video_files_size_in_mb": max(1, self.limits.video_bytes >> 20),
            "fps": self.fps,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": features,
        }

    def _statistics(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """``stats.json``; without frames there is nothing to sum up, and it is empty."""
        if not self.frames:
            return {}
        found = {VIDEO_KEY: self.pixels.statistics()}
        for name, feature in features.items():
            if name != VIDEO_KEY:
                found[name] = stats.column_statistics(self.data_paths, name, feature["shape"][0])
        return {name: {k: v.tolist() for k, v in values.items()} for name, values in found.items()}

    def warnings(self, chosen: int) -> list[str]:
        found = []
        if not self.episodes:
            cause = "no clip was kept" if not chosen else "none of the chosen clips could be read"
            found.append(f"the dataset is empty: {cause}; lower the gate's thresholds or add footage")
        elif self.skipped:
            found.append(f"{len(self.skipped)} of {chosen} chosen clips were left out: {self.skipped[0][1]}")
        if self.episodes and not self.hand_frames:
            found.append("no hand is seen in any episode: states and actions are all zero")
        if randoms := random_models(self.run):
            found.append(f"random weights: {', '.join(randoms)}; their labels and skills mean nothing")
        return found


def _public(cfg: config.Config) -> dict[str, Any]:
    """The configuration without the folders of the machine: datasets are made to be given away."""
    tree = config.to_dict(cfg)
    tree["run_dir"] = tree["export"]["path"] = ""
    tree["source"]["path"] = Path(cfg.source.path).name
    return tree


# -- reading back ---------------------------------------------------------------------------------


class _Footage:
    """The chosen clips' frames and hands, one pass per video, in storing order."""

    def __init__(self, run: RunDir, spec: FrameSpec, picks: Sequence[Chosen]) -> None:
        self._run, self._spec = run, spec
        self._groups: dict[str, list[Chosen]] = {}
        for pick in picks:
            self._groups.setdefault(pick.row["video_id"], []).append(pick)
        self._videos: dict[str, Video] = {}
        self._clips: dict[str, Clip] = {}
        self._hand_files: dict[str, Path] = {}
        wanted = {pick.row["clip_id"] for pick in picks}
        hand_files = {
            unit: run.path / path
            for record in run.records()
            for path in record.files
            if path.startswith("hands/")
            for unit in record.units
        }
        table = run.units()
        rows = pc.is_in(table["video_id"], pa.array(list(self._groups), pa.string()))
        for unit in units_from_table(table.filter(rows)):
            self._videos[unit.video.video_id] = unit.video
            for clip in unit.clips:
                if clip.clip_id in wanted:
                    self._clips[clip.clip_id] = clip
                    if unit.unit_id in hand_files:
                        self._hand_files[clip.clip_id] = hand_files[unit.unit_id]
        self._loaded: tuple[Path | None, dict[str, list[Hand]]] = (None, {})

    def read(self) -> Iterator[tuple[Chosen, ClipFrames | str]]:
        """Each chosen clip once, with its frames or the reason why there are none."""
        for video_id, group in self._groups.items():
            waiting = {pick.row["clip_id"]: pick for pick in group}
            reason = "its frames did not come"
            try:
                for found in self._decode(self._videos[video_id], list(waiting)):
                    pick = waiting.pop(found.clip.clip_id)
                    yield pick, found.reason if isinstance(found, decode.ClipFailure) else found
            except VideoError as error:
                reason = str(error)
            for pick in waiting.values():
                yield pick, reason

    def _decode(self, source: Video, clip_ids: Sequence[str]) -> Iterator[ClipFrames | decode.ClipFailure]:
        assert source.info is not None
        try:
            same = identity(source.blob) == source.video_id
        except OSError as error:
            cause = error.strerror or str(error)
            raise VideoError(source.name, cause, "put it back, then export again", "missing") from None
        if not same:
            raise VideoError(
                source.name, "its bytes have changed since the run", "run on it again", "missing"
            )
        backend, _ = policy.pick(source.info, self._run.config.decode.backend, "cpu")
        clips = [self._clips[clip_id] for clip_id in clip_ids]
        # Decoded as they were when hands were looked for: the landmarks are of these very frames.
        fast = self._run.config.decode.mode == "fast"
        yield from decode.read_clips(
            source.name, source.blob, source.info, clips, self._spec, backend, "cpu", fast
        )

    def hands(self, pick: Chosen) -> list[Hand]:
        """The detected hands of a clip, by frame and side; from one part, kept until the next is needed."""
        clip_id = pick.row["clip_id"]
        path = self._hand_files.get(clip_id)
        if path is None:
            return []
        if self._loaded[0] != path:
            ids = [c for c, p in self._hand_files.items() if p == path]
            table = pq.read_table(path, filters=ds.field("clip_id").isin(ids))
            self._loaded = (path, _hands_by_clip(table))
        return self._loaded[1].get(clip_id, [])


def _hands_by_clip(table: pa.Table) -> dict[str, list[Hand]]:
    found: dict[str, list[Hand]] = {}
    for row in table.to_pylist():
        landmarks, world = (np.asarray(row[k], np.float32).reshape(-1, 3) for k in ("landmarks", "world"))
        box = np.asarray(row["box"], np.float32)
        hand = Hand(row["frame"], row["side"], row["score"], box, landmarks, world, row["presence"])
        found.setdefault(row["clip_id"], []).append(hand)
    for hands in found.values():
        hands.sort(key=lambda hand: (hand.frame, hand.side))
    return found


# -- features and tables --------------------------------------------------------------------------


def state_of(shown: tracks.Tracks) -> np.ndarray:
    """float32 [n, 96], as ``NAMES["hands"]`` says; zeros where a hand is not seen."""
    parts = []
    for side in SIDES:
        track = shown[side]
        landmarks = track.landmarks[:, :, :2].reshape(len(track.visible), -1)
        parts += [track.visible[:, None], track.interpolated[:, None], track.box, landmarks]
    return np.concatenate(parts, 1).astype(np.float32)


def data_schema(features: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """Of the data files: every feature but video, with the types that ``datasets`` should give them."""
    fields, described = [], {}
    for name, feature in features.items():
        if feature["dtype"] == "video":
            continue
        size = feature["shape"][0]
        value = {"dtype": feature["dtype"], "_type": "Value"}
        scalar = name in INDEX_FEATURES
        kind = getattr(pa, feature["dtype"])()
        fields.append(pa.field(name, kind if scalar else pa.list_(kind, size)))
        described[name] = value if scalar else {"feature": value, "length": size, "_type": "Sequence"}
    metadata = {"huggingface": json.dumps({"info": {"features": described}})}
    return pa.schema(fields, metadata=metadata)


def _data_table(columns: Mapping[str, np.ndarray]) -> pa.Table:
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        if values.ndim == 2
        else pa.array(values)
        for name, values in columns.items()
    }
    return pa.table(arrays)


def episode_schema(features: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """Of ``meta/episodes``: LeRobot's columns, and where each episode comes from."""
    fields: list[tuple[str, pa.DataType]] = [
        ("episode_index", pa.int64()),
        ("tasks", pa.list_(pa.string())),
        ("length", pa.int64()),
        ("data/chunk_index", pa.int64()),
        ("data/file_index", pa.int64()),
        ("dataset_from_index", pa.int64()),
        ("dataset_to_index", pa.int64()),
        (f"videos/{VIDEO_KEY}/chunk_index", pa.int64()),
        (f"videos/{VIDEO_KEY}/file_index", pa.int64()),
        (f"videos/{VIDEO_KEY}/from_timestamp", pa.float64()),
        (f"videos/{VIDEO_KEY}/to_timestamp", pa.float64()),
        ("clip_id", pa.string()),
        ("video", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("skill_id", pa.int64()),
        ("skill", pa.string()),
        ("motion", pa.float64()),
        ("hand_visibility", pa.float64()),
        ("label", pa.string()),
        ("label_score", pa.float64()),
    ]
    for name, feature in features.items():
        for statistic in stats.NAMES:
            whole = statistic == "count" or (statistic in ("min", "max") and feature["dtype"] == "int64")
            kind = pa.list_(pa.int64() if whole else pa.float64())
            if feature["dtype"] == "video" and statistic != "count":
                kind = pa.list_(pa.list_(kind))
            fields.append((f"stats/{name}/{statistic}", kind))
    fields += [("meta/episodes/chunk_index", pa.int64()), ("meta/episodes/file_index", pa.int64())]
    return pa.schema(fields)


def tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """``task_index`` by task; pandas reads it with the task as index, as LeRobot expects."""
    names = (
        {"name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {
            "name": "task",
            "pandas_type": "unicode",
            "numpy_type": "object",
        },
    )
    heading = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}
    # https://pandas.pydata.org/docs/development/developer.html#storing-pandas-dataframe-objects
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{**heading, "metadata": {"encoding": "UTF-8"}}],
        "columns": [{**column, "field_name": column["name"], "metadata": None} for column in names],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    fields = [pa.field("task_index", pa.int64()), pa.field("task", pa.string())]
    return pa.table(
        [list(tasks.values()), list(tasks)],
        schema=pa.schema(fields, metadata={"pandas": json.dumps(pandas)}),
    )


# -- the target folder ----------------------------------------------------------------------------


def _whole(fps: float) -> int:
    if fps != int(fps):
        raise UserError(
            f"clips.sample_fps={fps:g}: a LeRobot dataset has a whole number of frames a second; "
            "make a run with a whole clips.sample_fps to export it"
        )
    return int(fps)


def _check_arguments(top: int, schema: str, codec: str) -> None:
    if top < 1:
        raise UserError(f"top={top}: at least one episode must be asked for")
    if schema not in NAMES:
        raise UserError(f"schema={schema!r}: should be one of {', '.join(NAMES)}")
    if codec not in video.CODECS:
        raise UserError(f"codec={codec!r}: should be one of {', '.join(video.CODECS)}")
    encoder = video.CODECS[codec].encoder
    if encoder not in av.codecs_available:
        others = [name for name, c in video.CODECS.items() if c.encoder in av.codecs_available]
        raise UserError(
            f"codec={codec}: this PyAV has no {encoder}; "
            + (f"use codec={others[0]}" if others else "pip install --force-reinstall av")
        )


def _check_target(out: Path) -> None:
    """Refuses a place that holds anything but an earlier export."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: a file is in the way; choose another folder for the dataset")
    if any(out.iterdir()) and not (out / PROVENANCE).is_file():
        raise UserError(f"{out}: not empty and not a dataset made by ego2robot; choose another folder")


def _sibling(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}-{socket.gethostname()}-{os.getpid()}")


def _remove_leftovers(out: Path) -> None:
    """Deletes what exports that were killed on this machine left beside ``out``."""
    host = f"-{socket.gethostname()}-"
    for what in ("old", "tmp"):
        for path in sorted(out.parent.iterdir()):
            pid = path.name.rpartition("-")[2]
            if not path.name.startswith(f"{out.name}.{what}{host}") or not pid.isdecimal():
                continue
            if psutil.pid_exists(int(pid)) and int(pid) != os.getpid():
                continue
            if what == "old" and not out.exists():  # killed between the two renames
                path.rename(out)
            else:
                shutil.rmtree(path)


def _publish(aside: Path, out: Path) -> None:
    """Puts the finished dataset in place; an earlier one is there until the new one is."""
    old = _sibling(out, "old") if out.exists() else None
    if old:
        out.rename(old)
    try:
        aside.rename(out)
    except OSError:
        if old:
            old.rename(out)
        raise
    atomic.sync_folder(out.parent)
    if old:
        shutil.rmtree(old)
