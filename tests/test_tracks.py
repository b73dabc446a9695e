"""Hands followed through a clip, and the states and actions made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ego2robot import models
from ego2robot.errors import UserError
from ego2robot.stages import tracks
from ego2robot.stages.one_euro import OneEuro
from ego2robot.types import SIDES, Hand, Side
from tests.trajectories import Scene, at_work

SAMPLES = Path(__file__).parents[1].parent / "shared" / "samples"

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


# --- identity against known trajectories --------------------------------------------------------------------


def right_identities(scene: Scene, followed: tracks.Followed) -> tuple[int, int, int]:
    """Of the true hands: dealt to their own side, to the other, and left out."""
    whose = {id(hand): side for hand, side in zip(scene.hands, scene.whose, strict=True)}
    right = sum(whose[id(hand)] == side for side in SIDES for hand in followed.dealt[side])
    dealt = sum(whose[id(hand)] is not None for side in SIDES for hand in followed.dealt[side])
    lost = sum(whose[id(one.hand)] is not None for one in followed.rejected)
    return right, dealt - right, lost


@pytest.mark.parametrize(
    ("flips", "drops", "ghosts"), [(0, 0, 0), (0.05, 0.1, 0), (0.05, 0.1, 0.05), (0.15, 0.1, 0.1)]
)
def test_hands_that_cross_come_and_go_keep_their_identity(flips: float, drops: float, ghosts: float) -> None:
    total = np.zeros(3)
    for seed in range(25):
        scene = at_work(seed, flips=flips, drops=drops, ghosts=ghosts)
        total += right_identities(scene, tracks.follow(scene.hands, scene.n_frames))
    assert total[0] / total.sum() >= 0.99


def test_most_of_what_is_no_hand_is_left_out_and_every_detection_is_accounted_for() -> None:
    kept = left_out = 0
    for seed in range(25):
        scene = at_work(seed, ghosts=0.1)
        followed = tracks.follow(scene.hands, scene.n_frames)
        dealt = [hand for side in SIDES for hand in followed.dealt[side]]
        out = [one.hand for one in followed.rejected]
        assert sorted(map(id, dealt + out)) == sorted(map(id, scene.hands))
        assert [hand.frame for hand in out] == sorted(hand.frame for hand in out)
        ghosts = {id(h) for h, side in zip(scene.hands, scene.whose, strict=True) if side is None}
        kept += sum(id(hand) in ghosts for hand in dealt)
        left_out += sum(id(hand) in ghosts for hand in out)
    assert left_out / (kept + left_out) >= 0.75


def test_a_long_clip_is_followed_as_well() -> None:
    scene = at_work(1, n_frames=600)
    right, wrong, lost = right_identities(scene, tracks.follow(scene.hands, scene.n_frames))
    assert right / (right + wrong + lost) >= 0.99


# --- plausibility -------------------------------------------------------------------------------------------


def reasons(hands: list[Hand], n: int, **options: object) -> list[tuple[int, str]]:
    return [(one.hand.frame, one.reason) for one in tracks.follow(hands, n, **options).rejected]  # type: ignore[arg-type]


def test_a_detection_alone_is_a_ghost_and_two_in_a_row_are_a_hand() -> None:
    right = [hand(t, "right", 0.7) for t in range(12)]
    assert reasons([*right, hand(5, "left", 0.2)], 12) == [(5, "ghost")]
    assert reasons([*right, hand(5, "left", 0.2), hand(6, "left", 0.21)], 12) == []
    # At the ends of a clip nobody knows what came before or after.
    assert reasons([*right, hand(0, "left", 0.2), hand(11, "left", 0.2)], 12) == []


def test_something_that_looks_like_a_hand_now_and_then_is_none() -> None:
    right = [hand(t, "right", 0.7) for t in range(36)]
    gripper = [hand(t, "left", 0.2) for t in (3, 10, 17, 24, 31)]
    assert reasons([*right, *gripper], 36) == [(h.frame, "ghost") for h in gripper]
    # The same detections are a hand if nobody looked in between.
    assert reasons(gripper, 36, looked=range(3, 36, 7)) == []


def test_a_hand_does_not_jump_away_and_back() -> None:
    hands = [hand(t, "left", 0.9 if t == 6 else 0.2) for t in range(12)]
    assert reasons(hands, 12) == [(6, "speed")]
    track = tracks.tracks(hands, 12)["left"]
    assert track.interpolated.nonzero()[0].tolist() == [6]
    np.testing.assert_allclose(track.wrist[6], [0.2, 0.5], atol=1e-6)


def test_a_hand_does_not_grow_for_a_moment() -> None:
    hands = [hand(t, "left", 0.15 if t == 6 else 0.2, size=0.4 if t == 6 else 0.1) for t in range(12)]
    assert reasons(hands, 12) == [(6, "size")]
    # A hand that comes nearer over the clip does grow.
    assert reasons([hand(t, "left", 0.2, size=0.1 + 0.02 * t) for t in range(12)], 12) == []


def test_two_hands_on_one_place_are_one_and_the_better_stays() -> None:
    hands = [hand(t, "left", 0.2 + 0.01 * t) for t in range(12)]
    doubles = [replace(hands[t], side="right", score=0.6) for t in range(4, 8)]
    followed = tracks.follow([*doubles, *hands], 12)
    assert [one.reason for one in followed.rejected] == ["same place"] * 4
    assert all(one.hand.side == "right" for one in followed.rejected)
    assert followed.tracks["left"].visible.all()
    assert not followed.tracks["right"].visible.any()


def test_a_third_hand_is_somebody_elses() -> None:
    hands = two_hands(12)
    others = [hand(t, "left", 0.45, 0.1) for t in range(3, 9)]
    followed = tracks.follow([*others, *hands], 12)
    assert [(one.hand.frame, one.reason) for one in followed.rejected] == [
        (t, "third hand") for t in range(3, 9)
    ]
    assert followed.tracks["left"].visible.all()


def test_how_far_a_hand_may_move_depends_on_the_time_it_had() -> None:
    def dealt(fps: float) -> list[str]:
        hands = [hand(t, "left", 0.8 if t == 6 else 0.2, size=0.25) for t in range(12)]
        return [reason for _, reason in reasons(hands, 12, fps=fps)]

    assert dealt(1.0) == []
    assert dealt(6.0) == ["speed"]


# --- from clip to clip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [12, 20, 24, 30])
def test_a_hand_keeps_its_side_from_clip_to_clip(offset: int) -> None:
    """In the second clip the detector mostly calls the lone left hand right."""
    hands = [hand(t, "left", 0.3 + 0.002 * t) for t in range(24)]
    first = tracks.follow(hands, 24)
    later = [hand(t, "right", 0.3 + 0.002 * (t + offset), score=0.6) for t in range(12)]
    assert tracks.follow(later, 12).tracks["right"].visible.all()
    second = tracks.continue_tracks(first, later, 12, offset)
    assert second.tracks["left"].visible.all()
    assert second.tracks["left"].visible.shape == (12,)
    assert not second.tracks["right"].visible.any()


def test_what_two_clips_share_they_see_alike() -> None:
    wrong = np.zeros(2)
    for seed in range(8):
        scene = at_work(seed, n_frames=72, flips=0.2)
        parts = [
            [replace(h, frame=h.frame - start) for h in scene.hands if start <= h.frame < start + 36]
            for start in (0, 18, 36)
        ]
        before = tracks.follow(parts[0], 36)
        for part in parts[1:]:
            after = tracks.continue_tracks(before, part, 36, 18)
            for side in SIDES:
                shared = {(h.frame - 18, h.landmarks.tobytes()) for h in before.dealt[side]}
                other = {(h.frame, h.landmarks.tobytes()) for h in after.dealt[OTHER[side]]}
                wrong += len(shared & other), len(shared)
            before = after
    assert wrong[0] <= 0.01 * wrong[1]


def test_a_hand_that_came_late_keeps_the_side_it_was_given() -> None:
    """It was not there before the clips part ways; what both saw of it decides."""
    hands = [hand(t, "left" if t < 36 else "right", 0.3, score=0.6) for t in range(20, 54)]
    before = tracks.follow([h for h in hands if h.frame < 36], 36)
    later = [replace(h, frame=h.frame - 18) for h in hands if h.frame >= 18]
    assert tracks.follow(later, 36).tracks["right"].visible.any()
    after = tracks.continue_tracks(before, later, 36, 18)
    assert after.tracks["left"].visible.nonzero()[0].tolist() == list(range(2, 36))


def test_strong_evidence_overrules_the_clip_before() -> None:
    first = tracks.follow([hand(t, "left", 0.3, score=0.55) for t in range(12)], 12)
    later = [hand(t, "right", 0.3) for t in range(36)]
    assert tracks.continue_tracks(first, later, 36, 12).tracks["right"].visible.all()
    with pytest.raises(ValueError, match="3 frames before"):
        tracks.continue_tracks(first, later, 36, -3)


# --- smoothing ----------------------------------------------------------------------------------------------


def test_one_euro_by_hand() -> None:
    """The numbers of the paper's formulas, written out for three samples."""
    filtered = OneEuro(1.0, 0.5, 2.0)(np.array([[0.0], [1.0], [1.0]]), fps=10.0)

    def share(cutoff: float) -> float:
        tau = 1 / (2 * np.pi * cutoff)
        return 1 / (1 + tau / 0.1)

    speed = share(2.0) * (1.0 / 0.1)
    first = share(1.0 + 0.5 * speed) * 1.0
    speed = share(2.0) * ((1.0 - first) / 0.1) + (1 - share(2.0)) * speed
    second = first + share(1.0 + 0.5 * speed) * (1.0 - first)
    np.testing.assert_allclose(filtered[:, 0], [0, first, second])


