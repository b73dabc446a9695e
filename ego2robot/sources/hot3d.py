"""HOT3D: hands and objects in 3D, seen from Project Aria and Quest 3.

Two forms. The full dataset has a folder a recording: ``recording.vrs``, ``metadata.json``,
``headset_trajectory.csv``, ``dynamic_objects.csv``, ``mano_hand_pose_trajectory.jsonl``,
``umetrack_hand_pose_trajectory.jsonl``; its annotations count nanoseconds of the *time code* that all
devices shared, which the VRS file translates from the clock of its pictures. HOT3D-Clips are tars of five
seconds, see :mod:`ego2robot.decode.clip_tar`. Of Quest 3, only the clips are read: its VRS files hold two
grey cameras and no RGB, and are not Aria's.

The wrist is UmeTrack's. MANO's translation is not that of a joint: the wrist lies at the translation plus
the shape's own root joint, unturned, some 10 cm off (measured on the toolkit's two sample recordings: the
difference to UmeTrack's wrist stays the same within 0.6 mm while the hands move). Without the MANO model,
which is not free to copy, it cannot be computed; so MANO's parameters are handed over as they are, in the
world, and a recording without UmeTrack has no ``wrist``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ego2robot import config, poses
from ego2robot.decode import clip_tar, vrs
from ego2robot.errors import UserError, VideoError
from ego2robot.fisheye624 import CLOCKWISE, camera_of, describe
from ego2robot.sources.base import DEFAULTS, Candidate, Source, display_name, file_blob, find_files, storable
from ego2robot.sources.states import Track, assemble
from ego2robot.sources.tables import (
    TimedCSV,
    broken,
    jsonl_between,
    numbers,
    small_json,
    timed_csv,
    unreadable,
)
from ego2robot.types import SIDES, Blob, Trajectory, Video

RECORDING = "recording.vrs"
HEADSET, OBJECTS = "headset_trajectory.csv", "dynamic_objects.csv"
MANO, UMETRACK = "mano_hand_pose_trajectory.jsonl", "umetrack_hand_pose_trajectory.jsonl"
COMPANIONS = (HEADSET, OBJECTS, MANO, UMETRACK)
TIME, UID = "timestamp[ns]", "object_uid"
POSE = ["t_wo_x[m]", "t_wo_y[m]", "t_wo_z[m]", "q_wo_w", "q_wo_x", "q_wo_y", "q_wo_z"]
N_OBJECTS = 6  # columns for so many of a recording's objects, by their id
N_MANO, N_BETAS, N_JOINTS = 15, 10, 22  # clips have 20 of UmeTrack's joint angles, recordings 22
HANDS = {"left": "0", "right": "1"}
# Annotations come at 30 to 90 Hz; further apart they say nothing of the time between.
GAP_NS = 100_000_000
SNAP_NS = 1_000  # a moment nearer than this to a measurement is that measurement's
MAX_UIDS = 1000
NOTE = (
    "; wrist: UmeTrack's; mano.*: MANO's own translation, orientation, pose (15 principal components) and "
    "betas, always in the world; joint.*: UmeTrack's angles, radians; object.N.*: the N-th of the "
    "recording's objects by id, which the clip's meta lists"
)
Pose = np.ndarray
Measured = dict[str, tuple[np.ndarray, np.ndarray]]  # by track: times int64 [N], values [N, ...]


class HOT3D(Source):
    def candidates(
        self, path: str, skip: Path | None, options: config.Source = DEFAULTS
    ) -> Iterator[Candidate | VideoError]:
        found = find_files(path, (".vrs", ".tar", ".csv"), skip, "HOT3D recordings or clips")
        recordings = {file.parent for file in found if file.name == RECORDING}
        folders = {file.parent for file in found if file.name == HEADSET} | recordings
        clips = [file for file in found if file.suffix.lower() == ".tar"]
        if not folders and not clips:
            wanted = f"folders with {RECORDING}, or clip-….tar of HOT3D-Clips"
            raise UserError(f"source.path={path}: no HOT3D there; give {wanted}")
        with vrs.camera_reader() as camera_of:
            for folder in sorted(folders):
                name = display_name(folder / RECORDING, path)
                if folder in recordings:
                    yield _recording(name, folder, camera_of)
                else:
                    cause = f"no {RECORDING} beside {HEADSET}"
                    yield VideoError(name, cause, "fetch the recording too", "missing")
        for file in clips:
            yield _clip(display_name(file, path), file)

    def trajectory(
        self, video: Video, times_s: np.ndarray, options: config.Source = DEFAULTS
    ) -> Trajectory | None:
        """Poses of headset, camera, both hands and the objects; see :mod:`ego2robot.sources.states`.

        State: headset and camera (9 each, in the world); for each hand UmeTrack's wrist (9), its confidence
        and 22 joint angles, MANO's orientation and translation (9, in the world), pose (15) and betas (10);
        six objects (9 each). Action: wrists and camera. Given at the annotations' own moments where a frame
        has one, else interpolated. NaN: not annotated.

        Raises:
            VideoError: a file cannot be used, or the clocks or the camera of a recording are not known.
        """
        assert video.info is not None
        objects = _listed(video.meta.get("objects"))
        at_ns = np.round((video.info.start_s + np.asarray(times_s, np.float64)) * 1e9).astype(np.int64)
        if video.info.codec == clip_tar.CODEC:
            measured = _of_clip(video, at_ns, objects)
        else:
            measured, at_ns = _of_recording(video, at_ns, objects)

        def at(name: str, *shape: int) -> np.ndarray:
            times, values = measured.get(name, (np.zeros(0, np.int64), np.zeros((0, *shape))))
            return _at(times, values, at_ns)

        T_world_camera = at("camera", 4, 4)
        tracks = [
            Track("headset", "fixed", at("headset", 4, 4)),
            Track("camera", "fixed", T_world_camera, acts=True),
        ]
        for side in SIDES:
            tracks += [
                Track(f"{side}.wrist", "pose", at(f"{side}.wrist", 4, 4), acts=True),
                Track(f"{side}.wrist", "number", at(f"{side}.confidence", 1), ("confidence",)),
                Track(f"{side}.joint", "number", at(f"{side}.joint", N_JOINTS), _count(N_JOINTS)),
                Track(f"{side}.mano", "fixed", at(f"{side}.mano", 4, 4)),
                Track(f"{side}.mano.pose", "number", at(f"{side}.mano.pose", N_MANO), _count(N_MANO)),
                Track(f"{side}.mano.beta", "number", at(f"{side}.mano.beta", N_BETAS), _count(N_BETAS)),
            ]
        tracks += [Track(f"object.{k}", "pose", at(f"object.{k}", 4, 4)) for k in range(N_OBJECTS)]
        return assemble(tracks, T_world_camera, options.frame, NOTE)


def _count(n: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(n))


def _at(times: np.ndarray, values: np.ndarray, at_ns: np.ndarray) -> np.ndarray:
    """Values at some moments; those within ``SNAP_NS`` of a measurement are its own."""
    if not len(times):
        return np.full((len(at_ns), *values.shape[1:]), np.nan)
    near = np.clip(np.searchsorted(times, at_ns), 1, max(1, len(times) - 1))
    near = np.where(
        at_ns - times[near - 1] <= times[np.minimum(near, len(times) - 1)] - at_ns, near - 1, near
    )
    near = np.minimum(near, len(times) - 1)
    snapped = np.where(np.abs(times[near] - at_ns) <= SNAP_NS, times[near], at_ns)
    between = poses.interpolate if values.ndim == 3 else poses.interpolate_values
    return between(times, values, snapped, GAP_NS)


# -- the full dataset -----------------------------------------------------------------------------


def _recording(
    name: str, folder: Path, camera_of: Callable[[str, Blob], dict[str, object] | None]
) -> Candidate | VideoError:
    wrong: list[str] = []
    about: Any = {}
    try:
        about = small_json(folder / "metadata.json")
    except VideoError as error:
        wrong.append(f"metadata.json: {error.cause}")
    about = about if isinstance(about, dict) else {}
    if str(about.get("headset", "")).startswith("Quest"):
        cause = "a Quest 3 recording: two grey cameras in a VRS file of another kind"
        return VideoError(name, cause, "use its clips of HOT3D-Clips", "unsupported")
    try:
        blob = file_blob(folder / RECORDING)
        camera = camera_of(name, blob)
    except VideoError as error:
        return error
    meta = {
        key: storable(str(about[key]))
        for key in ("participant_id", "recording_name", "headset")
        if isinstance(about.get(key), str)
    }
    if camera is None:
        wrong.append("no calibration in the recording")
    else:
        meta["intrinsics"] = json.dumps(camera, separators=(",", ":"))
    for companion in COMPANIONS:
        try:
            if companion == OBJECTS:
                meta["objects"] = json.dumps(object_ids(folder / OBJECTS))
            elif companion == HEADSET:
                _table(folder / companion)
            elif not (folder / companion).is_file():
                raise broken(folder / companion, "not there")
        except VideoError as error:
            wrong.append(f"{companion}: {error.cause}")
    problem = None
    if wrong:
        problem = VideoError(name, "; ".join(wrong), "its pictures are used, without these", "metadata")
    return Candidate(name, blob, meta, problem)


def _table(path: Path) -> TimedCSV:
    return timed_csv(path, TIME, [UID, *POSE])


def object_ids(path: Path) -> list[str]:
    """The ids in ``dynamic_objects.csv``, ascending. Raises VideoError where it cannot be read."""
    table = _table(path)
    at = table.header.index(UID)
    found: set[str] = set()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            next(rows, None)
            for row in rows:
                if len(row) > at and row[at].isdecimal() and len(found) < MAX_UIDS:
                    found.add(row[at])
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None
    except csv.Error as error:
        raise broken(path, f"not a CSV: {error}") from None
    return sorted(found, key=int)


def _of_recording(video: Video, device_ns: np.ndarray, objects: list[str]) -> tuple[Measured, np.ndarray]:
    """What is annotated around some moments of the device's clock, and these moments in time code."""
    folder = Path(video.blob.path).parent
    measured: Measured = {}
    if not len(device_ns):
        return measured, device_ns
    frames_ns, codes_ns = _clocks(video.name, video.blob, _stamp(video.blob))
    # The two clocks drift against each other by millionths: straight from picture to picture.
    near = np.clip(np.searchsorted(frames_ns, device_ns, side="right") - 1, 0, max(0, len(frames_ns) - 2))
    after = np.minimum(near + 1, len(frames_ns) - 1)
    step = np.maximum(frames_ns[after] - frames_ns[near], 1)
    rate = np.where(after > near, (codes_ns[after] - codes_ns[near]) / step, 1.0)
    at_ns = codes_ns[near] + np.round((device_ns - frames_ns[near]) * rate).astype(np.int64)
    first, last = int(at_ns[0]) - GAP_NS, int(at_ns[-1]) + GAP_NS
    if (folder / HEADSET).is_file():
        times, rows = _table(folder / HEADSET).between(first, last, POSE)
        T = poses.pose(rows[:, :3], rows[:, 3:])
        measured["headset"] = times, T
        measured["camera"] = times, poses.compose(T, _mounting(video))
    if (folder / OBJECTS).is_file():
        times, rows, ids = _table(folder / OBJECTS).labelled(first, last, POSE, UID)
        T = poses.pose(rows[:, :3], rows[:, 3:])
        for k, uid in enumerate(objects[:N_OBJECTS]):
            mine = np.array([found == uid for found in ids], bool)
            measured[f"object.{k}"] = times[mine], T[mine]
    for name, read in ((MANO, _mano), (UMETRACK, _umetrack)):
        if (folder / name).is_file():
            rows_by_time = list(jsonl_between(folder / name, "timestamp_ns", first, last))
            for side, key in HANDS.items():
                hands = [_inside(value, "hand_poses", key) for _, value in rows_by_time]
                times = np.array([time for time, _ in rows_by_time], np.int64)
                measured |= _stacked(side, times, [read(hand) for hand in hands])
    return measured, at_ns


