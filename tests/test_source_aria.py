import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ego2robot import config, poses
from ego2robot.decode import vrs
from ego2robot.errors import UserError, VideoError
from ego2robot.fisheye624 import camera_of, describe
from ego2robot.sources import SOURCES
from ego2robot.types import Blob, Video, VideoInfo
from tests.hot3d_files import PARAMS, turned

ARIA = SOURCES["aria"]
SAMPLE = Path(__file__).parents[2] / "shared" / "samples" / "aria_8frames.vrs"
here = SAMPLE.exists() and importlib.util.find_spec("projectaria_tools") is not None
needs_sample = pytest.mark.skipif(not here, reason="../shared/samples or projectaria-tools is not here")

START_US = 113_585_169_151  # of the first picture, in the device's clock
T_DEVICE_CAMERA = poses.pose([-0.0046, -0.0117, -0.0049], turned(0.6, (0.6, 0.8, 0)))
T_DEVICE_CPF = poses.pose([0.005, -0.05, -0.05], turned(1.5, (0, 0, 1)))


def device(s):
    return poses.pose([0.3 * s, 1.6, -0.2 * s], turned(0.3 * s))


def wrist(side, s):
    sign = {"left": -1, "right": 1}[side]
    return poses.pose([sign * 0.2, -0.1 + 0.1 * s, 0.4], turned(sign * 0.4 + 0.5 * s, (1, 0, 0)))


def landmark(side, k, s):
    return poses.transform(wrist(side, s), [0.01 * k, 0.02, 0.0])


def table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(x if isinstance(x, str) else repr(x) for x in row) for row in rows]
    path.write_text("\n".join([",".join(header), *lines]) + "\n")
    return path


def numbers(values):
    return [float(v) for v in values]


TRAJECTORY = [
    "graph_uid", "tracking_timestamp_us", "utc_timestamp_ns", "tx_world_device", "ty_world_device",
    "tz_world_device", "qx_world_device", "qy_world_device", "qz_world_device", "qw_world_device",
    "quality_score",
]  # fmt: skip
GAZE = [
    "tracking_timestamp_us", "left_yaw_rads_cpf", "right_yaw_rads_cpf", "pitch_rads_cpf", "depth_m",
    "session_uid",
]  # fmt: skip


def write_trajectory(mps, seconds, graph=lambda s: "a", name="slam/closed_loop_trajectory.csv"):
    rows = []
    for s in seconds:
        T = device(s)
        w, x, y, z = numbers(poses.matrix_to_quat(T[:3, :3]))
        rows.append([graph(s), START_US + round(s * 1e6), 0, *numbers(T[:3, 3]), x, y, z, w, 1.0])
    return table(mps / name, TRAJECTORY, rows)


def write_gaze(mps, seconds, name="eye_gaze/general_eye_gaze.csv"):
    rows = [[START_US + round(s * 1e6), 0.2, 0.4, -0.5, 0.24, "x"] for s in seconds]
    return table(mps / name, GAZE, rows)


def write_hands(mps, seconds, missing=()):
    header = ["tracking_timestamp_us"]
    for side in ("left", "right"):
        header.append(f"{side}_tracking_confidence")
        header += [f"t{a}_{side}_landmark_{k}_device" for k in range(21) for a in "xyz"]
    for side in ("left", "right"):
        header += [f"t{a}_{side}_device_wrist" for a in "xyz"] + [f"q{a}_{side}_device_wrist" for a in "xyzw"]
    rows = []
    for s in seconds:
        row = [START_US + round(s * 1e6)]
        for side in ("left", "right"):
            gone = (side, s) in missing
            row.append(-1 if gone else 0.9)
            for k in range(21):
                row += [0.0] * 3 if gone else numbers(landmark(side, k, s))
        for side in ("left", "right"):
            T = wrist(side, s)
            w, x, y, z = numbers(poses.matrix_to_quat(T[:3, :3]))
            row += [0.0] * 6 + [1.0] if (side, s) in missing else [*numbers(T[:3, 3]), x, y, z, w]
        rows.append(row)
    return table(mps / "hand_tracking" / "hand_tracking_results.csv", header, rows)


