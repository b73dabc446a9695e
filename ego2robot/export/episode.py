"""What an episode's state and action are: the hands that were found, or what the dataset itself measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ego2robot import config
from ego2robot.errors import UserError, VideoError
from ego2robot.export.footage import Footage, Row
from ego2robot.sources import SOURCES, Source
from ego2robot.stages import camera, tracks
from ego2robot.stages.one_euro import OneEuro
from ego2robot.types import SIDES, ClipFrames, Hand, Trajectory, Video

Schema = Literal["hands", "reference", "native"]
ActionName = Literal["compensated", "wrist"]
Smooth = Literal["none", "action", "all"]

STATE, ACTION, KNOWN = "observation.state", "action", "observation.known"
SHARES = "shares of the picture's width and height"
CONTINUES_S = 2.0  # clips of one video that are no further apart share their hands' identities
WARM_UP = 8  # clips that are gone through again where a unit of work begins within a video
MIN_KNOWN = 0.5  # share of a trajectory's values below which an episode is left out
VIDEOS_ASKED = 20  # of a dataset, before it is taken to have no trajectories
# MediaPipe's 21 hand landmarks, in its order.
LANDMARKS = (
    "wrist",
    *(f"thumb_{joint}" for joint in ("cmc", "mcp", "ip", "tip")),
    *(f"{f}_{j}" for f in ("index", "middle", "ring", "pinky") for j in ("mcp", "pip", "dip", "tip")),
)
BOX = ("x_min", "y_min", "x_max", "y_max")
NAMES: dict[str, tuple[list[str], list[str]]] = {
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
class Layout:
    """The numbers of a dataset's episodes.

    Attributes:
        state, action: names of the columns.
        units: of the columns, for people.
        own_action: native: the dataset gives actions; else an action is the state of the next frame.
        robot_type: as in info.json.
    """

    schema: Schema
    state: tuple[str, ...]
    action: tuple[str, ...]
    units: str
    own_action: bool = True
    robot_type: str = "human_hands"

    @property
    def vectors(self) -> dict[str, tuple[str, ...]]:
        """The float32 features and the names of their columns."""
        found = {STATE: self.state, ACTION: self.action}
        return {**found, KNOWN: ("state", "action")} if self.schema == "native" else found


def of_hands(schema: Literal["hands", "reference"]) -> Layout:
    """The layout of episodes whose numbers are those of detected hands."""
    state, action = NAMES[schema]
    return Layout(schema, tuple(state), tuple(action), SHARES)


def layout_of(
    schema: Literal["auto"] | Schema, footage: Footage, rows: Sequence[Row], options: config.Source
) -> Layout:
    """The layout that is asked for; of ``native`` ones the columns are those of the first clip that has any.

    Args:
        rows: chosen clips, one a video is enough; ``auto`` is ``native`` where there is a trajectory.

    Raises:
        UserError: ``native``, and no clip has a trajectory.
    """
    if schema in ("hands", "reference"):
        return of_hands(schema)
    problem = "no clip was chosen"
    for row in rows[:VIDEOS_ASKED]:
        problem = f"{row['source']}: this dataset gives no states or actions of its own"
        try:
            found = trajectory(footage.video(row), np.array([row["start_s"]]), options)
        except VideoError as error:
            problem = str(error)
            continue
        if found is not None:
            return Layout(
                "native",
                found.state_names,
                found.action_names or found.state_names,
                found.units,
                bool(found.action_names),
                dict(row["meta"] or ()).get("robot_type") or "human",
            )
    if schema == "native":
        raise UserError(f"export.schema=native: {problem}; use export.schema=hands")
    return of_hands("hands")


def trajectory(video: Video, times_s: np.ndarray, options: config.Source) -> Trajectory | None:
    """What the video's dataset itself measured, see ``Source.trajectory``; None also without any column.

    Raises:
        VideoError: the file that should hold it cannot be read, or holds something impossible.
    """
    source: Source | None = SOURCES.get(video.source)
    found = source.trajectory(video, times_s, options) if source else None
    if found is None or not found.state_names:
        return None
    for values, names in ((found.state_TD, found.state_names), (found.action_TA, found.action_names)):
        if values.shape != (len(times_s), len(names)):
            raise VideoError(video.name, f"its trajectory is {values.shape}, not {len(names)} columns")
    return found


def native(found: Trajectory | None, layout: Layout, name: str) -> dict[str, np.ndarray]:
    """Features of an episode out of a dataset's own trajectory.

    What is not known (NaN, infinite) is the value known last before it, at the beginning the first one
    known, and 0 where the column is never known; ``observation.known`` says, for every frame, which shares
    of the state's and of the action's values were really known. Where the dataset has no actions, an action
    is the state of the next frame, the last one repeated.

    Returns:
        ``observation.state`` float32 [T, D], ``action`` float32 [T, A], ``observation.known`` float32 [T, 2].

    Raises:
        VideoError: there is none, it has other columns, or less than half of its values are known.
    """
    if found is None:
        raise VideoError(name, "its dataset has no state here", "", "metadata")
    own = (found.state_names, found.action_names or found.state_names)
    if own != (layout.state, layout.action) or bool(found.action_names) != layout.own_action:
        raise VideoError(name, "its state has other columns than the first episode's", "", "metadata")
    state = found.state_TD.astype(np.float32)
    action = (
        found.action_TA.astype(np.float32) if layout.own_action else np.concatenate([state[1:], state[-1:]])
    )
    known = [np.isfinite(values) for values in (state, action)]
    share = sum(int(k.sum()) for k in known) / max(1, sum(k.size for k in known))
    if share < MIN_KNOWN:
        raise VideoError(name, f"only {share:.0%} of its states and actions are known", "", "metadata")
    shares = np.stack([k.mean(1, dtype=np.float64) for k in known], 1)
    return {STATE: _held(state), ACTION: _held(action), KNOWN: shares.astype(np.float32)}


def _held(values_TD: np.ndarray) -> np.ndarray:
    """A copy with unknown values replaced, see :func:`native`."""
    known = np.isfinite(values_TD)
    if known.all():
        return values_TD
    rows = np.arange(len(values_TD))[:, None]
    last = np.maximum.accumulate(np.where(known, rows, -1), axis=0)
    first = np.where(known.any(0), known.argmax(0), 0)
    held = np.take_along_axis(values_TD, np.where(last < 0, first, last), axis=0)
    return np.where(np.isfinite(held), held, 0).astype(np.float32)


class Followed:
    """The hands of a video's chosen clips, one clip after the other, so that they keep their identities.

    They depend on the run's rows alone, never on which clips could be decoded.
    """

    def __init__(self, hands: config.Hands, fps: int, aspect: float) -> None:
        self._asked, self._fps, self._aspect = hands, fps, aspect
        self._before: tuple[Row, tracks.Followed] | None = None

    def next(self, row: Row, hands: Sequence[Hand]) -> tracks.Followed:
        """Both hands of a clip; where it goes on from the one before it, so do they."""
        n, asked = row["n_frames"], self._asked
        looked = range(n) if asked.dense else range(0, n, asked.every)
        gap, fps, aspect = asked.max_gap, self._fps, self._aspect
        if self._before and continues(self._before[0], row, self._fps):
            earlier, dealt = self._before
            offset = row["first"] - earlier["first"]
            found = tracks.continue_tracks(
                dealt, hands, n, offset, max_gap=gap, looked=looked, fps=fps, aspect=aspect
            )
        else:
            found = tracks.follow(hands, n, max_gap=gap, looked=looked, fps=fps, aspect=aspect)
        self._before = row, found
        return found


def continues(earlier: Row, row: Row, fps: float) -> bool:
    """Whether a clip shares its hands' identities with the one stored before it."""
    offset = row["first"] - earlier["first"]
    return bool(
        earlier["video_id"] == row["video_id"] and 0 <= offset <= earlier["n_frames"] + CONTINUES_S * fps
    )


