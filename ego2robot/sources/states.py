"""What glasses and hand trackers measured, put together as the columns of a trajectory.

Each thing that was measured is a track with times of its own; all are brought to the times that are asked
for, and given in the frame that is asked for. An action is where the hands and the camera are at the next
of these times, given in the frame of *its own* step, so that a turn of the head is not taken for the hands'
motion; the last one repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ego2robot import poses
from ego2robot.types import Trajectory

# The columns of a pose: its position, and the first two columns of its rotation matrix, row first.
POSE = ("x", "y", "z", "r11", "r21", "r31", "r12", "r22", "r32")
POINT = POSE[:3]
UNITS = {
    "camera": "metres in the frame of the camera of the same moment (x right, y down, z forward in the "
    "upright picture); headset.* and camera.* are poses in the recording's own world",
    "world": "metres in the recording's own world, which no other recording shares",
}
REST = (
    "; r11, r21, r31, r12, r22, r32: the first two columns of a rotation matrix; NaN: not measured. Actions "
    "are the poses at the next moment"
)
OWN_FRAME = {"camera": ", in the camera's frame of their own step", "world": ""}


@dataclass(frozen=True)
class Track:
    """A thing at the times that are asked for.

    Attributes:
        name: of its columns, such as ``left.wrist``.
        kind: ``pose`` [T, 4, 4] and ``point`` [T, 3] are in the world and change with the frame;
            ``fixed`` [T, 4, 4] is a pose that stays in the world; ``number`` [T, K] has no frame.
        values: float64, NaN where nothing was measured.
        columns: of a ``number``.
        acts: the action has it too.
    """

    name: str
    kind: Literal["pose", "point", "fixed", "number"]
    values: np.ndarray
    columns: tuple[str, ...] = ()
    acts: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        columns = {"point": POINT, "number": self.columns}.get(self.kind, POSE)
        return tuple(f"{self.name}.{column}" for column in columns)

    def seen_from(self, T_frame_world: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Its columns [T, K] in a frame; ``rows`` [T] picks what is seen from there at each step."""
        values = self.values if rows is None else self.values[rows]
        if self.kind == "number":
            return values
        if self.kind == "point":
            return poses.transform(T_frame_world, values)
        return as_columns(values if self.kind == "fixed" else poses.compose(T_frame_world, values))


def as_columns(T: np.ndarray) -> np.ndarray:
    """Poses [..., 4, 4] as the columns of ``POSE`` [..., 9]."""
    return np.concatenate([T[..., :3, 3], T[..., :3, 0], T[..., :3, 1]], -1)


def assemble(
    tracks: Sequence[Track],
    T_world_camera: np.ndarray,
    frame: Literal["camera", "world"],
    note: str = "",
) -> Trajectory:
    """The trajectory of some tracks.

    Args:
        T_world_camera: [T, 4, 4], of the upright picture's camera, NaN where unknown.
        note: more of the units, for people.
    """
    n = len(T_world_camera)
    T_frame_world = (
        poses.inverse(T_world_camera) if frame == "camera" else np.broadcast_to(np.eye(4), (n, 4, 4))
    )
    following = np.minimum(np.arange(n) + 1, max(0, n - 1))
    acting = [track for track in tracks if track.acts]
    state = [track.seen_from(T_frame_world) for track in tracks]
    action = [
        # What stays in the world as a state is an action in its step's frame, as everything else there.
        as_columns(poses.compose(T_frame_world, track.values[following]))
        if track.kind == "fixed"
        else track.seen_from(T_frame_world, following)
        for track in acting
    ]
    empty = np.zeros((n, 0))
    return Trajectory(
        np.concatenate([empty, *state], 1).astype(np.float32),
        np.concatenate([empty, *action], 1).astype(np.float32),
        tuple(name for track in tracks for name in track.names),
        tuple(name for track in acting for name in track.names),
        UNITS[frame] + note + REST + OWN_FRAME[frame],
    )
