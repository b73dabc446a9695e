"""Project Aria: VRS recordings, and what Meta's Machine Perception Services (MPS) made of them.

``<name>.vrs`` with ``mps_<name>_vrs/`` beside it, as the MPS client leaves them, or ``mps/``, as the open
datasets have it; in there ``slam/closed_loop_trajectory.csv``, ``eye_gaze/personalized_eye_gaze.csv`` or
``general_eye_gaze.csv``, ``hand_tracking/hand_tracking_results.csv`` or ``wrist_and_palm_poses.csv``. The
flat files of Aria Digital Twin are found too. All of them count microseconds of the device's clock, which
is also the clock of the pictures.

What is not there is said once a recording, and its columns are NaN. Poses of several graphs (parts of a
recording that MPS could not join) have no world in common: of a clip only those of one graph are given.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ego2robot import config, poses
from ego2robot.decode import vrs
from ego2robot.errors import UserError, VideoError
from ego2robot.sources.base import DEFAULTS, Candidate, Source, display_name, file_blob, find_files
from ego2robot.sources.states import Track, assemble
from ego2robot.sources.tables import TimedCSV, timed_csv
from ego2robot.types import SIDES, Trajectory, Video

RECORDINGS = (".vrs",)
TIME = "tracking_timestamp_us"
POSE = [f"{axis}_world_device" for axis in ("tx", "ty", "tz", "qw", "qx", "qy", "qz")]
# Where each kind of file may lie, the better one first, and a column that it must have.
FILES = {
    "trajectory": (
        ("slam/closed_loop_trajectory.csv", "trajectory/closed_loop_trajectory.csv", "aria_trajectory.csv"),
        POSE,
    ),
    "gaze": (
        (
            "eye_gaze/personalized_eye_gaze.csv",
            "eye_gaze/general_eye_gaze.csv",
            "eye_gaze/generalized_eye_gaze.csv",
            "eyegaze.csv",
        ),
        [],
    ),
    "hands": (
        ("hand_tracking/hand_tracking_results.csv", "hand_tracking/wrist_and_palm_poses.csv"),
        ["left_tracking_confidence", "right_tracking_confidence"],
    ),
}
# Landmarks of hand_tracking_results.csv; the wrist has its own pose there.
LANDMARKS = {
    "thumb_tip": 0, "index_tip": 1, "middle_tip": 2, "ring_tip": 3, "little_tip": 4, "palm": 20,
}  # fmt: skip
# Measurements further apart say nothing of the time between: poses come at 1 kHz, hands and gaze at ≥ 10 Hz.
POSE_GAP_US, SLOW_GAP_US = 100_000, 250_000
NOTE = "; gaze.x, y, z: direction of length 1, gaze.depth metres; confidence: 0 to 1"


class Aria(Source):
    def candidates(
        self, path: str, skip: Path | None, options: config.Source = DEFAULTS
    ) -> Iterator[Candidate | VideoError]:
        if lacking := vrs.missing():
            raise UserError(f"source.kind=aria: {lacking}")
        files = find_files(path, RECORDINGS, skip, "VRS recordings")
        with vrs.camera_reader() as camera_of:
            for file in files:
                name = display_name(file, path)
                try:
                    blob = file_blob(file)
                    camera = camera_of(name, blob)
                except VideoError as error:
                    yield error
                    continue
                meta = {} if camera is None else {"intrinsics": json.dumps(camera, separators=(",", ":"))}
                yield Candidate(name, blob, meta, _lacking(name, file, camera is not None))

    def trajectory(
        self, video: Video, times_s: np.ndarray, options: config.Source = DEFAULTS
    ) -> Trajectory | None:
        """Poses of headset, camera and hands, and the gaze; see :mod:`ego2robot.sources.states`.

        State: headset and camera (9 each, in the world); for each hand the wrist (9), the tips of the five
        fingers and the palm (3 each), the tracker's confidence; the gaze's direction (3) and depth. Action:
        wrists, tips, palms and camera. None where MPS made nothing of the recording.

        Raises:
            VideoError: a file is there and cannot be used, or the recording has no calibration.
        """
        found = companions(Path(video.blob.path))
        if not found:
            return None
        T_device_camera, T_device_cpf = _mounting(video)
        assert video.info is not None
        # To the microsecond, as the tables: a measurement's own moment is to be that, whatever rounding did.
        at_us = np.round((video.info.start_s + np.asarray(times_s, np.float64)) * 1e6)
        opened = {kind: _open(kind, file) for kind, file in found.items()}
        T_world_device = device_poses(opened.get("trajectory"), at_us)
        tracks = [
            Track("headset", "fixed", T_world_device),
            Track("camera", "fixed", poses.compose(T_world_device, T_device_camera), acts=True),
        ]
        lost = np.isnan(T_world_device).any((1, 2))
        if options.frame == "camera":
            # Hands and gaze are known in the device, wherever that is; an action needs to know where.
            T_world_device = np.where(lost[:, None, None], np.eye(4), T_world_device)
        for track in _hands(opened.get("hands"), at_us):
            values = track.values
            if track.kind == "pose":
                values = poses.compose(T_world_device, values)
            elif track.kind == "point":
                values = poses.transform(T_world_device, values)
            tracks.append(replace(track, values=values))
        T_world_camera = poses.compose(T_world_device, T_device_camera)
        # A direction does not move with the origin: it turns with the frame alone.
        turn = poses.compose(T_world_device, T_device_cpf)[:, :3, :3]
        if options.frame == "camera":
            turn = poses.inverse(T_world_camera)[:, :3, :3] @ turn
        gaze = _gaze(opened.get("gaze"), at_us)
        direction = (turn @ gaze[:, :3, None])[..., 0]
        tracks.append(Track("gaze", "number", np.c_[direction, gaze[:, 3]], ("x", "y", "z", "depth")))
        made = assemble(tracks, T_world_camera, options.frame, NOTE)
        made.action_TA[lost | np.append(lost[1:], lost[-1:])] = np.nan
        return made


def companions(recording: Path) -> dict[str, Path]:
    """What MPS left for a recording, by kind; names are ours and the recording's alone."""
    folders = [recording.parent / f"mps_{recording.stem}_vrs", recording.parent / "mps", recording.parent]
    found = {}
    for kind, (names, _) in FILES.items():
        there = (folder / name for folder in folders for name in names)
        file = next((path for path in there if path.is_file()), None)
        if file:
            found[kind] = file
    return found


