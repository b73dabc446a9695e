import json

import numpy as np
import pytest
import torch

from ego2robot.cameras import Fisheye, camera_of, undistorter
from ego2robot.types import FrameSpec

CAMERA = Fisheye(1920, 1080, 1030.5, 1031.0, 965.2, 538.7, (-0.0135, 0.0171, -0.0222, 0.0084))
# The example of Egocentric-100K's dataset card.
STRONG = Fisheye(456, 256, 137.98, 138.23, 232.17, 125.37, (0.3948, 0.1798, -0.2753, 0.0793))
META = {
    "intrinsics": json.dumps(
        {
            "model": "fisheye",
            "image_width": 1920,
            "image_height": 1080,
            "fx": 1030.5,
            "fy": 1031.0,
            "cx": 965.2,
            "cy": 538.7,
            "k1": -0.0135,
            "k2": 0.0171,
            "k3": -0.0222,
            "k4": 0.0084,
        }
    )
}


def matrix(camera):
    return np.array([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1.0]])


def pixels(camera, n=2000):
    return np.random.default_rng(0).uniform((0, 0), (camera.width, camera.height), (n, 2))


@pytest.mark.parametrize("camera", [CAMERA, STRONG])
def test_points_project_as_in_opencv_to_a_ten_thousandth_of_a_pixel(camera):
    cv2 = pytest.importorskip("cv2")
    points = np.random.default_rng(1).uniform((-2, -2, 0.5), (2, 2, 3), (2000, 3))
    zero = np.zeros(3)
    theirs, _ = cv2.fisheye.projectPoints(points[:, None], zero, zero, matrix(camera), np.array(camera.k))
    np.testing.assert_allclose(camera.project(points), theirs[:, 0], atol=1e-4)


@pytest.mark.parametrize("camera", [CAMERA, STRONG])
def test_points_are_undistorted_as_in_opencv_to_a_ten_thousandth_of_a_pixel(camera):
    cv2 = pytest.importorskip("cv2")
    bent = pixels(camera)
    radius = np.hypot(*((bent - (camera.cx, camera.cy)) / (camera.fx, camera.fy)).T)
    bent = bent[radius < np.pi / 2]  # OpenCV takes what lies further out for this
    assert len(bent) > 1500
    terms = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 100, 1e-13)
    theirs = cv2.fisheye.undistortPoints(
        bent[:, None], matrix(camera), np.array(camera.k), P=matrix(camera), criteria=terms
    )
    np.testing.assert_allclose(camera.undistort(bent), theirs[:, 0], atol=1e-4)


@pytest.mark.parametrize("camera", [CAMERA, STRONG])
def test_there_and_back_is_where_it_began(camera):
    bent = pixels(camera)
    rays = camera.unproject(bent)
    np.testing.assert_allclose(np.linalg.norm(rays, axis=-1), 1.0, atol=1e-12)
    np.testing.assert_allclose(camera.project(rays * 3.7), bent, atol=1e-8)
    straight = camera.undistort(bent)
    seen = np.isfinite(straight).all(-1)
    assert seen.mean() > 0.9
    np.testing.assert_allclose(camera.distort(straight[seen]), bent[seen], atol=1e-6)


def test_the_middle_stays_and_what_a_camera_cannot_see_is_nan():
    centre = np.array([CAMERA.cx, CAMERA.cy])
    np.testing.assert_allclose(CAMERA.undistort(centre), centre, atol=1e-9)
    np.testing.assert_allclose(CAMERA.project(np.array([0.0, 0, 1])), centre)
    assert np.isnan(CAMERA.project(np.array([0.0, 0, -1]))).all()
    narrow = Fisheye(100, 100, 50, 50, 50, 50, (-0.3, 0, 0, 0))  # bends back on itself at 60 degrees
    assert narrow.max_theta == pytest.approx((1 / 0.9) ** 0.5)
    assert np.isnan(narrow.unproject(np.array([500.0, 50]))).all()
    assert np.isnan(narrow.project(np.array([10.0, 0, 1]))).all()


