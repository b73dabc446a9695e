"""The weight-free embedding: kinds of handling fall apart, place and distance do not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ego2robot.stages import hand_motion
from ego2robot.types import Hand, Side

N = 36
FPS = 6.0
ASPECT = 16 / 9


def skeleton(curl: float = 0.0, spread: float = 1.0) -> np.ndarray:
    """float64 [21, 2]: a hand with its wrist at the origin, fingers up, palm about 1 tall."""
    points = [(0.0, 0.0)]
    for base, angle, length in (((-0.25, -0.25), -55, 0.9), *_fingers(spread)):
        direction = np.array([np.sin(np.radians(angle)), -np.cos(np.radians(angle))])
        for share in (0.0, 0.45, 0.75, 1.0):
            points.append(tuple(np.array(base) + direction * length * share * (1 - 0.7 * curl)))
    return np.array(points)


def _fingers(spread: float) -> list[tuple[tuple[float, float], float, float]]:
    bases = ((-0.3, -0.95), (-0.1, -1.0), (0.1, -0.97), (0.3, -0.9))
    return [
        (b, spread * a, n) for b, a, n in zip(bases, (-8, -2, 4, 10), (0.8, 0.9, 0.82, 0.65), strict=True)
    ]


Pose = tuple[tuple[float, float], float, float]  # wrist in palms, angle in radians, curl


def waving(t: float, r: np.ndarray) -> Pose:
    return (0.0, 0.0), 0.5 * np.sin(2 * np.pi * (1.2 + 0.3 * r[0]) * t + 6 * r[1]), 0.0


def screwing(t: float, r: np.ndarray) -> Pose:
    phase = ((0.5 + 0.15 * r[0]) * t + r[1]) % 1
    turn = 1.4 * phase / 0.7 if phase < 0.7 else 1.4 * (1 - phase) / 0.3
    return (0.0, 0.0), turn - 0.7, 0.8 if phase < 0.7 else 0.4


def wiping(t: float, r: np.ndarray) -> Pose:
    x = 1.5 * np.sin(2 * np.pi * (0.7 + 0.2 * r[0]) * t + 6 * r[1])
    return (x, 0.3 * np.sin(2 * np.pi * 0.1 * t + 6 * r[2])), 0.1 * x, 0.2


def reaching(t: float, r: np.ndarray) -> Pose:
    there = 1 / (1 + np.exp(-3 * (t - 2 - 2 * r[0])))
    grasp = 0.8 * np.exp(-((t - 2 - 2 * r[0]) ** 2) / 1.5)
    return (3.0 * there, -1.5 * there), 0.2 * there, grasp


KINDS: tuple[Callable[[float, np.ndarray], Pose], ...] = (waving, screwing, wiping, reaching)


def clip(
    kind: Callable[[float, np.ndarray], Pose],
    seed: int,
    scale: float | None = None,
    at: tuple[float, float] | None = None,
    noise: float = 0.03,
    seen: float = 0.9,
) -> list[Hand]:
    """The right hand does it, the left hand holds still; random place, size, phase and missed frames."""
    rng = np.random.default_rng(seed)
    scale = scale or rng.uniform(0.08, 0.16)  # of the frame's height
    x, y = at or rng.uniform((0.4, 0.4), (0.9, 0.8))
    r = rng.random(3)
    found = []
    for frame in range(N):
        wrist, angle, curl = kind(frame / FPS, r)
        jitter = rng.normal(size=(2, 21, 2)) * noise
        looks = rng.random(2) < seen
        if looks[0]:
            found.append(_hand(frame, "right", (x, y), scale, wrist, angle, skeleton(curl) + jitter[0]))
        if looks[1]:
            still = skeleton(0.5) * (-1, 1) + jitter[1]
            found.append(_hand(frame, "left", (x - 0.25, y), scale, (0.0, 0.0), 0.3, still))
    return found


def _hand(
    frame: int,
    side: Side,
    at: tuple[float, float],
    scale: float,
    wrist: tuple[float, float],
    angle: float,
    points: np.ndarray,
) -> Hand:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    xy = np.array(at) + scale * (points @ turn.T + wrist) / (ASPECT, 1)
    landmarks = np.concatenate([xy, np.zeros((21, 1))], 1).astype(np.float32)
    box = np.clip(np.concatenate([xy.min(0), xy.max(0)]), 0, 1).astype(np.float32)
    return Hand(frame, side, 0.95, box, landmarks, np.zeros((21, 3), np.float32))


@pytest.fixture(scope="module")
def many() -> tuple[np.ndarray, np.ndarray]:
    vectors = [
        hand_motion.hand_motion(clip(kind, 100 * k + i), N) for k, kind in enumerate(KINDS) for i in range(30)
    ]
    return np.stack(vectors), np.repeat(np.arange(len(KINDS)), 30)


def test_vectors_have_length_one_and_fixed_size(many: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, _ = many
    assert vectors.shape == (120, hand_motion.DIM)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_nearest_neighbour_does_the_same(many: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, kinds = many
    similar = vectors @ vectors.T - 2 * np.eye(len(vectors))
    assert (kinds[similar.argmax(1)] == kinds).mean() >= 0.95


def test_k_means_finds_the_kinds(many: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.cluster import KMeans

    vectors, kinds = many
    groups = KMeans(4, n_init=10, random_state=0).fit_predict(vectors)
    right = sum(np.bincount(kinds[groups == group]).max() for group in range(4))
    assert right / len(kinds) >= 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_place_and_distance_do_not_matter(kind: Callable[[float, np.ndarray], Pose]) -> None:
    here = hand_motion.hand_motion(clip(kind, 7, 0.1, (0.45, 0.5), noise=0), N)
    there = hand_motion.hand_motion(clip(kind, 7, 0.1, (0.62, 0.71), noise=0), N)
    nearer = hand_motion.hand_motion(clip(kind, 7, 0.17, (0.45, 0.5), noise=0), N)
    np.testing.assert_allclose(there, here, atol=1e-4)
    # The other hand stands further away in palms when these are smaller: that, and only that, may differ.
    assert here @ nearer > 0.97


def test_order_of_the_hands_does_not_matter() -> None:
    hands = clip(waving, 3)
    first = hand_motion.hand_motion(hands, N)
    np.testing.assert_array_equal(hand_motion.hand_motion(hands[::-1], N), first)
    np.testing.assert_array_equal(hand_motion.hand_motion(hands, N), first)


def test_a_flipped_label_does_not_matter() -> None:
    hands = clip(wiping, 5)
    other: dict[Side, Side] = {"left": "right", "right": "left"}
    flipped = [replace(h, side=other[h.side]) if h.frame in (4, 17, 30) else h for h in hands]
    np.testing.assert_allclose(
        hand_motion.hand_motion(flipped, N), hand_motion.hand_motion(hands, N), atol=1e-6
    )


def test_every_third_frame_is_enough_for_slow_motion(many: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, kinds = many
    for k, kind in enumerate(KINDS):
        if kind is waving:  # faster than half of the 2 looks a second
            continue
        sparse = [h for h in clip(kind, 900 + k, seen=1.0) if h.frame % 3 == 0]
        nearest = kinds[np.argsort(-vectors @ hand_motion.hand_motion(sparse, N))[:5]]
        assert np.bincount(nearest, minlength=4).argmax() == k


def test_no_hands_is_all_zeros_and_few_hands_are_finite() -> None:
    assert not hand_motion.hand_motion([], N).any()
    assert not hand_motion.hand_motion([], 0).any()
    hands = clip(reaching, 1)
    for few in (hands[:1], hands[:2], hands[:9], hands[-1:]):
        vector = hand_motion.hand_motion(few, N)
        assert np.isfinite(vector).all()
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_a_hand_of_no_size_is_no_hand() -> None:
    one = clip(waving, 1)[0]
    point = replace(one, landmarks=np.full((21, 3), 0.5, np.float32))
    assert not hand_motion.hand_motion([point] * 1, N).any()


def test_a_hand_outside_the_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="frame 36"):
        hand_motion.hand_motion([replace(clip(waving, 1)[0], frame=N)], N)
