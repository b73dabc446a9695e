"""Hands followed through a clip, and the states and actions that are made of them.

A detector looks at one frame at a time: now and then it calls a left hand right, or misses it. Here the
detections of a clip are dealt out to one left and one right hand so that the whole is the most plausible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd
from typing import Literal

import numpy as np

from ego2robot.stages.one_euro import OneEuro
from ego2robot.types import N_LANDMARKS, SIDES, Hand, Side

# Costs of a story of two hands, in nats of the side's probability. A hand pays for its way from frame to
# frame by the distance in hand sizes, at most what it costs to have vanished and appeared elsewhere; so a
# label that flips for some frames is outvoted, and a hand that is called the other for long is the other.
PER_HAND_SIZE = 3.0
PER_LOG_SIZE, SIZE_TOLERANCE = 6.0, 0.5  # a palm looks up to 1.65 times as large after a turn
APPEARING = 8.0
ENTERING, LEAVING = 4.0, 4.0  # free at the first and at the last frame that was looked at
MISSING = 1.5  # per frame that was looked at without finding the hand
REJECTING = 6.0  # so a detection alone, that came and went, is a ghost; two in a row are a hand
SIDE_WEIGHT = 0.5
AGREEING = 2.0  # for a detection that another clip has dealt already
MIN_PROBABILITY = 0.05  # a detector that is sure of a side is still wrong now and then
# Two detections whose landmarks lie this near, in shares of the hand's size, are of one place. Different
# hands that clasp each other have their fingers in another order and stay further apart.
SAME_PLACE = 0.25
RATE = 6.0  # frames/s that ways are priced at; the variance of a way grows with the time it took
BEAM, HOPELESS = 16, 15.0  # stories that go on: so many, and none that is so many nats worse
NEIGHBOURS = 3  # frames that were looked at, within which a rejected detection is compared with a track
# Landmark numbers: https://ai.google.dev/edge/mediapipe/solutions/vision/hand_landmarker
_PALM = ((0, 5), (0, 9), (0, 17), (5, 17))

# Why a detection is no hand: alone where no hand was before or after; too far for a hand to have moved; too
# large or small; where another hand is; or one too many.
Reason = Literal["ghost", "speed", "size", "same place", "third hand"]


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


@dataclass(frozen=True)
class Rejected:
    """A detection that is taken for no hand."""

    hand: Hand
    reason: Reason


@dataclass(frozen=True)
class Followed:
    """Both hands of a clip, and what became of every detection.

    Attributes:
        tracks: a :class:`Track` for ``left`` and one for ``right``.
        dealt: per side the detections it is made of, in frame order, as they came.
        rejected: the rest, in frame order.
    """

    tracks: Tracks
    dealt: Mapping[Side, tuple[Hand, ...]]
    rejected: tuple[Rejected, ...]


def tracks(hands: Sequence[Hand], n_frames: int, max_gap: int = 2) -> Tracks:
    """The tracks of :func:`follow` with its defaults."""
    return follow(hands, n_frames, max_gap=max_gap).tracks


def follow(
    hands: Sequence[Hand],
    n_frames: int,
    *,
    max_gap: int = 2,
    looked: Iterable[int] | None = None,
    fps: float = RATE,
    aspect: float = 16 / 9,
    smooth: OneEuro | None = None,
) -> Followed:
    """Follows both hands of a clip by the cheapest story of the whole.

    Each frame gives at most one hand to a side, and never two from one place. A story costs, for each
    detection, the way from that hand's last place or, if nearer, from where it was heading, a sudden change
    of size, and the improbability of its side; for each hand, frames in which it was missed, coming and
    going; and for each detection that it leaves out, more than a hand's being there for two frames. Stories
    that leave both hands in the same places are compared at once (Viterbi).

    Args:
        hands: detections in any order, in any of the frames 0 to ``n_frames`` - 1.
        n_frames: T.
        max_gap: so many frames without a detection between two of the same hand are interpolated.
        looked: frames that the detector has seen; None: every s-th, s being the greatest that fits ``hands``.
        fps: frames per second; how far a hand may move depends on it.
        aspect: width over height of the frame.
        smooth: filter for boxes and landmarks, from where a hand appears to where it vanishes; speeds are in
            hand sizes per second. None leaves them as they were detected, which is what actions that are
            compensated for the camera are made of.

    Raises:
        ValueError: a hand's frame lies outside the clip.
    """
    return _follow(hands, n_frames, max_gap, looked, fps, aspect, smooth, None, 0)


def continue_tracks(
    previous: Followed,
    hands: Sequence[Hand],
    n_frames: int,
    offset: int,
    *,
    max_gap: int = 2,
    looked: Iterable[int] | None = None,
    fps: float = RATE,
    aspect: float = 16 / 9,
    smooth: OneEuro | None = None,
) -> Followed:
    """As :func:`follow`, for a clip that comes after, or overlaps, one of the same video.

    Each hand goes on from where ``previous`` had it, and detections that both clips share are dealt alike
    unless what follows speaks against it.

    Args:
        offset: frames from the previous clip's first to this one's first, not negative.

    Raises:
        ValueError: a hand's frame lies outside the clip, or ``offset`` is negative.
    """
    if offset < 0:
        raise ValueError(f"a clip that starts {-offset} frames before the one it continues")
    return _follow(hands, n_frames, max_gap, looked, fps, aspect, smooth, previous, offset)


def _follow(
    hands: Sequence[Hand],
    n_frames: int,
    max_gap: int,
    looked: Iterable[int] | None,
    fps: float,
    aspect: float,
    smooth: OneEuro | None,
    previous: Followed | None,
    offset: int,
) -> Followed:
    for hand in hands:
        if not 0 <= hand.frame < n_frames:
            raise ValueError(f"a hand in frame {hand.frame} of a clip of {n_frames} frames")
    seen = _looked(hands, n_frames) if looked is None else sorted({*looked, *(h.frame for h in hands)})
    dealer = _Dealer(hands, seen, fps, aspect, previous, offset)
    dealt = dealer.deal()
    taken = {i for indices in dealt.values() for i in indices}
    order = sorted(range(len(hands)), key=lambda i: hands[i].frame)
    rejected = tuple(Rejected(hands[i], dealer.reason(i, dealt)) for i in order if i not in taken)
    followed = {side: tuple(hands[i] for i in dealt[side]) for side in SIDES}
    return Followed(
        {side: _track(followed[side], n_frames, max_gap, fps, aspect, smooth) for side in SIDES},
        followed,
        rejected,
    )


def _looked(hands: Sequence[Hand], n_frames: int) -> list[int]:
    """Every s-th frame that fits, s being the greatest common divisor of the ways between frames."""
    frames = sorted({hand.frame for hand in hands})
    step = gcd(*(b - a for a, b in pairwise(frames))) if len(frames) > 1 else 0
    return list(range(frames[0] % step, n_frames, step)) if step else frames


_Chain = tuple[int, "_Chain"] | None


@dataclass(frozen=True)
class _Story:
    cost: float
    left: _Chain  # detections dealt to it, newest first
    right: _Chain


class _Dealer:
    """Deals detections to two hands. Indices count ``hands``; those of the clip before follow."""

    def __init__(
        self,
        hands: Sequence[Hand],
        looked: Sequence[int],
        fps: float,
        aspect: float,
        previous: Followed | None,
        offset: int,
    ) -> None:
        self.n, self.looked, self.fps, self.aspect = len(hands), np.array(looked, np.int64), fps, aspect
        self.hands, self.start = list(hands), _Story(0.0, None, None)
        self.first_is_free = previous is None
        self.settled: dict[int, Side] = {}
        if previous is not None:
            chains: dict[Side, _Chain] = {}
            for side in SIDES:
                before = [hand for hand in previous.dealt[side] if hand.frame < offset]
                chains[side] = (len(self.hands), None) if before else None
                self.hands += [replace(hand, frame=hand.frame - offset) for hand in before[-1:]]
                shared = {(hand.frame - offset, hand.landmarks.tobytes()) for hand in previous.dealt[side]}
                for i, hand in enumerate(hands):
                    if (hand.frame, hand.landmarks.tobytes()) in shared:
                        self.settled[i] = side
            self.start = _Story(0.0, chains["left"], chains["right"])
        self.frame = [hand.frame for hand in self.hands]
        self.points = [hand.landmarks[:, :2].astype(np.float64) * (aspect, 1) for hand in self.hands]
        self.size = [_size(points) for points in self.points]
        self.palm = [_palm(points) for points in self.points]
        self.unlikely = [
            {side: self._unlikely(i, hand, side) for side in SIDES} for i, hand in enumerate(self.hands)
        ]
        self.ways: dict[tuple[int, int, int], float] = {}

    def deal(self) -> dict[Side, list[int]]:
        by_frame: dict[int, list[int]] = {}
        for i in range(self.n):
            by_frame.setdefault(self.frame[i], []).append(i)
        stories = {_ends(self.start): self.start}
        for frame in sorted(by_frame):
            found = by_frame[frame]
            options = [
                (left, right)
                for left in (-1, *found)
                for right in (-1, *found)
                if left < 0 or right < 0 or (left != right and not self.same_place(left, right))
            ]
            longer: dict[tuple[int, int], _Story] = {}
            for story in stories.values():
                lefts = {i: self._cost(story.left, i, "left") for i in found}
                rights = {i: self._cost(story.right, i, "right") for i in found}
                lefts[-1] = rights[-1] = 0.0
                for left, right in options:
                    out = len(found) - (left >= 0) - (right >= 0)
                    cost = story.cost + lefts[left] + rights[right] + REJECTING * out
                    ends = _ends(story)
                    key = (left if left >= 0 else ends[0], right if right >= 0 else ends[1])
                    if key not in longer or cost < longer[key].cost:
                        longer[key] = _Story(
                            cost,
                            (left, story.left) if left >= 0 else story.left,
                            (right, story.right) if right >= 0 else story.right,
                        )
            best = sorted(longer.items(), key=lambda item: item[1].cost)[:BEAM]
            stories = {key: story for key, story in best if story.cost <= best[0][1].cost + HOPELESS}
        told = min(stories.values(), key=lambda story: story.cost + self._leaving(story))
        return {"left": self._unroll(told.left), "right": self._unroll(told.right)}

    def same_place(self, a: int, b: int) -> bool:
        apart = np.linalg.norm(self.points[a] - self.points[b], axis=1).mean()
        return bool(apart < SAME_PLACE * max(self.size[a], self.size[b]))

    def reason(self, rejected: int, dealt: Mapping[Side, Sequence[int]]) -> Reason:
        """Why the story left a detection out: what would have spoken most against dealing it."""
        frame = self.frame[rejected]
        here = {side: [i for i in dealt[side] if self.frame[i] == frame] for side in SIDES}
        if any(self.same_place(i, rejected) for indices in here.values() for i in indices):
            return "same place"
        free = [side for side in SIDES if not here[side]]
        if not free:
            return "third hand"
        near = [i for side in free for i in dealt[side] if self._between(self.frame[i], frame) < NEIGHBOURS]
        if not near:
            return "ghost"
        jumps = [self._jump(*sorted((i, rejected), key=lambda k: self.frame[k])) for i in near]
        way, growth = min(jumps, key=sum)
        return "speed" if way >= growth else "size"

    def _cost(self, chain: _Chain, now: int, side: Side) -> float:
        if chain is None:
            free = self.first_is_free and self.frame[now] == self.looked[0]
            return self.unlikely[now][side] + (0.0 if free else ENTERING)
        last = chain[0]
        before = chain[1][0] if chain[1] is not None else -1
        key = (before, last, now)
        if key not in self.ways:
            missed = MISSING * self._between(self.frame[last], self.frame[now])
            self.ways[key] = min(sum(self._jump(last, now, before)) + missed, APPEARING)
        return self.ways[key] + self.unlikely[now][side]

    def _jump(self, last: int, now: int, before: int = -1) -> tuple[float, float]:
        """What the way from one detection to a later one costs, and what the change of size does."""
        steps = (self.frame[now] - self.frame[last]) * RATE / self.fps
        size = max(self.size[last], self.size[now])
        apart = self.points[now] - self.points[last]
        distance = float(np.linalg.norm(apart, axis=1).mean())
        if before >= 0:
            gone = (self.points[last] - self.points[before]).mean(0) / (self.frame[last] - self.frame[before])
            ahead = apart - gone * (self.frame[now] - self.frame[last])
            distance = min(distance, float(np.linalg.norm(ahead, axis=1).mean()))
        growth = max(0.0, abs(float(np.log(self.palm[now] / self.palm[last]))) - SIZE_TOLERANCE)
        return PER_HAND_SIZE * distance / size / steps**0.5, PER_LOG_SIZE * growth / max(steps, 1.0) ** 0.5

    def _between(self, a: int, b: int) -> int:
        """Frames that were looked at between two."""
        low, high = min(a, b), max(a, b)
        return int(np.searchsorted(self.looked, high) - np.searchsorted(self.looked, low, side="right"))

    def _unlikely(self, index: int, hand: Hand, side: Side) -> float:
        p = hand.score if hand.side == side else 1 - hand.score
        nats = -SIDE_WEIGHT * float(np.log(min(max(p, MIN_PROBABILITY), 1 - MIN_PROBABILITY)))
        return nats + (AGREEING if self.settled.get(index, side) != side else 0.0)

    def _leaving(self, story: _Story) -> float:
        """Of hands that are gone before the last look."""
        gone = [end for end in _ends(story) if 0 <= end < self.n and self.frame[end] < self.looked[-1]]
        return LEAVING * len(gone)

    def _unroll(self, chain: _Chain) -> list[int]:
        indices = []
        while chain is not None:
            index, chain = chain
            if index < self.n:
                indices.append(index)
        return indices[::-1]


def _ends(story: _Story) -> tuple[int, int]:
    return (
        story.left[0] if story.left is not None else -1,
        story.right[0] if story.right is not None else -1,
    )


def _size(points: np.ndarray) -> float:
    return max(float(np.ptp(points, axis=0).max()), 1e-6)


def _palm(points: np.ndarray) -> float:
    """The mean of bones across and along the palm changes less than any of them when the hand turns."""
    return max(float(np.mean([np.linalg.norm(points[a] - points[b]) for a, b in _PALM])), 1e-6)


def _way(before: Hand, after: Hand, fps: float, aspect: float) -> float:
    """The cost of one hand having gone from one place to the other; the longer unseen, the cheaper."""
    a, b = (hand.landmarks[:, :2].astype(np.float64) * (aspect, 1) for hand in (before, after))
    distance = float(np.linalg.norm(a - b, axis=1).mean()) / max(_size(a), _size(b))
    return PER_HAND_SIZE * distance / ((after.frame - before.frame) * RATE / fps) ** 0.5


def _track(
    hands: Sequence[Hand], n_frames: int, max_gap: int, fps: float, aspect: float, smooth: OneEuro | None
) -> Track:
    """``hands`` of one side in frame order, at most one a frame."""
    visible = np.zeros(n_frames, bool)
    box = np.zeros((n_frames, 4), np.float32)
    landmarks = np.zeros((n_frames, N_LANDMARKS, 3), np.float32)
    for hand in hands:
        visible[hand.frame], box[hand.frame], landmarks[hand.frame] = True, hand.box, hand.landmarks
    interpolated = np.zeros(n_frames, bool)
    starts = {hands[0].frame} if hands else set()  # of unbroken ways
    for before, after in pairwise(hands):
        gap = after.frame - before.frame - 1
        # A hand that vanished and appeared elsewhere did not travel in between.
        if gap > max_gap or _way(before, after, fps, aspect) >= APPEARING:
            starts.add(after.frame)
            continue
        for frame in range(before.frame + 1, after.frame):
            share = np.float32((frame - before.frame) / (gap + 1))
            box[frame] = before.box + share * (after.box - before.box)
            landmarks[frame] = before.landmarks + share * (after.landmarks - before.landmarks)
            visible[frame] = interpolated[frame] = True
    if smooth is not None:
        for first, end in pairwise([*sorted(starts), n_frames]):
            way = np.arange(first, end)[visible[first:end]]  # without holes: those start another
            points = landmarks[way]
            unit = float(np.median([_size(one[:, :2] * (aspect, 1)) for one in points]))
            # Speeds are of equal directions: x counts in heights of the frame, as the size does.
            isotropic = np.array([aspect, 1, aspect], np.float32)
            landmarks[way] = smooth(points * isotropic, fps, unit) / isotropic
            sides = np.array([aspect, 1, aspect, 1], np.float32)
            box[way] = smooth(box[way] * sides, fps, unit) / sides
    return Track(visible, interpolated, box, landmarks)


def tracks_of(
    followed: Followed, n_frames: int, max_gap: int, fps: float, aspect: float, smooth: OneEuro | None
) -> Tracks:
    """The tracks of hands that were dealt already, with other gaps or another filter; see :func:`follow`."""
    return {side: _track(followed.dealt[side], n_frames, max_gap, fps, aspect, smooth) for side in SIDES}


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
