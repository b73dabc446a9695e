"""Hands on known ways through a clip, and what an imperfect detector makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ego2robot.sample.hand import HandPose, joints
from ego2robot.types import SIDES, Hand, Side

ASPECT = 16 / 9
OTHER: dict[Side, Side] = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Scene:
    """Detections, and for each whose hand it is: a side, or None for what is no hand."""

    hands: list[Hand]
    whose: list[Side | None]
    n_frames: int


def hand_at(
    frame: int,
    side: Side,
    pose: HandPose,
    score: float = 0.95,
    noise: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Hand:
    """The detection of a hand, called ``side``; ``noise`` in shares of the hand's size."""
    points = joints(pose)
    if rng is not None:
        points = points + rng.normal(0, noise * pose.size, points.shape)
    landmarks = (points / (ASPECT, 1, ASPECT)).astype(np.float32)
    box = np.clip(np.concatenate([landmarks[:, :2].min(0), landmarks[:, :2].max(0)]), 0, 1)
    return Hand(frame, side, score, box, landmarks, np.zeros((21, 3), np.float32))


def at_work(
    seed: int, n_frames: int = 72, flips: float = 0.05, drops: float = 0.1, ghosts: float = 0.05
) -> Scene:
    """Two hands that wander, cross each other again and again, and come and go.

    ``flips``: share of detections with the wrong side; ``drops``: share that is missing; ``ghosts``: share of
    frames with a detection of something else, anywhere, of any size and side.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(n_frames) / 6.0
    hands: list[Hand] = []
    whose: list[Side | None] = []
    for side in SIDES:
        home = 0.65 if side == "left" else 1.12
        # Slow sways large enough to pass the other hand, and quick small ones.
        x, y, turn, curl = (
            sum(a * np.sin(2 * np.pi * (f * time + rng.uniform())) for a, f in waves)
            for waves in (
                ((rng.uniform(0.2, 0.45), rng.uniform(0.08, 0.3)), (0.04, 0.9)),
                ((rng.uniform(0.05, 0.2), rng.uniform(0.1, 0.4)), (0.03, 1.1)),
                ((0.4, rng.uniform(0.1, 0.3)),),
                ((0.3, rng.uniform(0.1, 0.6)),),
            )
        )
        away = _absences(rng, n_frames)
        for t in range(n_frames):
            if away[t] or rng.random() < drops:
                continue
            place = (home + float(x[t]), 0.6 + float(y[t]))
            pose = HandPose(side, place, float(turn[t]), 0.3, curl=(0.3 + float(curl[t]),) * 5)
            wrong = rng.random() < flips
            score = float(rng.uniform(0.5, 0.98) if wrong else rng.uniform(0.75, 0.99))
            hands.append(
                replace(hand_at(t, side, pose, score, 0.02, rng), side=OTHER[side] if wrong else side)
            )
            whose.append(side)
    for t in range(n_frames):
        if rng.random() < ghosts:
            side = SIDES[int(rng.integers(2))]
            place = (float(rng.uniform(0.2, 1.6)), float(rng.uniform(0.2, 0.9)))
            pose = HandPose(side, place, float(rng.uniform(-3, 3)), float(rng.uniform(0.1, 0.5)))
            hands.append(hand_at(t, side, pose, float(rng.uniform(0.5, 0.95))))
            whose.append(None)
    return Scene(hands, whose, n_frames)


def _absences(rng: np.random.Generator, n_frames: int) -> np.ndarray:
    """bool [T]: out of view, for a second or more at a time, half of the clips at the start or the end."""
    away = np.zeros(n_frames, bool)
    for _ in range(int(rng.integers(0, 3))):
        length = int(rng.integers(6, 18))
        start = int(rng.integers(-length // 2, n_frames))
        away[max(0, start) : start + length] = True
    return away