def warm_up(earlier: Sequence[Row], row: Row, fps: float) -> Sequence[Row]:
    """Of the clips stored before ``row`` those that its hands' identities come from, at most ``WARM_UP``."""
    begin, later = len(earlier), row
    while begin and len(earlier) - begin < WARM_UP and continues(earlier[begin - 1], later, fps):
        begin -= 1
        later = earlier[begin]
    return earlier[begin:]


def of_detected(
    schema: Schema, found: ClipFrames, hands: Sequence[Hand], dealt: tracks.Followed, action: ActionName,
    smooth: Smooth, max_gap: int, fps: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Features of an episode out of the hands that were found in it, see ``NAMES``."""
    n, (height, width) = len(found.frames_THWC), found.frames_THWC.shape[1:3]
    if schema == "reference":
        return {STATE: tracks.reference_state(hands, n), ACTION: tracks.reference_action(hands, n)}
    shown = dealt.tracks
    if smooth == "all":
        shown = tracks.tracks_of(dealt, n, max_gap, fps, width / height, OneEuro())
    if action == "wrist":
        moved = tracks.wrist_action(shown)
    else:
        path = camera.camera_path(found, hands)
        moved = camera.compensated_wrist_action(
            dealt.tracks, path, None if smooth == "none" else OneEuro(), fps
        )
    return {STATE: state_of(shown), ACTION: moved.astype(np.float32)}


def state_of(shown: tracks.Tracks) -> np.ndarray:
    """float32 [n, 96], as ``NAMES["hands"]`` says; zeros where a hand is not seen."""
    parts = []
    for side in SIDES:
        track = shown[side]
        landmarks = track.landmarks[:, :, :2].reshape(len(track.visible), -1)
        parts += [track.visible[:, None], track.interpolated[:, None], track.box, landmarks]
    return np.concatenate(parts, 1).astype(np.float32)


def seen(dealt: tracks.Followed) -> int:
    """The number of frames with a hand."""
    return int(np.logical_or.reduce([dealt.tracks[side].visible for side in SIDES]).sum())
