"""Hands followed through a clip, and the states and actions made of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ego2robot.stages import tracks
from ego2robot.types import Hand, Side

OTHER: dict[Side, Side] = {"left": "right", "right": "left"}


def hand(frame: int, side: Side, x: float, y: float = 0.5, score: float = 0.95, size: float = 0.1) -> Hand:
    grid = np.stack(np.meshgrid(np.linspace(0, size, 7), np.linspace(0, size, 3)), -1).reshape(21, 2)
    xy = grid if side == "left" else grid[:, ::-1]
    landmarks = np.concatenate([xy + np.array((x, y)), np.zeros((21, 1))], 1).astype(np.float32)
    box = np.concatenate([landmarks[:, :2].min(0), landmarks[:, :2].max(0)])
    return Hand(frame, side, score, box, landmarks, np.zeros((21, 3), np.float32))


def relabelled(one: Hand) -> Hand:
    """The same hand, called the other side."""
    return replace(one, side=OTHER[one.side])


def two_hands(n: int) -> list[Hand]:
    """The left hand drifts to the right, the right one bobs; well apart."""
    found = []
    for t in range(n):
        found += [hand(t, "left", 0.2 + 0.005 * t), hand(t, "right", 0.7, 0.5 + 0.02 * np.sin(t))]
    return found


def test_both_hands_as_detected() -> None:
    hands = two_hands(10)
    followed = tracks.tracks(hands, 10)
    for index, side in enumerate(("left", "right")):
        track = followed[side]
        mine = hands[index::2]
        assert track.visible.all()
        assert not track.interpolated.any()
        np.testing.assert_array_equal(track.box, [h.box for h in mine])
        np.testing.assert_array_equal(track.landmarks, [h.landmarks for h in mine])
        np.testing.assert_array_equal(track.wrist, [h.landmarks[0, :2] for h in mine])
        assert (track.visible.dtype, track.interpolated.dtype) == (np.bool_, np.bool_)
        assert (track.box.dtype, track.landmarks.dtype, track.wrist.dtype) == (np.float32,) * 3
        assert (track.box.shape, track.landmarks.shape, track.wrist.shape) == ((10, 4), (10, 21, 3), (10, 2))


@pytest.mark.parametrize("frames", [[4], [0], [9], [3, 4], [1, 5, 8]])
def test_flipped_labels_do_not_swap_the_hands(frames: list[int]) -> None:
    hands = two_hands(10)
    straight = tracks.tracks(hands, 10)
    both = tracks.tracks([relabelled(h) if h.frame in frames else h for h in hands], 10)
    for side in ("left", "right"):
        np.testing.assert_array_equal(both[side].landmarks, straight[side].landmarks)


def test_a_lone_hand_whose_label_flips_stays_one_hand() -> None:
    hands = [hand(t, "right", 0.5 + 0.01 * t) for t in range(12)]
    followed = tracks.tracks([relabelled(h) if h.frame in (0, 5, 6) else h for h in hands], 12)
    assert followed["right"].visible.all()
    assert not followed["left"].visible.any()


def test_labels_that_are_often_wrong_are_outvoted_over_the_clip() -> None:
    rng = np.random.default_rng(0)
    hands = two_hands(36)
    noisy = [relabelled(h) if rng.random() < 0.25 else h for h in hands]
    assert sum(a is not b for a, b in zip(hands, noisy, strict=True)) > 10
    followed, straight = tracks.tracks(noisy, 36), tracks.tracks(hands, 36)
    for side in ("left", "right"):
        np.testing.assert_array_equal(followed[side].landmarks, straight[side].landmarks)


def test_a_new_hand_after_another_left_takes_its_own_side() -> None:
    hands = [hand(t, "left", 0.1) for t in range(6)] + [hand(t, "right", 0.8) for t in range(8, 14)]
    followed = tracks.tracks(hands, 14)
    assert followed["left"].visible.nonzero()[0].tolist() == list(range(6))
    assert followed["right"].visible.nonzero()[0].tolist() == list(range(8, 14))


def test_hands_that_pass_each_other_keep_their_identity() -> None:
    hands = []
    for t in range(21):
        hands += [hand(t, "left", 0.2 + 0.025 * t, 0.45), hand(t, "right", 0.7 - 0.025 * t, 0.6)]
    hands = [relabelled(h) if h.frame in (10, 11) else h for h in hands]
    followed = tracks.tracks(hands, 21)
    np.testing.assert_allclose(followed["left"].wrist[:, 0], 0.2 + 0.025 * np.arange(21), atol=1e-6)
    np.testing.assert_allclose(followed["right"].wrist[:, 0], 0.7 - 0.025 * np.arange(21), atol=1e-6)


def test_order_of_detections_does_not_matter() -> None:
    hands = [h for h in two_hands(12) if (h.frame + len(h.side)) % 4]
    a, b = tracks.tracks(hands, 12), tracks.tracks(hands[::-1], 12)
    for side in ("left", "right"):
        np.testing.assert_array_equal(a[side].landmarks, b[side].landmarks)


def test_short_gaps_are_filled_and_marked_and_long_ones_are_not() -> None:
    seen = [0, 1, 4, 8, 9]
    track = tracks.tracks([hand(t, "left", 0.1 + 0.03 * t) for t in seen], 12)["left"]
    assert track.visible.nonzero()[0].tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert track.interpolated.nonzero()[0].tolist() == [2, 3]
    np.testing.assert_allclose(track.wrist[2:4, 0], [0.16, 0.19], atol=1e-6)
    np.testing.assert_allclose(track.box[2:4, 0], [0.16, 0.19], atol=1e-6)
    assert not track.landmarks[5:8].any()
    assert not track.box[5:8].any()
    wider = tracks.tracks([hand(t, "left", 0.1 + 0.03 * t) for t in seen], 12, max_gap=3)["left"]
    assert wider.interpolated.nonzero()[0].tolist() == [2, 3, 5, 6, 7]
    none = tracks.tracks([hand(t, "left", 0.1 + 0.03 * t) for t in seen], 12, max_gap=0)["left"]
    assert not none.interpolated.any()


def test_no_way_is_invented_between_far_places() -> None:
    track = tracks.tracks([hand(0, "left", 0.1), hand(2, "left", 0.85)], 3)["left"]
    assert track.visible.tolist() == [True, False, True]


def test_every_third_frame_gives_every_frame_in_between() -> None:
    track = tracks.tracks([hand(t, "right", 0.2 + 0.01 * t) for t in range(0, 36, 3)], 36)["right"]
    assert track.visible.tolist() == [True] * 34 + [False] * 2


def test_nothing_seen_and_nothing_there() -> None:
    for n in (0, 1, 5):
        followed = tracks.tracks([], n)
        assert not followed["left"].visible.any()
        assert followed["right"].landmarks.shape == (n, 21, 3)
        assert tracks.wrist_action(followed).shape == (n, 4)
        assert tracks.reference_state([], n).shape == (n, 4)
        assert tracks.reference_action([], n).shape == (n, 2)


def test_a_frame_outside_the_clip_is_refused() -> None:
    for frame in (-1, 5):
        with pytest.raises(ValueError, match=f"frame {frame} of a clip of 5"):
            tracks.tracks([hand(frame, "left", 0.1)], 5)


def test_wrist_action() -> None:
    hands = [hand(t, "left", x, 0.3) for t, x in ((0, 0.1), (1, 0.2), (2, 0.25))]
    hands += [hand(t, "right", 0.6, y) for t, y in ((2, 0.5), (3, 0.4), (4, 0.45))]
    action = tracks.wrist_action(tracks.tracks(hands, 5))
    assert action.dtype == np.float32
    expected = [[0.1, 0, 0, 0], [0.05, 0, 0, 0], [0, 0, 0, -0.1], [0, 0, 0, 0.05], [0, 0, 0, 0.05]]
    np.testing.assert_allclose(action, expected, atol=1e-6)


def test_reference_state_is_the_first_hands_box() -> None:
    hands = [hand(0, "left", 0.1), hand(0, "right", 0.7), hand(2, "right", 0.6)]
    state = tracks.reference_state(hands, 4)
    assert state.dtype == np.float32
    np.testing.assert_array_equal(state, [hands[0].box, [0] * 4, hands[2].box, [0] * 4])


def test_reference_action_is_the_first_wrists_way() -> None:
    places = {0: (0.1, 0.5), 1: (0.3, 0.4), 3: (0.5, 0.5), 4: (-0.9, 0.6), 5: (0.9, 0.6)}
    hands = [hand(t, "left", x, y) for t, (x, y) in places.items()]
    action = tracks.reference_action([*hands, hand(1, "right", 0.9)], 6)
    assert action.dtype == np.float32
    expected = [[0.2, -0.1], [0, 0], [0, 0], [-1, 0.1], [1, 0], [1, 0]]
    np.testing.assert_allclose(action, expected, atol=1e-6)
    one = tracks.reference_action(hands[:1], 1)
    np.testing.assert_array_equal(one, [[0, 0]])
