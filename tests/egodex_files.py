"""Recordings in EgoDex's exact layout, whose poses are known and drawn into their videos.

Everything here is computed from first principles, not with the package: what it says of poses and of where
they lie in the picture is the truth that the package is held to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.footage import textured_frame, write_video

WIDTH, HEIGHT, FPS = 1920, 1080, 30
INTRINSIC = np.array([[736.6339, 0, 960], [0, 736.6339, 540], [0, 0, 1]], np.float32)
FINGERS = {
    "Thumb": ("Knuckle", "IntermediateBase", "IntermediateTip", "Tip"),
    **{
        f"{name}Finger": ("Metacarpal", "Knuckle", "IntermediateBase", "IntermediateTip", "Tip")
        for name in ("Index", "Middle", "Ring", "Little")
    },
}
JOINTS = (
    *(
        side + end
        for side in ("left", "right")
        for end in (
            "Hand", "Forearm", "Arm", "Shoulder",
            *(finger + part for finger, parts in FINGERS.items() for part in parts),
        )
    ),
    "hip",
    *(f"spine{i}" for i in range(1, 8)),
    *(f"neck{i}" for i in range(1, 5)),
)  # fmt: skip
TRACKED = tuple(
    side + end for side in ("left", "right") for end in ("Hand", *(finger + "Tip" for finger in FINGERS))
)
ATTRIBUTES = {
    "llm_description": "Pick up the cup and put it on the shelf.",
    "llm_description2": "Take the cup from the shelf.",
    "which_llm_description": "1",
    "llm_type": "reversible",
    "llm_verbs": ["pick", "put"],
    "llm_objects": ["cup", "shelf"],
    "task": "cup_shelf",
    "environment": "kitchen table",
    "object": "cup",
    "session_name": "session 7",
}


@dataclass
class Recording:
    """What a written pair holds.

    Attributes:
        transforms: name to float32 [N, 4, 4], to the recording's world; ``camera`` and all joints.
        confidences: joint to float32 [N].
    """

    video: Path
    data: Path
    transforms: dict[str, np.ndarray]
    confidences: dict[str, np.ndarray] = field(default_factory=dict)

    def pixels(self, joint: str, i: int) -> np.ndarray:
        """(u, v) of a joint in frame ``i``."""
        return pixel(self.transforms["camera"][i], self.transforms[joint][i][:3, 3])


def turn(axis: int, angle: float) -> np.ndarray:
    a, b = (axis + 1) % 3, (axis + 2) % 3
    R = np.eye(3)
    R[a, a] = R[b, b] = np.cos(angle)
    R[b, a], R[a, b] = np.sin(angle), -np.sin(angle)
    return R


def pixel(camera: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Where the camera with that pose in the world sees a point of the world."""
    right, down, forward = camera[:3, :3].T
    seen = np.asarray(point, np.float64) - camera[:3, 3]
    x, y, z = seen @ right, seen @ down, seen @ forward
    return np.array([INTRINSIC[0, 0] * x / z + INTRINSIC[0, 2], INTRINSIC[1, 1] * y / z + INTRINSIC[1, 2]])