def write_wrists(mps, seconds):
    header = ["tracking_timestamp_us"]
    for side in ("left", "right"):
        header += [f"{side}_tracking_confidence"]
        header += [f"t{a}_{side}_{part}_device" for part in ("wrist", "palm") for a in "xyz"]
    rows = []
    for s in seconds:
        row = [START_US + round(s * 1e6)]
        for side in ("left", "right"):
            row += [0.8, *numbers(wrist(side, s)[:3, 3]), *numbers(landmark(side, 20, s))]
        rows.append(row)
    return table(mps / "hand_tracking" / "wrist_and_palm_poses.csv", header, rows)


@pytest.fixture
def recording(tmp_path):
    """A recording without its pictures, and the folder of its MPS results."""
    (tmp_path / "take one.vrs").write_bytes(b"VisionRe")
    camera = describe(camera_of(PARAMS, 144, 140), T_DEVICE_CAMERA, T_device_cpf=T_DEVICE_CPF.tolist())
    info = VideoInfo(140, 144, 90, 20.0, 10.0, START_US / 1e6, 200, "vrs", "rgb24", 8)
    blob = Blob(str(tmp_path / "take one.vrs"), 0, 8)
    video = Video("0" * 16, "take one.vrs", "aria", blob, {"intrinsics": json.dumps(camera)}, info)
    return video, tmp_path / "mps_take one_vrs"


MS = np.arange(0, 2.0005, 0.001)
TENTHS = np.round(np.arange(0, 2.05, 0.1), 1)
AT = np.array([0.1, 0.25, 0.95, 1.0])


def columns(trajectory, prefix, action=False):
    names = trajectory.action_names if action else trajectory.state_names
    keep = [i for i, n in enumerate(names) if n.startswith(prefix + ".") and not n.endswith("confidence")]
    return (trajectory.action_TA if action else trajectory.state_TD)[:, keep]


def pose_columns(T):
    return np.concatenate([T[:3, 3], T[:3, 0], T[:3, 1]])


@pytest.mark.parametrize("frame", ["camera", "world"])
def test_hands_camera_and_gaze_are_given_in_the_frame_that_is_asked_for(recording, frame):
    video, mps = recording
    write_trajectory(mps, MS)
    write_hands(mps, TENTHS)
    write_gaze(mps, TENTHS)
    found = ARIA.trajectory(video, AT, config.Source(kind="aria", frame=frame))
    assert found.state_TD.shape == (4, len(found.state_names)) and found.state_TD.dtype == np.float32
    assert len(set(found.state_names)) == len(found.state_names)
    for t, s in enumerate(AT):
        T_frame = np.eye(4) if frame == "world" else poses.inverse(device(s) @ T_DEVICE_CAMERA)
        following = AT[min(t + 1, 3)]
        assert columns(found, "headset")[t] == pytest.approx(pose_columns(device(s)), abs=1e-5)
        assert columns(found, "camera")[t] == pytest.approx(
            pose_columns(device(s) @ T_DEVICE_CAMERA), abs=1e-5
        )
        for side in ("left", "right"):
            # Tracked ten times a second: the way between two of these is straight, the turn even.
            near = 1e-5 if round(s * 10) == s * 10 else 2e-4
            T = T_frame @ device(s) @ wrist(side, s)
            assert columns(found, f"{side}.wrist")[t] == pytest.approx(pose_columns(T), abs=near)
            tip = poses.transform(T_frame @ device(s), landmark(side, 1, s))
            assert columns(found, f"{side}.index_tip")[t] == pytest.approx(tip, abs=near)
            T = T_frame @ device(following) @ wrist(side, following)
            assert columns(found, f"{side}.wrist", action=True)[t] == pytest.approx(pose_columns(T), abs=2e-4)
        T = T_frame @ device(s) @ T_DEVICE_CPF
        to = np.array([(np.tan(0.2) + np.tan(0.4)) / 2, np.tan(-0.5), 1])
        expected = T[:3, :3] @ to / np.linalg.norm(to)
        assert columns(found, "gaze")[t] == pytest.approx([*expected, 0.24], abs=1e-5)
    assert found.state_names[-4:] == ("gaze.x", "gaze.y", "gaze.z", "gaze.depth")
    assert "metres" in found.units and ("world" in found.units)