def test_smoothing_calms_a_hand_at_rest_and_follows_one_that_moves() -> None:
    rng = np.random.default_rng(0)
    still = np.full((200, 1), 0.5) + rng.normal(0, 0.01, (200, 1))
    one_euro = OneEuro()
    assert np.diff(one_euro(still, 6.0, 0.1), axis=0).std() < 0.6 * np.diff(still, axis=0).std()
    moving = np.linspace(0, 2, 60)[:, None]
    lag = (moving - one_euro(moving, 6.0, 0.1))[30:]
    # No more than one frame's way behind.
    assert 0 < lag.max() < moving[1, 0]
    for bad in ((0, 1, 1), (1, -1, 1), (1, 1, 0), (float("nan"), 1, 1)):
        with pytest.raises(ValueError, match="cutoffs are above 0"):
            OneEuro(*bad)
    with pytest.raises(ValueError, match="fps and unit"):
        one_euro(moving, 0.0)
    assert one_euro(np.zeros((0, 4), np.float32), 6.0).shape == (0, 4)


def test_smoothed_tracks_are_of_the_same_frames_and_raw_ones_are_the_default() -> None:
    rng = np.random.default_rng(0)
    seen = [t for t in range(24) if t not in (7, 15, 16, 17, 18)]
    hands = [hand(t, "left", 0.3 + float(rng.normal(0, 0.005))) for t in seen]
    raw, smooth = (tracks.follow(hands, 24, smooth=s).tracks["left"] for s in (None, OneEuro()))
    np.testing.assert_array_equal(raw.wrist[seen], [h.landmarks[0, :2] for h in hands])
    np.testing.assert_array_equal(smooth.visible, raw.visible)
    np.testing.assert_array_equal(smooth.interpolated, raw.interpolated)
    assert not smooth.landmarks[15:19].any()
    # A new start where the hand was away: nothing is dragged along over the gap.
    for first in (0, 19):
        np.testing.assert_allclose(smooth.wrist[first], raw.wrist[first], atol=1e-6)
    assert smooth.landmarks.dtype == np.float32

    def jitter(track: tracks.Track) -> float:
        return float(np.abs(np.diff(track.wrist[:15, 0])).mean())

    assert jitter(smooth) < 0.7 * jitter(raw)


