"""Hands followed through a clip, and the states and actions that are made of them.

A detector looks at one frame at a time: now and then it calls a left hand right, or misses it. Here the
detections of a clip are dealt out to one left and one right hand so that the whole is the most plausible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

import numpy as np

from ego2robot.types import N_LANDMARKS, SIDES, Hand, Side

# Costs of a story of two hands, in nats of the side's probability. A hand pays for its way from frame to
# frame by the distance in hand sizes, at most what it costs to have vanished and appeared elsewhere; so a
# label that flips for some frames is outvoted, and a hand that is called the other for long is the other.
PER_HAND_SIZE = 3.0
APPEARING = 8.0
SIDE_WEIGHT = 0.5
MIN_PROBABILITY = 0.05  # a detector that is sure of a side is still wrong now and then
BEAM = 64


@dataclass(frozen=True)
class Track:
    """One hand through T frames; zeros where it is not visible.

    Attributes:
        visible: bool [T], detected or interpolated.
        interpolated: bool [T], not detected, but between two detections that are near enough in time.
        box: float32 [T, 4], x_min, y_min, x_max, y_max, shares of the frame.
        landmarks: float32 [T, 21, 3], as in :class:`ego2robot.types.Hand`.
    """

    visible: np.ndarray
    interpolated: np.ndarray
    box: np.ndarray
    landmarks: np.ndarray

    @property
    def wrist(self) -> np.ndarray:
        """float32 [T, 2], shares of the frame."""
        return self.landmarks[:, 0, :2]


Tracks = Mapping[Side, Track]


def tracks(hands: Sequence[Hand], n_frames: int, max_gap: int = 2) -> Tracks:
    """Follows both hands of a clip.

    Args:
        hands: detections in any order, in any of the frames 0 to ``n_frames`` - 1.
        n_frames: T.
        max_gap: so many frames without a detection between two of the same hand are interpolated.

    Returns:
        A :class:`Track` for ``left`` and one for ``right``.

    Raises:
        ValueError: a hand's frame lies outside the clip.
    """
    dealt = deal(hands, n_frames)
    return {side: _track(dealt[side], n_frames, max_gap) for side in SIDES}


def deal(hands: Sequence[Hand], n_frames: int) -> dict[Side, list[Hand]]:
    """Which detections are the left hand and which the right, by the cheapest story of the whole clip.

    Each frame gives at most one hand to a side; of more than two hands in a frame two are taken. A story
    costs, for each detection, the way from that hand's last place and the improbability of its side.
    Stories that leave both hands in the same places are compared at once (Viterbi); at most 64 go on.

    Raises:
        ValueError: a hand's frame lies outside the clip.
    """
    frames: dict[int, list[int]] = {}
    for i, hand in enumerate(hands):
        if not 0 <= hand.frame < n_frames:
            raise ValueError(f"a hand in frame {hand.frame} of a clip of {n_frames} frames")
        frames.setdefault(hand.frame, []).append(i)

    # A story: cost, and the detections dealt to the left and to the right so far, newest first.
    stories: dict[tuple[int, int], tuple[float, _Chain, _Chain]] = {(-1, -1): (0.0, None, None)}
    for frame in sorted(frames):
        found = frames[frame]
        options = list(permutations(found, 2)) if len(found) > 1 else [(found[0], -1), (-1, found[0])]
        longer: dict[tuple[int, int], tuple[float, _Chain, _Chain]] = {}
        for (last_left, last_right), (cost, lefts, rights) in stories.items():
            for left, right in options:
                total = cost + _cost(hands, last_left, left, "left")
                total += _cost(hands, last_right, right, "right")
                key = (left if left >= 0 else last_left, right if right >= 0 else last_right)
                if key not in longer or total < longer[key][0]:
                    longer[key] = (
                        total,
                        (left, lefts) if left >= 0 else lefts,
                        (right, rights) if right >= 0 else rights,
                    )
        stories = dict(sorted(longer.items(), key=lambda item: item[1][0])[:BEAM])
    _, lefts, rights = min(stories.values(), key=lambda story: story[0])
    return {"left": [hands[i] for i in _unroll(lefts)], "right": [hands[i] for i in _unroll(rights)]}


_Chain = tuple[int, "_Chain"] | None


def _unroll(chain: _Chain) -> list[int]:
    indices = []
    while chain is not None:
        index, chain = chain
        indices.append(index)
    return indices[::-1]


def _cost(hands: Sequence[Hand], last: int, now: int, side: Side) -> float:
    if now < 0:
        return 0.0
    hand = hands[now]
    p = hand.score if hand.side == side else 1 - hand.score
    unlikely = -SIDE_WEIGHT * float(np.log(min(max(p, MIN_PROBABILITY), 1 - MIN_PROBABILITY)))
    if last < 0:
        return APPEARING + unlikely
    return min(_way(hands[last], hand), APPEARING) + unlikely


def _way(before: Hand, after: Hand) -> float:
    """The cost of one hand having gone from one place to the other; the longer unseen, the cheaper."""
    a, b = before.landmarks[:, :2], after.landmarks[:, :2]
    size = max(float(np.ptp(a, axis=0).max()), float(np.ptp(b, axis=0).max()), 1e-6)
    distance = float(np.linalg.norm(a - b, axis=1).mean()) / size
    return PER_HAND_SIZE * distance / (after.frame - before.frame) ** 0.5  # as in a random walk


def _track(hands: Sequence[Hand], n_frames: int, max_gap: int) -> Track:
    """``hands`` of one side in frame order, at most one a frame."""
    visible = np.zeros(n_frames, bool)
    box = np.zeros((n_frames, 4), np.float32)
    landmarks = np.zeros((n_frames, N_LANDMARKS, 3), np.float32)
    for hand in hands:
        visible[hand.frame], box[hand.frame], landmarks[hand.frame] = True, hand.box, hand.landmarks
    interpolated = np.zeros(n_frames, bool)
    for before, after in pairwise(hands):
        gap = after.frame - before.frame - 1
        # A hand that vanished and appeared elsewhere did not travel in between.
        if not 0 < gap <= max_gap or _way(before, after) >= APPEARING:
            continue
        for frame in range(before.frame + 1, after.frame):
            share = np.float32((frame - before.frame) / (gap + 1))
            box[frame] = before.box + share * (after.box - before.box)
            landmarks[frame] = before.landmarks + share * (after.landmarks - before.landmarks)
            visible[frame] = interpolated[frame] = True
    return Track(visible, interpolated, box, landmarks)


def wrist_action(followed: Tracks) -> np.ndarray:
    """The motion of both wrists from each frame to the next, in shares of the frame.

    Returns:
        float32 [T, 4]: left dx, dy, right dx, dy; zero where the hand is not visible in both frames. The
        last row repeats the one before it. Not clipped.
    """
    return np.concatenate([_motion(followed[side].wrist, followed[side].visible) for side in SIDES], axis=1)


def reference_state(hands: Sequence[Hand], n_frames: int) -> np.ndarray:
    """The reference pipeline's state: the box of each frame's first hand.

    The first hand of ``hands`` in a frame counts, whoever's side it is: identity may change between
    frames, which is why this is not the default.

    Returns:
        float32 [T, 4]: x_min, y_min, x_max, y_max, shares of the frame; zeros where no hand was seen.
    """
    state = np.zeros((n_frames, 4), np.float32)
    for frame, hand in _first_hands(hands).items():
        state[frame] = hand.box
    return state


def reference_action(hands: Sequence[Hand], n_frames: int) -> np.ndarray:
    """The reference pipeline's action: how the first hand's wrist moves to the next frame.

    Returns:
        float32 [T, 2]: dx, dy in shares of the frame, clipped to [-1, 1]; zero where either frame has no
        hand. The last row repeats the one before it.
    """
    wrist = np.zeros((n_frames, 2), np.float32)
    seen = np.zeros(n_frames, bool)
    for frame, hand in _first_hands(hands).items():
        wrist[frame], seen[frame] = hand.landmarks[0, :2], True
    return np.clip(_motion(wrist, seen), -1, 1)


def _first_hands(hands: Sequence[Hand]) -> dict[int, Hand]:
    first: dict[int, Hand] = {}
    for hand in hands:
        first.setdefault(hand.frame, hand)
    return first


def _motion(wrist_T2: np.ndarray, seen_T: np.ndarray) -> np.ndarray:
    """float32 [T, 2]: to the next frame, zero where unseen in either, the last repeated."""
    motion = np.zeros_like(wrist_T2)
    both = seen_T[:-1] & seen_T[1:]
    motion[:-1][both] = np.diff(wrist_T2, axis=0)[both]
    if len(motion) > 1:
        motion[-1] = motion[-2]
    return motion