@pytest.mark.parametrize(
    ("fit", "size"), [("letterbox", (360, 640)), ("letterbox", (256, 320)), ("stretch", (256, 320))]
)
def test_frames_are_undistorted_as_in_opencv_where_the_picture_lies_in_them(fit, size):
    cv2 = pytest.importorskip("cv2")
    spec = FrameSpec(*size, fit=fit)
    top, left, height, width = spec.content(1920, 1080)
    rng = np.random.default_rng(2)
    coarse = rng.uniform(0, 255, (3, 18, 32, 3)).astype(np.float32)
    frames = np.zeros((3, *size, 3), np.uint8)
    for frame, small in zip(frames, coarse, strict=True):
        frame[top : top + height, left : left + width] = cv2.resize(
            small, (width, height), interpolation=cv2.INTER_CUBIC
        ).clip(0, 255)
    found = undistorter(META, spec)(torch.from_numpy(frames)).numpy()
    scale = np.array([width / 1920, height / 1080])
    k = matrix(CAMERA)
    k[:2] *= scale[:, None]
    k[:2, 2] += scale / 2 - 0.5
    for frame, straight in zip(frames, found, strict=True):
        content = np.ascontiguousarray(frame[top : top + height, left : left + width])
        wanted = cv2.fisheye.undistortImage(content, k, np.array(CAMERA.k), Knew=k)
        given = straight[top : top + height, left : left + width].astype(int)
        inner = np.abs(given - wanted)[2:-2, 2:-2]
        assert np.percentile(inner, 99) <= 2 and inner.mean() < 0.5  # OpenCV rounds places to 1/32 pixel
        outside = np.ones(size, bool)
        outside[top : top + height, left : left + width] = False
        assert not straight[outside].any()
    assert np.abs(found.astype(int) - frames).mean() > 5


def test_landmarks_move_with_the_picture():
    spec = FrameSpec(360, 480)
    straighten = undistorter(META, spec)
    for x, y in [(0.5, 0.5), (0.25, 0.4), (0.8, 0.62), (0.7, 0.3)]:
        frame = np.zeros((1, 360, 480, 3), np.uint8)
        at = round(x * 480 - 0.5), round(y * 360 - 0.5)
        frame[0, at[1] - 2 : at[1] + 3, at[0] - 2 : at[0] + 3] = 255
        light = straighten(torch.from_numpy(frame)).numpy()[0, ..., 0].astype(float)
        rows, columns = np.mgrid[0:360, 0:480] + 0.5
        centre = np.array([(columns * light).sum() / 480, (rows * light).sum() / 360]) / light.sum()
        share = (np.array(at) + 0.5) / (480, 360)
        np.testing.assert_allclose(straighten.points(share), centre, atol=0.5 / 360)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "nonsense",
        '{"model": "pinhole", "image_width": 10, "image_height": 10, "fx": 1, "fy": 1, "cx": 1, "cy": 1}',
        '{"image_width": 1920, "image_height": 1080, "fx": NaN, "fy": 1, "cx": 1, "cy": 1}',
        '{"image_width": 1920, "image_height": 1080, "fx": 0, "fy": 1, "cx": 1, "cy": 1}',
        '{"image_width": "1920", "image_height": 1080, "fx": 1, "fy": 1, "cx": 1, "cy": 1}',
        '{"image_width": 1e300, "image_height": 1080, "fx": 1, "fy": 1, "cx": 1, "cy": 1}',
        '{"image_width": 1920, "image_height": 1080, "fx": 1, "fy": 1, "cx": 1, "cy": 1, "k1": null}',
        "[" * 100_000,
    ],
)
def test_a_camera_that_makes_no_sense_is_none(text):
    assert camera_of({"intrinsics": text}) is None and undistorter({"intrinsics": text}, FrameSpec()) is None
    assert camera_of({}) is None


def test_stored_hands_move_with_the_picture_and_those_out_of_reach_are_left_out():
    import pyarrow as pa

    from ego2robot.export.footage import straightened
    from ego2robot.store import schema

    spec = FrameSpec(360, 640)
    straighten = undistorter(META, spec)
    rng = np.random.default_rng(3)
    landmarks = rng.uniform(0.55, 0.7, (2, 21, 3)).astype(np.float32)
    landmarks[1, 0, 0] = 3.0  # far outside the picture
    rows = [
        {
            "clip_id": "c",
            "frame": i,
            "time_s": 0.0,
            "side": "left",
            "score": 1.0,
            "presence": 1.0,
            "box": [0.55, 0.55, 0.7, 0.7],
            "landmarks": landmarks[i].ravel().tolist(),
            "world": [0.0] * 63,
        }
        for i in range(2)
    ]
    found = straightened(pa.Table.from_pylist(rows, schema.HANDS), straighten)
    assert found.schema.equals(schema.HANDS) and found["frame"].to_pylist() == [0]
    moved = np.array(found["landmarks"].to_pylist()).reshape(21, 3)
    np.testing.assert_allclose(moved[:, :2], straighten.points(landmarks[0, :, :2]), atol=1e-6)
    np.testing.assert_array_equal(moved[:, 2].astype(np.float32), landmarks[0, :, 2])
    (box,) = found["box"].to_pylist()
    corner = straighten.points(np.array([0.7, 0.7]))
    assert box[2] >= corner[0] - 1e-6 and box[0] < box[2] and box[1] < box[3]
    assert (moved[:, :2] >= np.array(box[:2]) - 1e-6).all() and (
        moved[:, :2] <= np.array(box[2:]) + 1e-6
    ).all()
