"""The camera's motion is told apart from the hands', against footage whose camera is known."""

from __future__ import annotations

import itertools
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from ego2robot_kernels import camera as kernel
from ego2robot_kernels.motion import grey_small
from PIL import Image

from ego2robot.sample import acts, scene
from ego2robot.sample.draw import paint
from ego2robot.sample.hand import SKINS, HandPose, arm, joints
from ego2robot.sample.scene import MARGIN, Camera, film
from ego2robot.sample.segment import Segment, make
from ego2robot.stages import camera, tracks
from ego2robot.stages.motion import motion_scores
from ego2robot.stages.one_euro import OneEuro
from ego2robot.types import Clip, ClipFrames, Hand, Side

H, W = 360, 640
ASPECT = W / H


@pytest.fixture(scope="module")
def place() -> Image.Image:
    return scene.bench(0, H, W)


def clip_of(frames: np.ndarray, content: tuple[int, int, int, int] | None = None) -> ClipFrames:
    n, height, width = frames.shape[:3]
    clip = Clip("0" * 16, "1" * 16, 0, n, 6.0)
    return ClipFrames(clip, torch.from_numpy(frames), np.arange(n) / 6, content or (0, 0, height, width))


def filmed(place: Image.Image, cameras: list[Camera]) -> np.ndarray:
    """uint8 [T, H, W, 3], with a sensor's noise."""
    rng = np.random.default_rng(1)
    pictures = np.stack([film(place, one, H, W, MARGIN) for one in cameras]).astype(np.float32)
    return np.clip(pictures + rng.normal(0, 1.5, pictures.shape), 0, 255).astype(np.uint8)


def wandering(n: int, reach: float, roll: float, zoom: float, seed: int = 0) -> list[Camera]:
    rng = np.random.default_rng(seed)
    xs, ys, rolls, zooms = (rng.uniform(-1, 1, (4, n)).T * (reach, reach, roll, zoom)).T
    return [Camera(*map(float, one)) for one in zip(xs, ys, rolls, 1.06 + zooms, strict=True)]


def middle_moves(before: Camera, after: Camera) -> np.ndarray:
    """float64 [2]: where what is in the middle of the picture goes, pixels of 160 x 90."""
    middle = np.array([ASPECT / 2, 0.5])
    at_rest = middle + np.array([before.x, before.y])
    return np.asarray((after.seen(at_rest, ASPECT) - middle) * 90)


