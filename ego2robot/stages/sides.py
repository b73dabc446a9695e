"""Left and right in one frame: what detectors find, and who is who among it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from ego2robot.types import Hand, Side

# Two detections whose landmarks lie this near, in shares of the hand's size, are one hand. Different
# hands that clasp each other have their fingers in another order and stay further apart.
SAME_HAND = 0.25
# Between assignments of sides whose odds differ by less, the place in the picture decides.
DOUBTFUL_ODDS = 1.5


@dataclass(frozen=True)
class Candidate:
    """A detection before sides are settled. Arrays as in :class:`ego2robot.types.Hand`."""

    p_left: float  # probability that it is the person's left hand, 0..1
    landmarks: np.ndarray
    world: np.ndarray
    presence: float = 1.0  # score of the landmark network that there is a hand, 0..1


def one_per_side(candidates: Sequence[Candidate], frame: int) -> list[Hand]:
    """Settles who is left and who is right in one frame.

    A lone hand keeps its side. Of several, the pair whose sides are the most probable together is taken,
    so of two that look left the less left one is the right. Where that is a toss-up, the hand further left
    in the picture is the left one, as in most first-person views. The rest is left out, and so are second
    detections of the same hand, hands that are wholly outside the frame, and coordinates that are not
    finite.

    Args:
        candidates: detections, in any order.
        frame: index that the hands get.

    Returns:
        At most two hands, left before right.
    """
    usable: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: abs(c.p_left - 0.5), reverse=True):
        finite = np.isfinite(candidate.landmarks).all() and np.isfinite(candidate.world).all()
        if (
            finite
            and _in_frame(candidate)
            and not any(same_hand(candidate.landmarks, other.landmarks) for other in usable)
        ):
            usable.append(candidate)
    if not usable:
        return []
    if len(usable) == 1:
        only = usable[0]
        return [_hand(only, "left" if only.p_left >= 0.5 else "right", frame)]

    def likelihood(pair: tuple[Candidate, Candidate]) -> float:
        p_left, p_right = pair[0].p_left, 1 - pair[1].p_left
        return p_left * p_right

    left, right = max(permutations(usable, 2), key=likelihood)
    doubtful = likelihood((left, right)) <= DOUBTFUL_ODDS * likelihood((right, left))
    if doubtful and left.landmarks[:, 0].mean() > right.landmarks[:, 0].mean():
        left, right = right, left
    return [_hand(left, "left", frame), _hand(right, "right", frame)]


def within(candidate: Candidate, content: tuple[int, int, int, int], frame: tuple[int, int]) -> Candidate:
    """A detection in shares of a part of the frame, in shares of the frame.

    Args:
        candidate: a detection in that part.
        content: (top, left, height, width) of the part, in pixels.
        frame: (height, width) of the frame, in pixels.
    """
    top, left, height, width = content
    rows, columns = frame
    # z is in units of x.
    scale = np.array([width / columns, height / rows, width / columns], np.float32)
    offset = np.array([left / columns, top / rows, 0], np.float32)
    return replace(candidate, landmarks=candidate.landmarks * scale + offset)


def same_hand(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two sets of landmarks, [21, 3] in shares of the frame, are of one hand."""
    between = np.linalg.norm(a[:, :2] - b[:, :2], axis=1).mean()
    size = max(np.ptp(a[:, :2], axis=0).max(), np.ptp(b[:, :2], axis=0).max())
    return bool(between < SAME_HAND * size)


def _hand(candidate: Candidate, side: Side, frame: int) -> Hand:
    score = candidate.p_left if side == "left" else 1 - candidate.p_left
    return Hand(
        frame, side, float(score), _box(candidate), candidate.landmarks, candidate.world, candidate.presence
    )


def _box(candidate: Candidate) -> np.ndarray:
    xy = np.clip(candidate.landmarks[:, :2], 0, 1)
    return np.concatenate([xy.min(0), xy.max(0)])


def _in_frame(candidate: Candidate) -> bool:
    x_min, y_min, x_max, y_max = _box(candidate)
    return bool(x_max > x_min and y_max > y_min)