# --- real hands ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detected() -> Iterator[list[Hand]]:
    """The hands of every third frame of 20 s of two hands at work, 10 frames/s."""
    from ego2robot.stages.hands_torch import TorchHands

    if not SAMPLES.is_dir():
        pytest.skip("no ../shared/samples beside the project")
    try:
        models.hand_networks("full", pull_if_missing=True)
    except UserError as error:
        pytest.skip(f"hand models cannot be had: {error}")
    with av.open(str(SAMPLES / "two_hands_mixer_20s.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i % 3 == 0]
    with TorchHands() as detector:
        found = detector.detect(torch.from_numpy(np.stack(frames)), np.arange(len(frames)))
    yield [one for frame in found for one in frame]


def test_two_hands_at_work_are_two_tracks_without_a_switch(detected: list[Hand]) -> None:
    n = 68
    rng = np.random.default_rng(0)
    flipped = [relabelled(h) if rng.random() < 0.1 else h for h in detected]
    for hands in (detected, flipped):
        followed = tracks.follow(hands, n, fps=10 / 3, aspect=680 / 468)
        assert len(followed.rejected) <= 0.01 * len(hands)
        left, right = (followed.tracks[side] for side in SIDES)
        assert left.visible.mean() > 0.95
        assert right.visible.mean() > 0.95
        # The wearer sits across the table, so the left hand is on the right, and so it stays.
        assert left.wrist[left.visible, 0].min() > right.wrist[right.visible, 0].max()