def truth(cameras: list[Camera]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shift [T - 1, 2] in pixels of 160 x 90, log scale and roll [T - 1]."""
    pairs = list(itertools.pairwise(cameras))
    shift = np.array([middle_moves(a, b) for a, b in pairs])
    log_scale = np.array([np.log(b.zoom / a.zoom) for a, b in pairs])
    # Camera.roll turns the camera; the scene turns the other way.
    return shift, log_scale, np.array([a.roll - b.roll for a, b in pairs])


def with_patches(frames: np.ndarray, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Two skin-coloured, mottled patches that jump about by themselves, and their boxes [T, 2, 4]."""
    rng = np.random.default_rng(seed)
    out, boxes = frames.copy(), np.zeros((len(frames), 2, 4), np.float32)
    for t, frame in enumerate(out):
        for k in range(2):
            x, y = int(rng.uniform(0.1, 0.7) * W), int(rng.uniform(0.2, 0.6) * H)
            w, h = int(0.16 * W), int(0.3 * H)
            mottle = np.asarray(
                Image.fromarray(rng.normal(0, 25, (h // 12, w // 12)).astype(np.float32)).resize((w, h))
            )
            frame[y : y + h, x : x + w] = np.clip(np.array([210, 160, 130]) + mottle[..., None], 0, 255)
            boxes[t, k] = x / W, y / H, (x + w) / W, (y + h) / H
    return out, torch.from_numpy(boxes)


# --- what is estimated ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reach", "roll", "zoom"), [(0.01, 0.0, 0.0), (0.02, 0.01, 0.01), (0.05, 0.03, 0.03), (0.08, 0.02, 0.02)]
)
def test_shift_zoom_and_roll_of_a_known_camera(
    place: Image.Image, reach: float, roll: float, zoom: float
) -> None:
    cameras = wandering(14, reach, roll, zoom)
    frames, boxes = with_patches(filmed(place, cameras))
    (found,) = kernel.camera_motion([kernel.small_greys(torch.from_numpy(frames))], [boxes])
    shift, log_scale, rolled = truth(cameras)
    error = np.linalg.norm(found.shift.numpy() - shift, axis=1)
    assert error.max() < 0.5
    assert np.median(error) < 0.15
    np.testing.assert_allclose(found.log_scale.numpy(), log_scale, atol=0.01)
    np.testing.assert_allclose(found.roll.numpy(), rolled, atol=0.01)
    assert found.confidence.min() > camera.MIN_CONFIDENCE


def test_what_moves_by_itself_is_outvoted_even_if_nobody_says_where_it_is(place: Image.Image) -> None:
    cameras = wandering(14, 0.02, 0.01, 0.01)
    frames, _ = with_patches(filmed(place, cameras))
    (found,) = kernel.camera_motion([kernel.small_greys(torch.from_numpy(frames))])
    assert np.linalg.norm(found.shift.numpy() - truth(cameras)[0], axis=1).max() < 0.5


def test_a_change_of_light_is_not_motion(place: Image.Image) -> None:
    cameras = wandering(8, 0.02, 0.01, 0.01)
    dimmed = filmed(place, cameras) * np.linspace(1, 0.6, 8, dtype=np.float32)[:, None, None, None]
    (found,) = kernel.camera_motion([kernel.small_greys(torch.from_numpy(dimmed.astype(np.uint8)))])
    assert np.linalg.norm(found.shift.numpy() - truth(cameras)[0], axis=1).max() < 0.5


def test_nothing_to_see_is_no_motion_and_no_confidence() -> None:
    for level in (0, 77, 255):
        (found,) = kernel.camera_motion([torch.full((4, 90, 160), level, dtype=torch.uint8)])
        for part in (found.shift, found.log_scale, found.roll, found.confidence):
            assert torch.isfinite(part).all()
            assert part.abs().max() < 1e-6
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(np.clip(rng.normal(128, 3, (5, 90, 160)), 0, 255).astype(np.uint8))
    (found,) = kernel.camera_motion([noise])
    assert found.confidence.max() < 0.15


def test_a_still_camera_does_not_move_though_the_sensor_is_noisy(place: Image.Image) -> None:
    frames = filmed(place, [Camera()] * 4)
    (found,) = kernel.camera_motion([kernel.small_greys(torch.from_numpy(frames))])
    assert found.shift.abs().max() < 0.05
    assert found.confidence.min() > 0.8


def test_a_direction_without_texture_is_not_claimed_to_be_known() -> None:
    y = np.arange(90)[:, None]
    stripes = np.broadcast_to(128 + 60 * np.sin(y / 4), (90, 160)).astype(np.uint8)
    rng = np.random.default_rng(0)
    noisy = np.clip(stripes + rng.normal(0, 1, (4, 90, 160)), 0, 255).astype(np.uint8)
    (found,) = kernel.camera_motion([torch.from_numpy(noisy)])
    assert found.confidence.max() < 0.5
    assert found.shift.abs().max() < 1


def test_cuts_are_not_trusted() -> None:
    places = [scene.bench(0, H, W), scene.Aisle(0, H, W).picture(1.0)]
    frames = np.stack([film(places[i % 2], Camera(), H, W, MARGIN) for i in range(6)])
    path = camera.camera_path(clip_of(frames))
    assert not path.trusted.any()
    points = np.full((5, 2), 0.3)
    np.testing.assert_array_equal(path.carried(points), points)


@pytest.mark.parametrize("bars", ["pillars", "top and bottom"])
def test_black_bars_do_not_hold_the_picture_still(place: Image.Image, bars: str) -> None:
    cameras = wandering(8, 0.03, 0.0, 0.0)
    frames = filmed(place, cameras)
    content = (0, 10, H, 300) if bars == "pillars" else (70, 0, 220, W)
    top, left, height, width = content
    barred = np.zeros_like(frames)
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    barred[inside] = frames[inside]
    clip = clip_of(barred, content)
    path = camera.camera_path(clip)
    error = np.linalg.norm(path.shift * (160, 90) - truth(cameras)[0], axis=1)
    assert error.max() < 0.5
    scores = camera.camera_scores([clip])
    assert scores["residual_motion"][0] < 0.6 * motion_scores([clip])[0]


def test_pixels_that_are_not_square() -> None:
    """A 4:3 frame is squeezed into 160 x 90: a roll stays a roll."""
    height, width = 360, 480
    place = scene.bench(0, height, width)
    cameras = [Camera(0, 0, roll, 1.06) for roll in (0.0, 0.04, -0.02, 0.03)]
    frames = np.stack([film(place, one, height, width, MARGIN) for one in cameras])
    path = camera.camera_path(clip_of(frames))
    np.testing.assert_allclose(path.roll, [-0.04, 0.06, -0.05], atol=0.004)
    np.testing.assert_allclose(path.log_scale, 0, atol=0.005)
    np.testing.assert_allclose(path.shift, 0, atol=0.002)


def test_greys_are_those_of_the_motion_score_on_every_device() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 100, 210, 3), dtype=np.uint8)
    expected = grey_small(torch.from_numpy(frames))
    np.testing.assert_array_equal(kernel.small_greys(torch.from_numpy(frames)).numpy(), expected)
    # The same code as on a GPU.
    np.testing.assert_array_equal(kernel._small_greys(torch.from_numpy(frames), (90, 160)).numpy(), expected)


def test_clips_do_not_depend_on_each_other(place: Image.Image) -> None:
    lengths = (7, 1, 0, 4, 2)
    clips = [
        kernel.small_greys(torch.from_numpy(filmed(place, wandering(max(n, 1), 0.03, 0.01, 0.01, n))))[:n]
        for n in lengths
    ]
    together = kernel.camera_motion(clips)
    assert [len(found) for found in together] == [6, 0, 0, 3, 1]
    for clip, found in zip(clips, together, strict=True):
        (alone,) = kernel.camera_motion([clip])
        for name in ("shift", "log_scale", "roll", "confidence"):
            assert torch.equal(getattr(alone, name), getattr(found, name))


def test_clips_in_one_batch_come_to_the_same(place: Image.Image) -> None:
    """What a GPU does with many clips at once, here on the CPU."""
    clips = [
        kernel.small_greys(torch.from_numpy(filmed(place, wandering(n, 0.03, 0.01, 0.01, n)))) for n in (5, 3)
    ]
    contents = [(0.0, 0.0, 90.0, 160.0)] * 2
    masks = [kernel._mask(clip, None, content) for clip, content in zip(clips, contents, strict=True)]
    batch = kernel._motion_of(clips, masks, contents, 1.0)
    alone = kernel.camera_motion(clips)
    for name in ("shift", "log_scale", "roll", "confidence"):
        expected = torch.cat([getattr(found, name) for found in alone])
        torch.testing.assert_close(getattr(batch, name), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_comes_to_the_same(place: Image.Image) -> None:
    clips = [torch.from_numpy(filmed(place, wandering(n, 0.03, 0.01, 0.01, n))) for n in (9, 2, 5)]
    host = [kernel.small_greys(clip) for clip in clips]
    device = [kernel.small_greys(clip.cuda()) for clip in clips]
    for a, b in zip(host, device, strict=True):
        assert torch.equal(a, b.cpu())
    for a, b in zip(kernel.camera_motion(host), kernel.camera_motion(device), strict=True):
        assert b.shift.is_cuda
        torch.testing.assert_close(a.shift, b.shift.cpu(), atol=2e-2, rtol=0)
        torch.testing.assert_close(a.confidence, b.confidence.cpu(), atol=1e-2, rtol=0)


def test_wrong_shapes_are_refused() -> None:
    greys = torch.zeros(3, 90, 160)
    with pytest.raises(ValueError, match="hands or content of another number"):
        kernel.camera_motion([greys], [None, None])
    with pytest.raises(ValueError, match=r"\[T, h, w\]"):
        kernel.camera_motion([greys, torch.zeros(3, 80, 160)])
    with pytest.raises(ValueError, match=r"\[T, K, 4\]"):
        kernel.camera_motion([greys], [torch.zeros(2, 1, 4)])
    with pytest.raises(ValueError, match="leaves nothing"):
        kernel.camera_motion([greys], None, [(10.2, 0.0, 0.5, 160.0)])
    with pytest.raises(ValueError, match="1 motions for 3"):
        kernel.compensated_difference(greys, kernel.camera_motion([greys[:2]])[0])


# --- scores -----------------------------------------------------------------------------------------------


def test_head_motion_counts_for_the_camera_and_hand_motion_for_what_is_left(place: Image.Image) -> None:
    moving = wandering(24, 0.03, 0.01, 0.01)
    head = clip_of(filmed(place, moving))
    still = filmed(place, [Camera()] * 24)
    work = clip_of(with_patches(still)[0])
    rest = clip_of(still)
    scores = camera.camera_scores([head, work, rest])
    motion = motion_scores([head, work, rest])
    assert all(values.dtype == np.float32 and values.shape == (3,) for values in scores.values())
    # In used frames the camera jumps between places; ways are in picture widths, steps a third of a second.
    used = truth(moving[::2])[0] / 160 * 3
    assert scores["camera_motion"][0] == pytest.approx(np.linalg.norm(used, axis=1).mean(), rel=0.1)
    assert scores["camera_motion"][1:].max() < 0.01 * scores["camera_motion"][0]
    assert scores["residual_motion"][0] < 0.5 * motion[0]
    np.testing.assert_allclose(scores["residual_motion"][1:], motion[1:], rtol=0.03)
    assert (scores["residual_motion"] <= motion * 1.0001).all()
    assert scores["camera_confidence"][2] > 0.8


def test_nothing_is_taken_out_of_pictures_that_have_nothing_in_common() -> None:
    rng = np.random.default_rng(0)
    greys = torch.from_numpy(rng.integers(0, 256, (3, 90, 160), dtype=np.uint8))
    expected = np.abs(np.diff(greys.numpy().astype(float), axis=0)).mean((1, 2)) / 255
    zero = torch.zeros(2)
    for shift in (0.0, 500.0):
        motion = kernel.CameraMotion(torch.full((2, 2), shift), zero, zero, zero)
        np.testing.assert_allclose(kernel.compensated_difference(greys, motion), expected, rtol=1e-5)
    # A whole pixel's shift, known exactly, leaves nothing.
    panned = torch.stack([greys[0], greys[0].roll(1, 1)])
    one = kernel.CameraMotion(torch.tensor([[1.0, 0.0]]), zero[:1], zero[:1], zero[:1])
    assert kernel.compensated_difference(panned, one).item() < 1e-4


def test_scores_of_ragged_and_empty_clips() -> None:
    frames = np.zeros((5, 64, 96, 3), np.uint8)
    clips = [clip_of(frames[:n]) for n in (5, 2, 1, 0)]
    for values in camera.camera_scores(clips).values():
        np.testing.assert_array_equal(values, 0)
    assert all(len(values) == 0 for values in camera.camera_scores([]).values())
    with pytest.raises(ValueError, match="another number"):
        camera.camera_scores(clips, [[]])


def test_hands_that_are_known_are_left_out(place: Image.Image) -> None:
    """Hands fill most of the picture and all move one way; only who is told of them sees the bench rest."""
    still = filmed(place, [Camera()] * 9)
    rng = np.random.default_rng(0)
    mottle = np.asarray(Image.fromarray(rng.normal(0, 40, (30, 60)).astype(np.float32)).resize((600, 300)))
    hands = []
    for t, frame in enumerate(still):
        frame[30:330, 20:500] = np.clip(140 + mottle[:, 8 * t : 8 * t + 480, None], 0, 255)
        if t % 3 == 0:
            box = np.array([20 / W, 30 / H, 500 / W, 330 / H], np.float32)
            hands.append(Hand(t, "right", 0.9, box, np.zeros((21, 3)), np.zeros((21, 3))))
    clip = clip_of(still)
    assert camera.camera_scores([clip])["camera_motion"][0] > 0.02
    told = camera.camera_scores([clip], [hands])
    assert told["camera_motion"][0] < 0.002
    assert told["camera_confidence"][0] > 0.5


# --- generated footage and actions ------------------------------------------------------------------------


def test_generated_footage_through_a_codec(tmp_path: Path) -> None:
    segment = Segment(
        str(tmp_path / "a.mp4"), "manipulating", "assembling", 0, 5, 90, 30, W, H, "h264", 30, 0
    )
    make(segment)
    with av.open(segment.path) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    picked = range(0, 90, 5)
    take = acts.loop(5, segment.name, 0, 3.0)
    cameras = [acts.head_working(take, index / 90) for index in picked]
    path = camera.camera_path(clip_of(frames[::5]))
    error = np.linalg.norm(path.shift * (160, 90) - truth(cameras)[0], axis=1)
    assert path.trusted.all()
    assert error.max() < 0.5
    assert np.median(error) < 0.15


def test_a_still_hand_under_a_moving_camera_does_not_act(place: Image.Image) -> None:
    take = acts.loop(3, "still", 0, 6.0)
    cameras = [acts.head_working(take, index / 36) for index in range(36)]
    poses = [HandPose("left", (0.62, 0.66), 0.2), HandPose("right", (1.15, 0.62), -0.2)]
    frames, hands = filmed(place, cameras), []
    for t, (frame, one) in enumerate(zip(frames, cameras, strict=True)):
        for pose in poses:
            seen = one.seen(joints(pose), ASPECT)
            elbow = one.seen(np.array([pose.wrist[0], 1.4]), ASPECT)
            paint(frame, arm(seen, (float(elbow[0]), float(elbow[1])), pose.size, SKINS[0]))
            side: Side = "left" if pose.side == "left" else "right"
            hands.append(hand_of(t, side, seen))
    followed = tracks.tracks(hands, 36)
    raw = tracks.wrist_action(followed)
    left = camera.compensated_wrist_action(followed, camera.camera_path(clip_of(frames), hands))
    assert left.dtype == np.float32
    assert left.shape == (36, 4)
    assert np.abs(raw).mean() > 0.004
    way = [np.linalg.norm(action.reshape(-1, 2) * (ASPECT, 1), axis=1).mean() for action in (left, raw)]
    assert way[0] <= 0.1 * way[1]


def test_a_way_is_smoothed_over_the_still_scene_and_not_over_the_moving_picture() -> None:
    """The camera sways, the hand rests, its detector trembles; smoothing the picture's way would add sway."""
    rng = np.random.default_rng(0)
    n = 60
    sway = 0.03 * np.sin(np.arange(n) / 2)
    path = camera.CameraPath(
        np.stack([np.diff(sway), np.zeros(n - 1)], 1).astype(np.float32), *[np.zeros(n - 1, np.float32)] * 2,
        np.ones(n - 1, np.float32), ASPECT,
    )  # fmt: skip
    rest = joints(HandPose("left", (0.8, 0.6), 0.2))
    hands = [
        hand_of(t, "left", rest + np.array([sway[t] * ASPECT, 0, 0]) + rng.normal(0, 0.004, (21, 3)))
        for t in range(n)
        if t not in (20, 21, 22, 23)
    ]

    def way(action: np.ndarray) -> float:
        return float(np.linalg.norm(action[:, :2] * (ASPECT, 1), axis=1).mean())

    raw = tracks.follow(hands, n).tracks
    plain = camera.compensated_wrist_action(raw, path)
    smooth = camera.compensated_wrist_action(raw, path, OneEuro())
    assert way(smooth) < 0.6 * way(plain)
    np.testing.assert_array_equal(smooth[19:24], 0)
    np.testing.assert_array_equal(smooth[:, 2:], 0)
    lagging = tracks.follow(hands, n, smooth=OneEuro()).tracks
    assert way(camera.compensated_wrist_action(lagging, path)) > 2 * way(smooth)
    # Nothing of a real way is lost: a hand that goes and stays arrives.
    there = [hand_of(t, "left", rest + np.array([0.2 * min(t, 10) / 10, 0, 0])) for t in range(40)]
    gone = camera.compensated_wrist_action(tracks.tracks(there, 40), known_path(40), OneEuro())[:-1, 0].sum()
    assert gone * ASPECT == pytest.approx(0.2, rel=0.02)


def hand_of(frame: int, side: Side, points: np.ndarray) -> Hand:
    """``points`` [21, 3] in view heights."""
    landmarks = (points / (ASPECT, 1, ASPECT)).astype(np.float32)
    box = np.concatenate([landmarks[:, :2].min(0), landmarks[:, :2].max(0)])
    return Hand(frame, side, 0.95, box, landmarks, np.zeros((21, 3), np.float32))


def known_path(n: int, shift: tuple[float, float] = (0.0, 0.0), roll: float = 0.0, log_scale: float = 0.0):
    ones = np.ones(n - 1, np.float32)
    return camera.CameraPath(
        np.outer(ones, shift).astype(np.float32), log_scale * ones, roll * ones, ones, ASPECT
    )


def test_actions_less_a_known_camera() -> None:
    hand = HandPose("right", (0.9, 0.6), 0.0)
    hands = [hand_of(t, "right", joints(hand) + np.array([0.05 * t, 0, 0])) for t in (0, 1, 2, 4)]
    followed = tracks.tracks(hands, 5, max_gap=0)
    raw = tracks.wrist_action(followed)
    rest = camera.compensated_wrist_action(followed, known_path(5))
    np.testing.assert_allclose(rest, raw, atol=1e-6)
    panned = camera.compensated_wrist_action(followed, known_path(5, (0.02, -0.03)))
    np.testing.assert_allclose(panned[:2, 2:], raw[:2, 2:] - (0.02, -0.03), atol=1e-6)
    np.testing.assert_array_equal(panned[:, :2], 0)  # no left hand
    np.testing.assert_array_equal(panned[2:], 0)  # unseen before or after; the last repeats
    # A quarter turn about the middle takes (0.9, 0.6) in heights to where it is; undone it is no action.
    turned = camera.compensated_wrist_action(followed, known_path(5, roll=0.1, log_scale=0.2))
    x, y = 0.9 - ASPECT / 2, 0.1
    expected = np.exp(0.2) * np.array([np.cos(0.1) * x - np.sin(0.1) * y, np.sin(0.1) * x + np.cos(0.1) * y])
    carried = (expected + np.array([ASPECT / 2, 0.5])) / (ASPECT, 1)
    np.testing.assert_allclose(turned[0, 2:], followed["right"].wrist[1] - carried, atol=1e-6)
    with pytest.raises(ValueError, match="4 steps of the camera for tracks of 4"):
        camera.compensated_wrist_action(tracks.tracks([], 4), known_path(5))
    for n in (0, 1):
        empty = camera.CameraPath(np.zeros((0, 2), np.float32), *[np.zeros(0, np.float32)] * 3, ASPECT)
        assert camera.compensated_wrist_action(tracks.tracks([], n), empty).shape == (n, 4)


def test_speed_counts_shift_zoom_and_roll() -> None:
    times = np.array([0.0, 0.5])
    whole = (1.0, 1.0)
    assert known_path(2, (0.1, 0.0)).speed(times, whole)[0] == pytest.approx(0.2)
    assert known_path(2, (0.0, 0.16)).speed(times, whole)[0] == pytest.approx(0.16 / ASPECT * 2)
    half = known_path(2, (0.1, 0.0)).speed(times, (0.5, 1.0))[0]
    assert half == pytest.approx(0.4)
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, 401), np.linspace(-0.5, 0.5, 401) / ASPECT)
    grown = np.sqrt(np.mean((0.1 * x) ** 2 + (0.1 * y) ** 2)) * 2
    found = known_path(2, log_scale=float(np.log(1.1))).speed(times, whole)[0]
    assert found == pytest.approx(grown, rel=0.01)
    assert known_path(2, (0.1, 0.0)).speed(np.zeros(2), whole)[0] == 0