def _lacking(name: str, recording: Path, calibrated: bool) -> VideoError | None:
    """What is not there, or cannot be used, in one line; None where everything is."""
    found = companions(recording)
    wrong = [] if calibrated else ["no calibration in the recording"]
    absent = [kind for kind in FILES if kind not in found]
    if absent:
        wrong.append(f"no MPS {', '.join(absent)}")
    for kind, file in found.items():
        try:
            _open(kind, file)
        except VideoError as error:
            wrong.append(f"{file.name}: {error.cause}")
    if not wrong:
        return None
    return VideoError(name, "; ".join(wrong), "its pictures are used, without these", "metadata")


def _open(kind: str, file: Path) -> TimedCSV:
    return timed_csv(file, TIME, FILES[kind][1])


def _mounting(video: Video) -> tuple[np.ndarray, np.ndarray]:
    """T_device_camera and T_device_cpf, as they were written down when the recording was listed."""
    try:
        camera = json.loads(video.meta["intrinsics"])
        found = [np.array(camera[key], np.float64) for key in ("T_device_camera", "T_device_cpf")]
        if any(T.shape != (4, 4) or not np.isfinite(T).all() for T in found):
            raise ValueError
    except (KeyError, ValueError, TypeError):
        cause = "no calibration: how camera and device lie to each other is not known"
        raise VideoError(video.name, cause, "give the original recording", "metadata") from None
    return found[0], found[1]


def device_poses(table: TimedCSV | None, at_us: np.ndarray) -> np.ndarray:
    """T_world_device [T, 4, 4] at some times; NaN where unknown."""
    unknown = np.full((len(at_us), 4, 4), np.nan)
    if table is None or not len(at_us):
        return unknown
    first, last = _span(at_us, POSE_GAP_US)
    times, rows, graphs = table.labelled(first, last, POSE, "graph_uid")
    if not len(times):
        return unknown
    # One world a clip: that of the graph that was seen the longest.
    graph = Counter(graphs).most_common(1)[0][0]
    chosen = np.array([label == graph for label in graphs])
    T = poses.pose(rows[chosen, :3], rows[chosen, 3:])
    return poses.interpolate(times[chosen] - first, T, at_us - first, POSE_GAP_US)


