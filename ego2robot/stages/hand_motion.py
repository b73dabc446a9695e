"""An embedding of a clip that needs no weights: what both hands do, from their landmarks.

Every length is divided by the size of the palm and every place is relative to the hand's own mean, so the
same handling elsewhere in the picture or nearer to the camera gives (nearly) the same vector. Rhythm is
described by how much a hand moves in each band of frequencies, which does not depend on where in the
rhythm the clip was cut.

It is about the hands as the camera sees them: the same work done by the other hand is another vector, and
so is the same pose at another angle.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ego2robot.stages.tracks import Track, tracks
from ego2robot.types import N_LANDMARKS, SIDES, Hand

NAME = "hand_motion"
BANDS = (0.0, 0.045, 0.08, 0.125, 0.19, 0.28, 0.5)  # edges, cycles per sampled frame
COEFFICIENTS = 6  # of the path, per axis
MIN_FRAMES = 4  # a hand that is seen in fewer has a pose but no motion
# How much each group of features counts, whatever its length.
WEIGHTS = {
    "presence": 1.0,
    "rhythm": 3.0,
    "path": 1.0,
    "pose": 1.0,
    "variation": 1.5,
    "speed": 1.5,
    "pair": 1.0,
}

_N_SIGNALS = 5  # x, y, angle, opening, pinch
_N_SPEED = 5
_JOINTS = 2 * (N_LANDMARKS - 1)
_GROUPS = {
    "presence": 1,
    "rhythm": _N_SIGNALS * (len(BANDS) - 1),
    "path": 2 * COEFFICIENTS,
    "pose": _JOINTS,
    "variation": _JOINTS,
    "speed": _N_SPEED,
}
_N_PAIR = 8
DIM = 2 * sum(_GROUPS.values()) + _N_PAIR

# Landmark numbers: https://ai.google.dev/edge/mediapipe/solutions/vision/hand_landmarker
_WRIST, _THUMB_TIP, _INDEX_BASE, _INDEX_TIP, _MIDDLE_BASE, _LITTLE_BASE = 0, 4, 5, 8, 9, 17
_FINGERTIPS = (8, 12, 16, 20)
_PALM = ((_WRIST, _INDEX_BASE), (_WRIST, _MIDDLE_BASE), (_WRIST, _LITTLE_BASE), (_INDEX_BASE, _LITTLE_BASE))


def hand_motion(hands: Sequence[Hand], n_frames: int, aspect: float = 16 / 9) -> np.ndarray:
    """One vector for what the hands of a clip do.

    Args:
        hands: detections in any order, in any of the frames 0 to ``n_frames`` - 1.
        n_frames: sampled frames of the clip, evenly spaced.
        aspect: width over height of the frame, since landmarks are shares of each.

    Returns:
        float32 [DIM] of length 1, the same for the same hands. All zeros when there are no hands: such a
        vector says "nothing to compare", and is at the same distance from every other.

    Raises:
        ValueError: a hand's frame lies outside the clip.
    """
    followed = tracks(hands, n_frames)
    unit = np.array([aspect, 1.0])
    left, right = (_Seen(followed[side], unit) for side in SIDES)
    groups = [group for seen in (left, right) for group in _one_hand(seen, n_frames)]
    vector = np.concatenate([*groups, _weighted("pair", _pair(left, right, n_frames))])
    length = np.linalg.norm(vector)
    return (vector / length if length > 0 else vector).astype(np.float32)


class _Seen:
    """One hand in its visible frames, in units of its palm.

    Attributes:
        frames: int [N], where it is visible.
        points: float64 [N, 21, 2], y down, any origin.
        palm: size of the palm in shares of the frame's height.
    """

    def __init__(self, track: Track, unit: np.ndarray) -> None:
        self.frames = np.flatnonzero(track.visible)
        points = track.landmarks[self.frames, :, :2].astype(np.float64) * unit
        lengths = [np.linalg.norm(points[:, a] - points[:, b], axis=1) for a, b in _PALM]
        # The mean of bones across and along the palm changes less than any of them when the hand turns.
        self.palm = float(np.median(np.mean(lengths, axis=0))) if len(self.frames) else 0.0
        self.points = points / self.palm if self.palm > 0 else points[:0]
        if self.palm <= 0:
            self.frames = self.frames[:0]

    def __len__(self) -> int:
        return len(self.frames)

    def centre(self) -> np.ndarray:
        """float64 [N, 2]: the middle of the palm, steadier than the wrist."""
        return np.asarray(self.points[:, (_WRIST, _INDEX_BASE, _LITTLE_BASE)].mean(1))

    def evenly(self, values_N: np.ndarray, n_frames: int) -> np.ndarray:
        """float64 [T, ...]: on every frame of the clip, straight lines over what is missing."""
        flat = values_N.reshape(len(values_N), -1)
        filled = [np.interp(np.arange(n_frames), self.frames, column) for column in flat.T]
        return np.stack(filled, 1).reshape(n_frames, *values_N.shape[1:])


def _one_hand(seen: _Seen, n_frames: int) -> list[np.ndarray]:
    if not len(seen):
        return [np.zeros(size) for size in _GROUPS.values()]
    relative = (seen.points - seen.points[:, :1])[:, 1:]
    groups = {name: np.zeros(size) for name, size in _GROUPS.items()}
    groups["presence"][:] = len(seen) / n_frames
    groups["pose"] = relative.mean(0).ravel()
    if len(seen) >= MIN_FRAMES:
        centre = seen.evenly(seen.centre(), n_frames)
        groups["variation"] = np.log1p(4 * relative.std(0)).ravel()
        groups["rhythm"] = _rhythm(np.column_stack([centre, seen.evenly(_shape(seen.points), n_frames)]))
        groups["path"] = _path(centre)
        groups["speed"] = _speed(centre)
    return [_weighted(name, values) for name, values in groups.items()]


def _shape(points: np.ndarray) -> np.ndarray:
    """float64 [N, 3]: angle of the hand (radians, unwrapped), opening of the fingers, thumb to index."""
    along = points[:, _MIDDLE_BASE] - points[:, _WRIST]
    angle = np.unwrap(np.arctan2(along[:, 1], along[:, 0]))
    tips = points[:, _FINGERTIPS] - points[:, _WRIST, None]
    opening = np.linalg.norm(tips, axis=2).mean(1)
    pinch = np.linalg.norm(points[:, _THUMB_TIP] - points[:, _INDEX_TIP], axis=1)
    return np.column_stack([angle, opening, pinch])


def _rhythm(signals_TS: np.ndarray) -> np.ndarray:
    """Root mean square of each signal in each band (Parseval), compressed; steady drift left out."""
    n = len(signals_TS)
    time = np.linspace(-1, 1, n)[:, None]
    signals = signals_TS - signals_TS.mean(0)
    signals = signals - time * (time * signals).sum(0) / (time * time).sum()
    frequency = np.fft.rfftfreq(n)
    power = 2 * np.abs(np.fft.rfft(signals, axis=0)) ** 2 / n**2
    power[frequency == 0.5] /= 2  # the highest frequency of an even number of frames has no twin
    bands = [power[(frequency > low) & (frequency <= high)].sum(0) for low, high in pairwise(BANDS)]
    return np.log1p(4 * np.sqrt(np.stack(bands))).T.ravel()


def _path(centre_T2: np.ndarray) -> np.ndarray:
    """The first DCT-II coefficients of the path about its mean, compressed; large for slow, far ways."""
    n = len(centre_T2)
    order = np.arange(1, COEFFICIENTS + 1)[:, None]
    basis = np.cos(np.pi * order * (np.arange(n) + 0.5) / n) * 2 / n
    coefficients = basis @ (centre_T2 - centre_T2.mean(0))
    return np.ravel(np.sign(coefficients) * np.log1p(np.abs(coefficients)))


def _speed(centre_T2: np.ndarray) -> np.ndarray:
    """Mean, spread and peak of the speed (palms per frame), straightness of the way, share of rest."""
    speed = np.linalg.norm(np.diff(centre_T2, axis=0), axis=1)
    way = speed.sum()
    straight = np.linalg.norm(centre_T2[-1] - centre_T2[0]) / way if way > 0 else 0.0
    sizes = np.log1p(4 * np.array([speed.mean(), speed.std(), np.quantile(speed, 0.9)]))
    return np.array([*sizes, straight, (speed < 0.05).mean()])


def _pair(left: _Seen, right: _Seen, n_frames: int) -> np.ndarray:
    """How the two hands stand to each other, where both are seen: place, its changes, common motion."""
    both, in_left, in_right = np.intersect1d(left.frames, right.frames, return_indices=True)
    if len(both) < MIN_FRAMES:
        return np.zeros(_N_PAIR)
    palm = (left.palm * right.palm) ** 0.5
    a, b = left.centre()[in_left] * left.palm / palm, right.centre()[in_right] * right.palm / palm
    apart = b - a
    va, vb = (np.diff(points, axis=0) for points in (a, b))
    common = (va * vb).sum(0) / (np.sqrt((va**2).sum(0) * (vb**2).sum(0)) + 1e-3 * len(va))
    return np.array(
        [
            len(both) / n_frames,
            *np.sign(apart.mean(0)) * np.log1p(np.abs(apart.mean(0))),
            *np.log1p(4 * apart.std(0)),
            *common,
            np.log(right.palm / left.palm),
        ]
    )


def _weighted(group: str, values: np.ndarray) -> np.ndarray:
    return values * WEIGHTS[group] / len(values) ** 0.5