@lru_cache(maxsize=4)
def _clocks(name: str, blob: Blob, stamp: int) -> tuple[np.ndarray, np.ndarray]:
    """Times of a recording's pictures in the device's clock and in time code, int64 [N] each."""
    recording = vrs.open_vrs(name, blob)
    try:
        codes = recording.timecode_ns(recording.times_ns)
        if codes is None:
            cause = "no time code in the recording: its annotations cannot be placed"
            raise VideoError(name, cause, "give the original recording", "metadata")
        return recording.times_ns, codes
    finally:
        recording.close()


def _stamp(blob: Blob) -> int:
    try:
        return Path(blob.path).stat().st_mtime_ns
    except OSError:
        return 0


def _mounting(video: Video) -> Pose:
    """T_device_camera, as it was written down when the recording was listed."""
    try:
        T = np.array(json.loads(video.meta["intrinsics"])["T_device_camera"], np.float64)
    except (KeyError, ValueError, TypeError):
        T = np.zeros(0)
    if T.shape != (4, 4) or not np.isfinite(T).all():
        cause = "no calibration: how camera and device lie to each other is not known"
        raise VideoError(video.name, cause, "give the original recording", "metadata")
    return T


def _umetrack(hand: Any) -> dict[str, np.ndarray]:
    angles = _inside(hand, "joint_angles")
    n = min(len(angles), N_JOINTS) if isinstance(angles, list) else 0
    confidence = _inside(hand, "hand_confidence")
    return {
        "wrist": _xform(_inside(hand, "wrist_xform")),
        "confidence": numbers([confidence], 1),
        "joint": np.r_[numbers(angles[:n] if n else [], n), np.full(N_JOINTS - n, np.nan)],
    }