def test_what_was_not_measured_is_unknown_and_nothing_else(recording):
    video, mps = recording
    write_trajectory(mps, MS)
    write_hands(mps, TENTHS, missing={("right", 0.3), ("right", 0.2), ("left", 1.0)})
    found = ARIA.trajectory(video, np.array([0.1, 0.25, 0.5, 1.0]))
    right, left = (np.isfinite(columns(found, f"{side}.wrist")).all(1) for side in ("right", "left"))
    assert right.tolist() == [True, False, True, True] and left.tolist() == [True, True, True, False]
    assert np.isnan(columns(found, "gaze")).all()
    confidence = found.state_TD[:, found.state_names.index("right.wrist.confidence")]
    assert confidence[[0, 2]] == pytest.approx([0.9, 0.9]) and np.isnan(confidence[1])
    late = ARIA.trajectory(video, np.array([1.9, 2.4]))
    assert np.isnan(late.state_TD[1]).all() and np.isfinite(columns(late, "camera")[0]).all()


def test_hands_are_known_in_the_camera_where_nobody_knows_where_it_is(recording):
    video, mps = recording
    write_hands(mps, TENTHS)
    found = ARIA.trajectory(video, AT)
    expected = poses.inverse(T_DEVICE_CAMERA) @ wrist("left", 1.0)
    assert columns(found, "left.wrist")[3] == pytest.approx(pose_columns(expected), abs=1e-5)
    assert np.isnan(columns(found, "camera")).all() and np.isnan(found.action_TA).all()
    assert np.isnan(
        ARIA.trajectory(video, AT, config.Source(kind="aria", frame="world")).state_TD[:, :-5]
    ).sum()
    write_trajectory(mps, MS[:500])  # lost after half a second
    found = ARIA.trajectory(video, np.array([0.1, 0.4, 0.9]))
    assert np.isfinite(columns(found, "left.wrist")).all()
    assert np.isfinite(columns(found, "left.wrist", action=True)).all(1).tolist() == [True, False, False]


def test_the_smaller_hand_file_gives_positions_without_rotations(recording):
    video, mps = recording
    write_trajectory(mps, MS)
    write_wrists(mps, TENTHS)
    found = ARIA.trajectory(video, AT)
    T = poses.inverse(T_DEVICE_CAMERA) @ wrist("left", 1.0)
    left = columns(found, "left.wrist")[3]
    assert left[:3] == pytest.approx(T[:3, 3], abs=1e-5) and np.isnan(left[3:]).all()
    palm = poses.transform(poses.inverse(T_DEVICE_CAMERA), landmark("left", 20, 1.0))
    assert columns(found, "left.palm")[3] == pytest.approx(palm, abs=1e-5)


def test_poses_of_two_worlds_are_never_mixed(recording):
    video, mps = recording
    write_trajectory(mps, MS, graph=lambda s: "a" if s < 0.7 else "b")
    found = ARIA.trajectory(video, np.array([0.5, 0.69, 0.71, 0.8, 1.2]))
    assert np.isfinite(columns(found, "camera")).all(1).tolist() == [False, False, True, True, True]


def test_a_single_yaw_and_the_flat_names_of_other_datasets_are_read_too(recording):
    video, mps = recording
    write_trajectory(mps.parent, MS, name="aria_trajectory.csv")
    header = ["tracking_timestamp_us", "yaw_rads_cpf", "pitch_rads_cpf", "depth_m"]
    rows = [[START_US + round(s * 1e6), 0.3, -0.2, ""] for s in TENTHS]
    table(mps.parent / "eyegaze.csv", header, rows)
    found = ARIA.trajectory(video, AT, config.Source(kind="aria", frame="world"))
    to = np.array([np.tan(0.3), np.tan(-0.2), 1])
    T = device(1.0) @ T_DEVICE_CPF
    gaze = columns(found, "gaze")[3]
    assert gaze[:3] == pytest.approx(T[:3, :3] @ to / np.linalg.norm(to), abs=1e-5) and np.isnan(gaze[3])


