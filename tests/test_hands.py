"""The hand detector on real pictures, and how sides are settled in a frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ego2robot import models
from ego2robot.errors import UserError
from ego2robot.stages.hands import visibility
from ego2robot.stages.hands_torch import TorchHands
from ego2robot.stages.sides import Candidate, one_per_side
from ego2robot.types import Hand

SAMPLES = Path(__file__).parents[1].parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/samples beside the project")


@pytest.fixture(scope="session")
def networks() -> tuple[Path, Path]:
    try:
        return models.hand_networks("full", pull_if_missing=True)
    except UserError as error:
        pytest.skip(f"hand models cannot be had: {error}")


@pytest.fixture(scope="module")
def detector(networks: tuple[Path, Path]) -> Iterator[TorchHands]:
    with TorchHands(dtype=torch.float32) as found:
        yield found


@pytest.fixture(scope="module")
def mixer() -> torch.Tensor:
    """uint8 [41, 468, 680, 3]: every 5th frame of two hands on a table, the person facing the camera."""
    with av.open(str(SAMPLES / "two_hands_mixer_20s.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i % 5 == 0]
    return torch.from_numpy(np.stack(frames))


def photograph(name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(SAMPLES / name).convert("RGB")))[None]


@needs_samples
def test_two_hands_at_work_are_seen_on_their_own_sides(detector: TorchHands, mixer: torch.Tensor) -> None:
    found = detector.detect(mixer, np.arange(len(mixer)))
    assert visibility(found) == 1.0
    assert np.mean([len(frame) == 2 for frame in found]) >= 0.9
    for index, frame in enumerate(found):
        assert [hand.side for hand in frame] in (["left"], ["right"], ["left", "right"])
        for hand in frame:
            assert hand.frame == index
            # The left hand holds the mixer on the right of the picture, all the time.
            assert (hand.side == "left") == (hand.landmarks[0, 0] > 0.6)


@needs_samples
@pytest.mark.parametrize(
    ("name", "side"), [("hand_call.jpg", "left"), ("hand_four.jpg", "left"), ("hand_rock.jpg", "right")]
)
def test_gestures_of_known_side(detector: TorchHands, name: str, side: str) -> None:
    picture = photograph(name)
    (found,) = detector.detect(picture, np.array([0]))
    assert [hand.side for hand in found] == [side]
    (mirrored,) = detector.detect(picture.flip(2), np.array([0]))
    assert [hand.side for hand in mirrored] == ["right" if side == "left" else "left"]
    assert mirrored[0].landmarks[0, 0] == pytest.approx(1 - found[0].landmarks[0, 0], abs=0.03)


@needs_samples
def test_what_a_hand_is_made_of(detector: TorchHands) -> None:
    (hand,) = detector.detect(photograph("hand_four.jpg"), np.array([0]))[0]
    assert (hand.box.shape, hand.landmarks.shape, hand.world.shape) == ((4,), (21, 3), (21, 3))
    assert {a.dtype for a in (hand.box, hand.landmarks, hand.world)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(hand.box[:2], hand.landmarks[:, :2].min(0))
    np.testing.assert_array_equal(hand.box[2:], hand.landmarks[:, :2].max(0))
    assert hand.landmarks[8, 1] < hand.landmarks[0, 1]  # four fingers point up: y runs down
    assert 0.05 < np.linalg.norm(hand.world[0] - hand.world[9]) < 0.15  # wrist to middle knuckle, metres
    assert 0.9 < hand.score <= 1


@needs_samples
def test_a_frame_does_not_depend_on_the_others(detector: TorchHands, mixer: torch.Tensor) -> None:
    once = detector.detect(mixer, np.array([20]))[0]
    again = detector.detect(mixer, np.array([3, 20, 7, 20]))
    for other in (again[1], again[3]):
        assert [h.side for h in other] == [h.side for h in once]
        for a, b in zip(once, other, strict=True):
            # Convolutions of another batch may add in another order.
            np.testing.assert_allclose(a.landmarks, b.landmarks, atol=5e-4)


@needs_samples
def test_strided_views_are_read_as_the_pictures_they_are(detector: TorchHands, mixer: torch.Tensor) -> None:
    view = mixer[:, 4:460, 10:670]
    assert not view.is_contiguous()
    seen, copied = (detector.detect(frames, np.array([20]))[0] for frames in (view, view.clone()))
    assert len(seen) == 2
    for a, b in zip(seen, copied, strict=True):
        np.testing.assert_array_equal(a.landmarks, b.landmarks)


@needs_samples
def test_bars_beside_the_picture_move_the_hands_and_hide_none(
    detector: TorchHands, mixer: torch.Tensor
) -> None:
    padded = torch.zeros((len(mixer), 500, 832, 3), dtype=torch.uint8)
    padded[:, 20:488, 76:756] = mixer
    some = np.arange(0, len(mixer), 4)
    bare, boxed = detector.detect(mixer, some), detector.detect(padded, some, (20, 76, 468, 680))
    for before, after in zip(bare, boxed, strict=True):
        assert [h.side for h in after] == [h.side for h in before]
        for a, b in zip(before, after, strict=True):
            x, y, z = a.landmarks.T
            expected = np.stack([(76 + x * 680) / 832, (20 + y * 468) / 500, z * 680 / 832], 1)
            np.testing.assert_allclose(b.landmarks, expected, atol=1e-6)
            np.testing.assert_array_equal(b.world, a.world)


@needs_samples
def test_bars_are_harmless_where_nobody_says_they_are_bars(detector: TorchHands, mixer: torch.Tensor) -> None:
    padded = torch.zeros((len(mixer), 468, 832, 3), dtype=torch.uint8)
    padded[:, :, 76:756] = mixer
    found = detector.detect(padded, np.arange(0, len(mixer), 4))
    assert visibility(found) == 1.0


@needs_samples
def test_boxes_of_hands_cut_by_the_edge_stay_in_the_frame(detector: TorchHands, mixer: torch.Tensor) -> None:
    found = [detector.detect(mixer[20:21, :, :right], np.array([0]))[0] for right in range(500, 680, 20)]
    boxes = np.array([hand.box for frame in found for hand in frame])
    assert len(boxes) > 9
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_pictures_without_hands(detector: TorchHands) -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in ((1, 1), (2, 3), (17, 31), (360, 640), (64, 2000)):
        frames = torch.stack(
            [
                torch.zeros((height, width, 3), dtype=torch.uint8),
                torch.full((height, width, 3), 255, dtype=torch.uint8),
                torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator),
            ]
        )
        found = detector.detect(frames, np.arange(3))
        assert found == [[], [], []]
        assert visibility(found) == 0


def test_no_frames_no_lists(detector: TorchHands) -> None:
    frames = torch.zeros((4, 36, 64, 3), dtype=torch.uint8)
    assert detector.detect(frames, np.array([], np.int64)) == []
    assert visibility([]) == 0


def test_models_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="ego2robot models pull"):
        TorchHands()


# -- sides ------------------------------------------------------------------------------------------


def candidate(p_left: float, x: float, y: float = 0.5, size: float = 0.1) -> Candidate:
    spiral = np.arange(21)
    xy = np.stack([x + size * np.cos(spiral) * spiral / 20, y + size * np.sin(spiral) * spiral / 20], 1)
    landmarks = np.concatenate([xy, np.zeros((21, 1))], 1).astype(np.float32)
    return Candidate(p_left, landmarks, np.zeros((21, 3), np.float32))


def sides(found: list[Hand]) -> list[tuple[str, float]]:
    return [(hand.side, round(float(hand.landmarks[0, 0]), 2)) for hand in found]


def test_a_lone_hand_keeps_its_side() -> None:
    assert sides(one_per_side([candidate(0.9, 0.8)], 0)) == [("left", 0.8)]
    assert sides(one_per_side([candidate(0.2, 0.2)], 0)) == [("right", 0.2)]


def test_of_two_lefts_the_less_left_one_is_the_right() -> None:
    found = one_per_side([candidate(0.7, 0.2), candidate(0.99, 0.7)], 5)
    assert sides(found) == [("left", 0.7), ("right", 0.2)]
    assert [hand.score for hand in found] == pytest.approx([0.99, 0.3])
    assert {hand.frame for hand in found} == {5}
    assert sides(one_per_side([candidate(0.01, 0.3), candidate(0.2, 0.8)], 0)) == [
        ("left", 0.8),
        ("right", 0.3),
    ]


def test_a_toss_up_goes_by_place() -> None:
    for pair in ([0.97, 0.97], [0.970, 0.972], [0.02, 0.02], [1.0, 1.0], [0.0, 0.0]):
        found = one_per_side([candidate(pair[0], 0.7), candidate(pair[1], 0.3)], 0)
        assert sides(found) == [("left", 0.3), ("right", 0.7)]


def test_sure_sides_beat_place() -> None:
    found = one_per_side([candidate(0.95, 0.8), candidate(0.05, 0.2)], 0)
    assert sides(found) == [("left", 0.8), ("right", 0.2)]


def test_one_hand_seen_twice_is_one() -> None:
    found = one_per_side([candidate(0.6, 0.5), candidate(0.95, 0.505), candidate(0.1, 0.8)], 0)
    assert sides(found) == [("left", 0.5), ("right", 0.8)] or sides(found) == [("left", 0.51), ("right", 0.8)]
    assert found[0].score == pytest.approx(0.95)


def test_of_many_hands_the_best_of_each_side_stay() -> None:
    many = [candidate(0.8, 0.1), candidate(0.99, 0.4), candidate(0.3, 0.6), candidate(0.02, 0.9)]
    assert sides(one_per_side(many, 0)) == [("left", 0.4), ("right", 0.9)]


def test_what_is_not_finite_or_not_in_the_frame_is_no_hand() -> None:
    broken = candidate(0.99, 0.5)
    broken.landmarks[3, 1] = np.nan
    assert one_per_side([broken, candidate(0.99, 1.6), candidate(0.98, 0.5, y=-0.3)], 0) == []
    (edge,) = one_per_side([candidate(0.9, 0.98)], 0)
    assert edge.box[2] == 1
    assert edge.landmarks[:, 0].max() > 1