def _mano(hand: Any) -> dict[str, np.ndarray]:
    return {
        "mano": _xform(_inside(hand, "wrist_xform")),
        "mano.pose": numbers(_inside(hand, "pose"), N_MANO),
        "mano.beta": numbers(_inside(hand, "betas"), N_BETAS),
    }


def _xform(value: Any) -> Pose:
    return poses.pose(numbers(_inside(value, "t_xyz"), 3), numbers(_inside(value, "q_wxyz"), 4))


# -- HOT3D-Clips ----------------------------------------------------------------------------------


def _clip(name: str, file: Path) -> Candidate | VideoError:
    """A clip with what its first frame says of it; the tar is not read to its end."""
    try:
        blob = file_blob(file)
        if blob.size == 0:
            return VideoError(name, "empty (0 bytes)", "fetch it again", "empty")
        if not clip_tar.looks_like(blob):
            return VideoError(name, "no clip of HOT3D", "remove it, or give HOT3D's clips", "not_a_video")
        head = clip_tar.first_frame(name, blob)
    except VideoError as error:
        return error
    meta, wrong = {}, []
    for key in ("sequence_id", "participant_id", "device"):
        if isinstance(value := _inside(head.get("info"), key), str):
            meta[key] = storable(value)
    try:
        stream, camera = _camera(head.get("cameras"))
        lens, T = _calibration(camera, stream == clip_tar.RGB)
        meta["intrinsics"] = json.dumps(describe(lens, T), separators=(",", ":"))
    except (ValueError, TypeError, KeyError):
        wrong.append("no cameras")
    things = head.get("objects")
    meta["objects"] = json.dumps(sorted((k for k in things if k.isdecimal()), key=int) if things else [])
    absent = [what for what in ("hands", "objects") if not head.get(what)]
    if absent:  # the test splits have none
        wrong.append(f"no {' and no '.join(absent)}")
    hint = "its pictures are used, without these"
    return Candidate(
        name, blob, meta, VideoError(name, "; ".join(wrong), hint, "metadata") if wrong else None
    )