def test_without_mps_there_is_no_trajectory_and_without_calibration_one_line(recording):
    video, mps = recording
    assert ARIA.trajectory(video, AT) is None
    write_trajectory(mps, MS)
    for meta in ({}, {"intrinsics": "{"}, {"intrinsics": '{"T_device_camera": [[1]]}'}, {"intrinsics": "3"}):
        with pytest.raises(VideoError, match="no calibration"):
            ARIA.trajectory(Video("0", "x", "aria", video.blob, meta, video.info), AT)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"a,b\n1,2\n", "no column"),
        (b"tracking_timestamp_us,\xff\n", "UTF-8"),
        (b"\0" * 99, "no column"),
    ],
)
def test_a_broken_table_is_one_line(recording, data, says):
    video, mps = recording
    path = write_trajectory(mps, MS[:50])
    path.write_bytes(data)
    with pytest.raises(VideoError, match=says) as caught:
        ARIA.trajectory(video, AT)
    assert "closed_loop_trajectory.csv" in str(caught.value)


def test_absurd_rows_are_unknown(recording):
    video, mps = recording
    path = write_trajectory(mps, TENTHS)
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace(lines[3].split(",")[3], "nan")
    lines[7] = ",".join([*lines[7].split(",")[:6], "0", "0", "0", "0", "1.0"])
    lines[12] = lines[12][:40]
    path.write_text("\n".join(lines))
    found = ARIA.trajectory(video, TENTHS[:15])
    known = np.isfinite(columns(found, "camera")).all(1)
    assert np.flatnonzero(~known).tolist() == [2, 6, 11]


def test_without_the_package_the_first_word_is_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(vrs, "missing", lambda: "projectaria-tools is not installed; pip install …")
    with pytest.raises(UserError, match=r"source\.kind=aria: projectaria-tools is not installed"):
        list(ARIA.candidates(str(tmp_path), None))


@needs_sample
def test_recordings_are_listed_with_their_camera_and_what_is_lacking_is_said(tmp_path, capfd):
    shutil.copy(SAMPLE, tmp_path / "a.vrs")
    (tmp_path / "b.vrs").write_bytes(SAMPLE.read_bytes()[:100_000])
    (tmp_path / "c.vrs").write_bytes(b"")
    (tmp_path / "d.vrs").write_bytes(b"no recording at all" * 100)
    write_trajectory(tmp_path / "mps_a_vrs", MS)
    write_hands(tmp_path / "mps_a_vrs", TENTHS).write_text("x,y\n1,2\n")
    found = list(ARIA.candidates(str(tmp_path), None))
    assert [isinstance(f, VideoError) for f in found] == [False, True, True, True]
    assert [f.kind for f in found[1:]] == ["truncated", "truncated", "not_a_video"]
    camera = json.loads(found[0].meta["intrinsics"])
    assert camera["model"] == "fisheye624" and len(camera["params"]) == 15 and camera["image_width"] == 1408
    problem = str(found[0].problem)
    assert "no MPS gaze" in problem and "hand_tracking_results.csv: no column" in problem
    assert capfd.readouterr().err == ""


@needs_sample
def test_the_poses_of_a_real_recording_are_those_of_its_own_clock(tmp_path):
    from ego2robot import decode

    shutil.copy(SAMPLE, tmp_path / "a.vrs")
    (candidate,) = ARIA.candidates(str(tmp_path / "a.vrs"), None)
    info = decode.probe(candidate.name, candidate.blob)
    first_us = 86_385_246
    rows = [
        ["g", first_us + 1000 * i, 0, 0.001 * i, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0] for i in range(-5, 400)
    ]
    table(tmp_path / "mps" / "slam" / "closed_loop_trajectory.csv", TRAJECTORY, rows)
    video = Video("0", candidate.name, "aria", candidate.blob, candidate.meta, info)
    found = ARIA.trajectory(video, np.array([0.0, 0.049971625, 0.3]))
    x = found.state_TD[:, found.state_names.index("headset.x")]
    assert x == pytest.approx([0.0, 0.049971625, 0.3], abs=1e-5)