def _hands(table: TimedCSV | None, at_us: np.ndarray) -> list[Track]:
    """Wrists, tips, palms and confidences in the device's frame."""
    tracks = []
    columns: list[str] = []
    for side in SIDES:
        columns += [f"{axis}_{side}_device_wrist" for axis in ("tx", "ty", "tz", "qw", "qx", "qy", "qz")]
        columns += [f"{axis}_{side}_wrist_device" for axis in ("tx", "ty", "tz")]
        columns += [f"{axis}_{side}_palm_device" for axis in ("tx", "ty", "tz")]
        for landmark in LANDMARKS.values():
            columns += [f"{axis}_{side}_landmark_{landmark}_device" for axis in ("tx", "ty", "tz")]
        columns.append(f"{side}_tracking_confidence")
    if table is None or not len(at_us):
        first, times, rows = 0, np.zeros(0, np.int64), np.zeros((0, len(columns)))
    else:
        first, last = _span(at_us, SLOW_GAP_US)
        times, rows = table.between(first, last, columns)
    for side, part in zip(SIDES, np.split(rows, 2, 1), strict=True):
        values = part.copy()
        values[~(part[:, -1] >= 0)] = np.nan  # −1: this hand was not found

        def at(measured: np.ndarray, times: np.ndarray = times, first: int = first) -> np.ndarray:
            interpolate = poses.interpolate if measured.ndim == 3 else poses.interpolate_values
            return interpolate(times - first, measured, at_us - first, SLOW_GAP_US)

        wrist = poses.pose(values[:, :3], values[:, 3:7])
        # The smaller of the two files has the wrist's position and no rotation.
        position = np.where(np.isnan(values[:, 7:10]), values[:, :3], values[:, 7:10])
        T = at(wrist)
        T[:, :3, 3] = at(position)
        T[:, 3] = (0, 0, 0, 1)
        tracks.append(Track(f"{side}.wrist", "pose", T, acts=True))
        tips = dict(zip(LANDMARKS, np.split(values[:, 13:-1], len(LANDMARKS), 1), strict=True))
        tips["palm"] = np.where(np.isnan(tips["palm"]), values[:, 10:13], tips["palm"])
        tracks += [Track(f"{side}.{tip}", "point", at(xyz), acts=True) for tip, xyz in tips.items()]
        tracks.append(Track(f"{side}.wrist", "number", at(values[:, -1:]), ("confidence",)))
    return tracks


def _gaze(table: TimedCSV | None, at_us: np.ndarray) -> np.ndarray:
    """Direction (x left, y up, z forward of the central pupil frame) and depth [T, 4], NaN where unknown.

    Where there is an angle for each eye, the direction is to where the two meet, seen from between them: the
    tangents of the angles are averaged. That of a file with one yaw and pitch is taken as it is.
    """
    if table is None or not len(at_us):
        return np.full((len(at_us), 4), np.nan)
    first, last = _span(at_us, SLOW_GAP_US)
    names = (
        ("yaw_rads_cpf", "left_yaw_rads_cpf", "right_yaw_rads_cpf"),
        ("pitch_rads_cpf", "left_pitch_rads_cpf", "right_pitch_rads_cpf"),
    )
    times, rows = table.between(first, last, [*names[0], *names[1], "depth_m"])
    tangents = np.tan(rows[:, :6])
    x, y = (
        np.where(np.isnan(one), (left + right) / 2, one)
        for one, left, right in (tangents[:, :3].T, tangents[:, 3:].T)
    )
    direction = np.stack([x, y, np.ones(len(x))], -1)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    found = poses.interpolate_values(times - first, np.c_[direction, rows[:, 6]], at_us - first, SLOW_GAP_US)
    found[:, :3] /= np.linalg.norm(found[:, :3], axis=-1, keepdims=True)
    return found


def _span(at_us: np.ndarray, around: int) -> tuple[int, int]:
    """Whole microseconds around the times that are asked for."""
    return int(np.floor(at_us[0])) - around, int(np.ceil(at_us[-1])) + around