def _camera(cameras: Any) -> tuple[str, Mapping[str, Any]]:
    """The stream whose pictures are used, and its camera. Raises KeyError."""
    for stream in clip_tar.STREAMS:
        found = _inside(cameras, stream)
        if isinstance(found, dict):
            return stream, found
    raise KeyError("cameras")


def _calibration(camera: Mapping[str, Any], turned: bool) -> tuple[Any, Pose]:
    """Lens and T_device_camera of the upright picture. Raises ValueError, TypeError or KeyError."""
    about = camera["calibration"]
    lens = camera_of(about["projection_params"], about["image_width"], about["image_height"])
    T = _se3(about["T_device_from_camera"])
    if not np.isfinite(T).all():
        raise ValueError("T_device_from_camera")
    return (lens.clockwise(), poses.compose(T, _turn())) if turned else (lens, T)


def _turn() -> Pose:
    """T_camera_upright: of the camera as it is mounted, and that of its picture turned upright."""
    return poses.pose(np.zeros(3), CLOCKWISE.T)


def _of_clip(video: Video, at_ns: np.ndarray, objects: list[str]) -> Measured:
    measured: Measured = {}
    if not len(at_ns):
        return measured
    clip = clip_tar.open_clip(video.name, video.blob)
    try:
        near = (clip.times_ns >= at_ns[0] - GAP_NS) & (clip.times_ns <= at_ns[-1] + GAP_NS)
        rows = np.flatnonzero(near).tolist()
        times = clip.times_ns[near]
        shapes = _inside(clip.json(clip_tar.SHAPES), "mano")
        found: dict[str, list[np.ndarray]] = {}
        hands: dict[str, list[dict[str, np.ndarray]]] = {side: [] for side in SIDES}
        for row in rows:
            frame = clip.frames[row]
            camera = _inside(clip.json(f"{frame}.cameras.json"), str(clip.stream))
            T_world_camera = _se3(_inside(camera, "T_world_from_camera"))
            T_device_camera = _se3(_inside(camera, "calibration", "T_device_from_camera"))
            found.setdefault("headset", []).append(
                poses.compose(T_world_camera, poses.inverse(T_device_camera))
            )
            turned = clip.rotation == 90
            found.setdefault("camera", []).append(
                poses.compose(T_world_camera, _turn()) if turned else T_world_camera
            )
            annotated, things = (clip.json(f"{frame}.{what}.json") for what in ("hands", "objects"))
            for k, uid in enumerate(objects[:N_OBJECTS]):
                thing = _inside(things, uid)
                thing = thing[0] if isinstance(thing, list) and thing else thing
                T = _se3(_inside(thing, "T_world_from_object"))
                found.setdefault(f"object.{k}", []).append(T)
            for side in SIDES:
                hands[side].append(_clip_hand(_inside(annotated, side), shapes))
        for name, values in found.items():
            measured[name] = times, np.stack(values)
        for side in SIDES:
            measured |= _stacked(side, times, hands[side])
    finally:
        clip.close()
    return measured