def moving(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Poses of the camera and all 68 joints over ``n`` frames: a head that sways, hands that work."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6, 8)
    origin = rng.uniform(-3, 3, 3)  # of the recording's own world
    heading = turn(1, rng.uniform(-3, 3))  # about the vertical, which is y
    # x right, y up, z back (the world before it is turned) from x right, y down, z forward, looking down 35°.
    looking = turn(0, np.radians(-35)) @ np.diag([1.0, -1.0, -1.0])
    found = {name: np.zeros((n, 4, 4)) for name in ("camera", *JOINTS)}
    for i in range(n):
        t = i / FPS
        sway = turn(1, 0.1 * np.sin(t + phase[0])) @ turn(0, 0.06 * np.sin(1.3 * t + phase[1]))
        camera = _pose(
            heading @ sway @ looking,
            origin + heading @ [0.03 * np.sin(t + phase[2]), 1.5 + 0.01 * np.sin(2 * t), 0.02 * np.cos(t)],
        )
        found["camera"][i] = camera
        for k, side in enumerate(("left", "right")):
            way = 0.05 * np.array([np.sin(2 * t + phase[3 + k]), np.cos(1.7 * t + phase[5]), np.sin(t)])
            wrist = np.array([(-0.16, 0.18)[k], 0.12, 0.48]) + way
            hand = camera @ _pose(turn(2, 0.3 * np.sin(t + k)) @ turn(0, 0.4 + 0.1 * np.sin(3 * t)), wrist)
            found[f"{side}Hand"][i] = hand
            for f, (finger, parts) in enumerate(FINGERS.items()):
                for p, part in enumerate(parts):
                    reach = (p + 1) / len(parts)
                    offset = np.array([0.035 * (f - 2) * (0.4 + 0.6 * reach), -0.11 * reach, 0.02 * reach])
                    offset[1] *= (0.6, 0.95, 1.0, 0.95, 0.8)[f]
                    found[f"{side}{finger}{part}"][i] = hand @ _pose(turn(0, 0.3 * p), offset)
            for p, part in enumerate(("Forearm", "Arm", "Shoulder")):
                found[f"{side}{part}"][i] = hand @ _pose(
                    turn(0, -0.2 * p), np.array([0, 0.12 * (p + 1), 0.0])
                )
        for p, name in enumerate(
            ("hip", *(f"spine{j}" for j in range(1, 8)), *(f"neck{j}" for j in range(1, 5)))
        ):
            found[name][i] = _pose(heading, origin + np.array([0, 0.9 + 0.05 * p, 0]))
    return {name: T.astype(np.float32) for name, T in found.items()}


def _pose(R: np.ndarray, at: Any) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, at
    return T


def write_poses(
    path: Path,
    transforms: dict[str, np.ndarray],
    confidences: dict[str, np.ndarray] | None = None,
    attributes: dict[str, Any] | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["camera/intrinsic"] = INTRINSIC
        for name, T in transforms.items():
            file[f"transforms/{name}"] = T
        for name, values in (confidences or {}).items():
            file[f"confidences/{name}"] = values
        for name, value in (ATTRIBUTES if attributes is None else attributes).items():
            file.attrs[name] = value
    return path


def write_recording(
    folder: Path,
    index: int = 0,
    n: int = 30,
    n_poses: int | None = None,
    seed: int = 0,
    confident: bool = True,
    attributes: dict[str, Any] | None = None,
    drawn: bool = True,
    **video: Any,
) -> Recording:
    """``<folder>/<index>.mp4`` and ``.hdf5``.

    Args:
        n_poses: where not as many as frames.
        drawn: at full size, the tracked joints as white dots; else the number of the frame + 128 ``seed``.
        video: for ``write_video``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    n_poses = n if n_poses is None else n_poses
    transforms = moving(max(n, n_poses), seed)
    kept = {name: T[:n_poses] for name, T in transforms.items()}
    rng = np.random.default_rng(seed)
    confidences = (
        {name: rng.uniform(0.3, 1, n_poses).astype(np.float32) for name in JOINTS} if confident else {}
    )
    recording = Recording(folder / f"{index}.mp4", folder / f"{index}.hdf5", transforms, confidences)
    write_poses(recording.data, kept, confidences, attributes)
    if drawn:
        video = {"width": WIDTH, "height": HEIGHT, "options": {"preset": "ultrafast"}, "crf": 12} | video
        video["picture"] = lambda i, w, h: _dots([recording.pixels(j, i) for j in TRACKED], w, h)
    else:
        video.setdefault("picture", lambda i, w, h: textured_frame(i + 128 * seed, w, h))
    write_video(recording.video, n_frames=n, fps=FPS, **video)
    return recording


def _dots(centres: list[np.ndarray], width: int, height: int, radius: float = 8.0) -> np.ndarray:
    """uint8 RGB [height, width, 3]: white discs on dark waves; pixel (0, 0) has its centre at (0, 0)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    grey = 40 + 20 * np.sin(x[:1] / 31 + y[:, :1] / 57)
    for u, v in centres:
        top, left = (max(0, int(c - radius - 2)) for c in (v, u))
        window = slice(top, max(0, int(v + radius + 3))), slice(left, max(0, int(u + radius + 3)))
        cover = np.clip(radius + 0.5 - np.hypot(x[window] - u, y[window] - v), 0, 1)
        grey[window] = grey[window] * (1 - cover) + 250 * cover
    return np.repeat(grey.astype(np.uint8)[..., None], 3, -1)
