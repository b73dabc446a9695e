"""EgoDex: 1080p first-person videos of the Apple Vision Pro with the poses of 68 joints and the camera.

``part1`` … ``part5``, ``test`` and ``extra`` hold ``<task>/<i>.mp4`` and ``<task>/<i>.hdf5``. Any of them, a
folder of them, a folder of one task or one file can be given.

A pose ``transforms/<name>`` [N, 4, 4] takes points of the joint's (or the camera's) own frame to the world of
its recording, metres; that world is another one in every file. One pose belongs to one frame of the video.
The camera looks along its z axis, x to the right, y down: ``T_camera_world = inverse(transforms/camera)``,
and a point of the camera's frame lies at ``camera/intrinsic @ (x/z, y/z, 1)`` in the picture. So do the
dataset's own scripts, which pass such points to OpenCV as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ego2robot import config, poses
from ego2robot.errors import UserError, VideoError
from ego2robot.sources.base import (
    DEFAULTS,
    Candidate,
    Source,
    check_name,
    display_name,
    file_blob,
    find_files,
)
from ego2robot.sources.hdf5 import REDO, Hdf5, open_hdf5
from ego2robot.types import SIDES, Trajectory, Video

VIDEO, POSES = ".mp4", ".hdf5"
PARTS = ("part1", "part2", "part3", "part4", "part5", "test", "extra")
POSE_RATE = 30.0  # Hz, where the video's own frame rate is not known
# Texts of which the dataset's makers say that they are none.
NO_TEXT = "description unavailable"

CAMERA = "transforms/camera"
# Names of ours to the ends of the dataset's, which begin with the side.
WRIST = {"wrist": "Hand"}
TIPS = {
    "thumb_tip": "ThumbTip",
    "index_tip": "IndexFingerTip",
    "middle_tip": "MiddleFingerTip",
    "ring_tip": "RingFingerTip",
    "little_tip": "LittleFingerTip",
}
JOINTS = {f"{side}.{name}": side + end for side in SIDES for name, end in (WRIST | TIPS).items()}
AXES = ("x", "y", "z")
TURNS = ("r11", "r21", "r31", "r12", "r22", "r32")  # the first two columns of a rotation matrix, row first
NOT_A_ROTATION = 0.05  # an element of RᵀR that is further from the identity's


def _columns() -> tuple[str, ...]:
    names = []
    for joint in JOINTS:
        parts = (*AXES, *TURNS) if joint.endswith("wrist") else AXES
        names += [f"{joint}.{part}" for part in parts]
    return (*names, *(f"camera.{part}" for part in (*AXES, *TURNS)))


ACTION_NAMES = _columns()
STATE_NAMES = (*ACTION_NAMES, *(f"{joint}.confidence" for joint in JOINTS))
UNITS = {
    "camera": "metres in the camera's frame of the same moment (x right, y down, z forward); "
    "camera.* is the camera's pose in the recording's own world, T_world_camera = inverse(T_camera_world)",
    "world": "metres in the recording's own world, which no other recording shares",
}
REST = (
    "; r11, r21, r31, r12, r22, r32: the first two columns of a rotation matrix; "
    "confidence: ARKit's, 0 to 1, NaN where the file has none; "
    "action: the same pose one step later, "
)
ACTION_FRAME = {
    "camera": "in the camera's frame of this step, the camera's own too (the last step: as it is)",
    "world": "in the same world (the last step: as it is)",
}


class EgoDex(Source):
    def candidates(
        self, path: str, skip: Path | None, options: config.Source = DEFAULTS
    ) -> Iterator[Candidate | VideoError]:
        found = False
        for folder, stem, suffixes in _pairs(path, skip):
            found = True
            video, data = (folder / (stem + suffixes.get(kind, kind)) for kind in (VIDEO, POSES))
            name = display_name(video, path)
            try:
                check_name(video)
                yield _candidate(name, video, data, suffixes)
            except VideoError as error:
                yield error
        if not found:
            raise UserError(
                f"source.path={path}: no EgoDex files there (looked for <task>/<i>.mp4 and <i>.hdf5 in it "
                "and below); unpack part1.zip, test.zip … and give that folder"
            )

    def trajectory(
        self, video: Video, times_s: np.ndarray, options: config.Source = DEFAULTS
    ) -> Trajectory | None:
        """Poses of the wrists, all finger tips and the camera; see :class:`types.Trajectory`.

        State [T, 69]: for the left and then the right hand, the wrist's position and the first two columns
        of its rotation (9), the tips of thumb, index, middle, ring and little finger (3 each), then the
        camera (9) and the twelve joints' confidences. Action [T, 57]: the same poses at the next of
        ``times_s``; the last one repeats. In the camera's frame (``options.frame``) an action lies in the
        camera's frame of *its own* step, so that a turn of the head is not taken for the hands' motion.

        At a frame's own time, the poses are those of the file; between, they are interpolated. NaN: a joint
        that the file lacks, a matrix that is no pose, a time more than half a frame after the last pose (some
        files have fewer poses than frames; further poses than frames are left alone).
        """
        data = companion(Path(video.blob.path))
        name = Path(video.name).with_suffix(POSES).as_posix()
        fps = video.info.fps if video.info else POSE_RATE
        at = np.asarray(times_s, np.float64) * fps
        whole = np.round(at)
        at = np.where(np.abs(at - whole) < 1e-3, whole, at)  # a frame's own time, but for rounding
        with open_hdf5(name, data) as file:
            T_world_camera = _poses(file, CAMERA, at)
            T_world_joint = {
                joint: _poses(file, f"transforms/{transform}", at) for joint, transform in JOINTS.items()
            }
            confidences = [_confidences(file, transform, at) for transform in JOINTS.values()]
        following = np.minimum(np.arange(len(at)) + 1, max(0, len(at) - 1))
        # What the numbers are given in: the world, or the camera of the same step.
        T_frame_world = poses.inverse(T_world_camera) if options.frame == "camera" else np.eye(4)
        state = [_numbers(joint, T_frame_world @ T) for joint, T in T_world_joint.items()]
        action = [_numbers(joint, T_frame_world @ T[following]) for joint, T in T_world_joint.items()]
        state += [_numbers("camera", T_world_camera), np.stack(confidences, 1)]
        action.append(_numbers("camera", T_frame_world @ T_world_camera[following]))
        return Trajectory(
            np.concatenate(state, 1).astype(np.float32),
            np.concatenate(action, 1).astype(np.float32),
            STATE_NAMES,
            ACTION_NAMES,
            UNITS[options.frame] + REST + ACTION_FRAME[options.frame],
        )


def _numbers(joint: str, T: np.ndarray) -> np.ndarray:
    """Poses [T, 4, 4] as the columns of a joint: position, and rotation where it has one, [T, 3 or 9]."""
    position = T[:, :3, 3]
    if joint.partition(".")[2] in TIPS:
        return position
    return np.concatenate([position, T[:, :3, 0], T[:, :3, 1]], 1)


def _poses(file: Hdf5, path: str, at: np.ndarray) -> np.ndarray:
    """float64 [T, 4, 4] at the fractional rows ``at`` of a dataset; NaN where there is no pose."""
    rows = _rows(at)
    T = file.numbers(path, (4, 4), rows) if rows.stop else None
    if T is None or not len(T):
        return np.full((len(at), 4, 4), np.nan)
    turned = T[:, :3, :3]
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(np.swapaxes(turned, 1, 2) @ turned - np.eye(3)).max((1, 2))
        wrong = ~(off < NOT_A_ROTATION) | ~np.isfinite(T).all((1, 2)) | (T[:, 3] != (0, 0, 0, 1)).any(1)
    T[wrong] = np.nan
    return poses.interpolate(np.arange(len(T)) + rows.start, T, _held(at, rows.start + len(T)))


def _confidences(file: Hdf5, transform: str, at: np.ndarray) -> np.ndarray:
    """float64 [T], NaN where the file has none."""
    rows = _rows(at)
    values = file.numbers(f"confidences/{transform}", (), rows) if rows.stop else None
    if values is None or not len(values):
        return np.full(len(at), np.nan)
    end = rows.start + len(values)
    return poses.interpolate_values(np.arange(rows.start, end), values, _held(at, end))


def _rows(at: np.ndarray) -> slice:
    """The rows around ``at``."""
    if not len(at):
        return slice(0, 0)
    return slice(max(0, int(np.floor(at.min()))), max(0, int(np.ceil(at.max())) + 1))


def _held(at: np.ndarray, end: int) -> np.ndarray:
    """``at``, with the last row staying for half a frame."""
    return np.where((at > end - 1) & (at <= end - 0.5), end - 1, at)


# -- what there is --------------------------------------------------------------------------------


def companion(video: Path) -> Path:
    """The file with the poses that belongs to a video."""
    return video.with_suffix(POSES)


def _pairs(path: str, skip: Path | None) -> Iterator[tuple[Path, str, dict[str, str]]]:
    """Folder, stem, and the suffixes that are there by kind; folder by folder, so that memory holds one."""
    root = Path(path).expanduser() if path else None
    if root is None or not root.is_dir():
        seen: set[Path] = set()
        for file in find_files(path, (VIDEO, POSES), skip, "EgoDex files"):
            if (bare := file.with_suffix("")) not in seen:
                seen.add(bare)
                there = {file.suffix.lower(): file.suffix}
                for kind in (VIDEO, POSES):
                    if kind not in there and file.with_suffix(kind).is_file():
                        there[kind] = kind
                yield file.parent, file.stem, there
        return
    skipped = skip.resolve() if skip else None
    for here, folders, files in os.walk(root, followlinks=True):
        folder = Path(here)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (folder / f).resolve() != skipped)
        stems: dict[str, dict[str, str]] = {}
        for named in files:
            stem, dot, suffix = named.rpartition(".")
            kind = (dot + suffix).lower()
            if stem and kind in (VIDEO, POSES) and not named.startswith("."):
                stems.setdefault(stem, {})[kind] = dot + suffix
        for stem in sorted(stems, key=lambda s: (not s.isdecimal(), int(s) if s.isdecimal() else 0, s)):
            yield folder, stem, stems[stem]


def _candidate(name: str, video: Path, data: Path, suffixes: dict[str, str]) -> Candidate:
    """Raises VideoError where a partner is missing or the poses cannot be read."""
    if VIDEO not in suffixes:
        data_name = Path(name).with_suffix(data.suffix).as_posix()
        raise VideoError(data_name, f"no video beside it ({video.name})", REDO, "missing")
    if POSES not in suffixes:
        raise VideoError(name, f"no poses beside it ({data.name})", REDO, "missing")
    data_name = Path(name).with_suffix(data.suffix).as_posix()
    with open_hdf5(data_name, data) as file:
        meta, lacking = _meta(file, video)
    if not meta["poses"]:
        raise VideoError(data_name, "no poses in it (transforms/…)", REDO, "corrupt")
    problem = None
    if lacking:
        several = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        cause = f"without {', '.join(lacking[:3])}{several}"
        problem = VideoError(data_name, cause, "what is missing is NaN in its trajectory", "metadata")
    return Candidate(name, file_blob(video), {k: v for k, v in meta.items() if v}, problem)


def _meta(file: Hdf5, video: Path) -> tuple[dict[str, str], list[str]]:
    """The fields of a recording, and what it lacks."""
    texts = file.texts()
    there = set(file.names("transforms") or ())
    lacking = [f"transforms/{name}" for name in ("camera", *JOINTS.values()) if name not in there]
    shapes = [file.shape(f"transforms/{name}") for name in ("camera", *JOINTS.values()) if name in there]
    n = max((shape[0] for shape in shapes if shape and shape[1:] == (4, 4)), default=0)
    task, origin = task_text(texts, video.parent.name)
    meta = {
        "task": task,
        "task_from": origin,
        "task_name": video.parent.name,
        "part": next((part for part in reversed(video.parts[:-1]) if part in PARTS), ""),
        "poses": str(n or ""),
        **{
            key: texts.get(key, "")
            for key in ("llm_type", "llm_verbs", "llm_objects", "environment", "object", "session_name")
        },
    }
    intrinsic = file.numbers("camera/intrinsic", (3, 3)) if file.names("camera") is not None else None
    if intrinsic is None or not np.isfinite(intrinsic).all():
        lacking.append("camera/intrinsic")
    else:
        meta["intrinsics"] = json.dumps(
            {
                "model": "pinhole",
                "fx": intrinsic[0, 0],
                "fy": intrinsic[1, 1],
                "cx": intrinsic[0, 2],
                "cy": intrinsic[1, 2],
            }
        )
    return meta, lacking


def task_text(texts: dict[str, str], folder: str) -> tuple[str, str]:
    """What is done in a recording, in words, and where that is from.

    A task of which both directions were recorded (``llm_type`` ``reversible``) has two descriptions, and
    ``which_llm_description`` says which one this is; in all other files only the first counts.

    Returns:
        The text, and ``llm_description``, ``llm_description2`` or, where they say nothing, ``folder``.
    """
    key = "llm_description"
    if (
        texts.get("llm_type", "").strip().lower() == "reversible"
        and texts.get("which_llm_description") == "2"
    ):
        key = "llm_description2"
    text = " ".join(texts.get(key, "").split())
    if text and NO_TEXT not in text.lower():
        return text, key
    return folder.replace("_", " ").strip(), "folder"