def _clip_hand(hand: Any, shapes: Any) -> dict[str, np.ndarray]:
    track, mano = _inside(hand, "umetrack_pose"), _inside(hand, "mano_pose")
    # The dataset's documentation has a matrix, its toolkit a pose by parts.
    matrix = _inside(track, "wrist_xform")
    wrist = _se3(_inside(track, "T_world_from_wrist"))
    if isinstance(matrix, list) and len(matrix) == 4:
        T = np.stack([numbers(row, 4) for row in matrix])
        wrist = poses.pose(T[:3, 3], T[:3, :3])
    found = _umetrack({"joint_angles": _inside(track, "joint_angles")})
    xform = numbers(_inside(mano, "wrist_xform"), 6)
    found |= {
        "wrist": wrist,
        "mano": poses.pose(xform[3:], _rotation(xform[:3])),
        "mano.pose": numbers(_inside(mano, "thetas"), N_MANO),
        "mano.beta": numbers(shapes, N_BETAS) if mano else np.full(N_BETAS, np.nan),
    }
    return found


def _rotation(axis_angle: np.ndarray) -> np.ndarray:
    """The matrix of a rotation about an axis by its length, radians."""
    angle = float(np.linalg.norm(axis_angle))
    axis = axis_angle / angle if angle > 0 else np.zeros(3)
    return poses.quat_to_matrix(np.r_[np.cos(angle / 2), np.sin(angle / 2) * axis])


def _se3(value: Any) -> Pose:
    t, q = (numbers(_inside(value, key), n) for key, n in (("translation_xyz", 3), ("quaternion_wxyz", 4)))
    return poses.pose(t, q)


# -- both -----------------------------------------------------------------------------------------


def _stacked(side: str, times: np.ndarray, hands: list[dict[str, np.ndarray]]) -> Measured:
    if not hands:
        return {}
    return {f"{side}.{name}": (times, np.stack([hand[name] for hand in hands])) for name in hands[0]}


def _inside(value: Any, *keys: str) -> Any:
    """A member of nested mappings; None where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _listed(text: str | None) -> list[str]:
    try:
        value = json.loads(text or "[]")
    except ValueError:
        return []
    return [uid for uid in value if isinstance(uid, str)] if isinstance(value, list) else []
