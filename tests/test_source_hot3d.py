import contextlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ego2robot import config, decode, poses
from ego2robot.decode import vrs
from ego2robot.decode.stills import Stills
from ego2robot.errors import UserError, VideoError
from ego2robot.fisheye624 import CLOCKWISE, camera_of, describe
from ego2robot.sources import SOURCES, hot3d
from ego2robot.types import FrameSpec, Video, VideoInfo
from tests import hot3d_files as files
from tests.hot3d_files import BETAS, OBJECTS, T_DEVICE_CAMERA, clip_members, write_recording, write_tar

HOT3D = SOURCES["hot3d"]
STEP = 33_333_333
DEVICE_0, CODE_0 = 113_585_169_151_000, 56_752_108_188_860  # the two clocks at the first picture, ns
DRIFT = 1 + 2e-5  # time code runs so much faster than the device
N = 60


class Recording:
    """What ``vrs.open_vrs`` gives, of pictures that nobody looks at."""

    times_ns = DEVICE_0 + np.arange(N) * STEP
    timecode = True
    calibrated = True

    def camera(self):
        if not self.calibrated:
            return None
        lens = camera_of(files.PARAMS, files.WIDTH, files.HEIGHT).clockwise()
        return describe(lens, T_DEVICE_CAMERA @ hot3d._turn(), T_device_cpf=np.eye(4).tolist())

    def timecode_ns(self, device_ns):
        if not self.timecode:
            return None
        return CODE_0 + np.round((device_ns - DEVICE_0) * DRIFT).astype(np.int64)

    def close(self):
        pass


@pytest.fixture
def opened(monkeypatch):
    def open_vrs(name, blob):
        if Path(blob.path).read_bytes() != b"VisionRe":
            raise VideoError(name, "damaged VRS", "re-download the file", "corrupt")
        return Recording()

    monkeypatch.setattr(vrs, "open_vrs", open_vrs)
    monkeypatch.setattr(vrs, "camera_reader", lambda: contextlib.nullcontext(vrs.read_camera))
    hot3d._clocks.cache_clear()
    yield Recording
    monkeypatch.setattr(Recording, "timecode", True)


@pytest.fixture
def folder(tmp_path, opened):
    stamps = Recording().timecode_ns(Recording.times_ns)
    folder = write_recording(tmp_path / "P0003_c701bd11", stamps)
    (folder / "recording.vrs").write_bytes(b"VisionRe")
    return folder


def listed(path):
    return list(HOT3D.candidates(str(path), None))


def video_of(candidate, codec="vrs"):
    if codec == "vrs":
        info = VideoInfo(140, 144, 90, 30.0, N / 30, DEVICE_0 / 1e9, N, "vrs", "rgb24", 8)
    else:
        info = decode.probe(candidate.name, candidate.blob)
    return Video("0" * 16, candidate.name, "hot3d", candidate.blob, candidate.meta, info)


def columns(found, prefix, n=9, action=False):
    names = found.action_names if action else found.state_names
    first = names.index(f"{prefix}.x" if n == 9 else f"{prefix}.0")
    return (found.action_TA if action else found.state_TD)[:, first : first + n]


def pose_columns(T):
    return np.concatenate([T[:3, 3], T[:3, 0], T[:3, 1]])


def check(found, seconds, frame):
    """All that is known of a trajectory at ``seconds`` of the annotations' clock."""
    upright = hot3d._turn()
    for t, s in enumerate(seconds):
        T_wc = files.headset(s) @ T_DEVICE_CAMERA @ upright
        T_frame = np.eye(4) if frame == "world" else poses.inverse(T_wc)
        following = seconds[min(t + 1, len(seconds) - 1)]
        assert columns(found, "headset")[t] == pytest.approx(pose_columns(files.headset(s)), abs=1e-5)
        assert columns(found, "camera")[t] == pytest.approx(pose_columns(T_wc), abs=1e-5)
        for side in ("left", "right"):
            wrist = pose_columns(T_frame @ files.wrist(side, s))
            assert columns(found, f"{side}.wrist")[t] == pytest.approx(wrist, abs=1e-5)
            wrist = pose_columns(T_frame @ files.wrist(side, following))
            assert columns(found, f"{side}.wrist", action=True)[t] == pytest.approx(wrist, abs=1e-5)
            thetas, T = files.mano(side, s)
            assert columns(found, f"{side}.mano")[t] == pytest.approx(pose_columns(T), abs=1e-5)
            assert columns(found, f"{side}.mano.pose", 15)[t] == pytest.approx(thetas, abs=1e-5)
            assert columns(found, f"{side}.mano.beta", 10)[t] == pytest.approx(BETAS, abs=1e-6)
        for k, uid in enumerate(sorted(OBJECTS)):
            thing = pose_columns(T_frame @ files.thing(OBJECTS.index(uid), s))
            assert columns(found, f"object.{k}")[t] == pytest.approx(thing, abs=1e-5)
    assert np.isnan(columns(found, "object.5")).all()


@pytest.mark.parametrize("frame", ["camera", "world"])
def test_a_recording_gives_its_annotations_in_the_clock_they_were_written_in(folder, frame):
    (candidate,) = listed(folder.parent)
    assert candidate.problem is None and candidate.name == "P0003_c701bd11/recording.vrs"
    assert candidate.meta["participant_id"] == "P0003"
    assert json.loads(candidate.meta["objects"]) == [str(uid) for uid in sorted(OBJECTS)]
    at = np.arange(0, N, 7) * STEP / 1e9
    found = HOT3D.trajectory(video_of(candidate), at, config.Source(kind="hot3d", frame=frame))
    check(found, at * DRIFT, frame)
    angles = columns(found, "left.joint", 22)
    assert angles == pytest.approx(np.full(angles.shape, 0.1))
    confidence = found.state_TD[:, found.state_names.index("right.wrist.confidence")]
    assert confidence == pytest.approx(np.full(len(at), 0.75))
    assert len(found.state_names) == len(set(found.state_names)) == found.state_TD.shape[1]


def test_a_hand_that_is_not_there_is_unknown_and_so_is_a_long_gap(folder):
    path = folder / "umetrack_hand_pose_trajectory.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[10:20]:
        del row["hand_poses"]["1"]
    del rows[30:40]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    (candidate,) = listed(folder)
    found = HOT3D.trajectory(video_of(candidate), np.array([5, 15, 25, 35, 50]) * STEP / 1e9)
    known = {side: np.isfinite(columns(found, f"{side}.wrist")).all(1).tolist() for side in ("left", "right")}
    assert known == {"left": [True, True, True, False, True], "right": [True, False, True, False, True]}
    assert np.isfinite(columns(found, "right.mano")).all()


def test_between_two_annotations_poses_are_interpolated(folder):
    (candidate,) = listed(folder)
    found = HOT3D.trajectory(video_of(candidate), np.array([5.5, 6.25]) * STEP / 1e9)
    expected = files.headset(5.5 * STEP / 1e9 * DRIFT)
    assert columns(found, "headset")[0] == pytest.approx(pose_columns(expected), abs=1e-5)


@pytest.mark.parametrize(
    "gone", ["headset_trajectory.csv", "umetrack_hand_pose_trajectory.jsonl", "dynamic_objects.csv"]
)
def test_a_missing_partner_is_said_and_its_columns_are_unknown(folder, gone):
    (folder / gone).unlink()
    (candidate,) = listed(folder)
    assert gone in str(candidate.problem) and candidate.problem.kind == "metadata"
    found = HOT3D.trajectory(
        video_of(candidate), np.array([0.1, 0.2]), config.Source(kind="hot3d", frame="world")
    )
    unknown = {"headset": "headset", "umetrack": "left.wrist", "dynamic": "object.0"}[gone.split("_")[0]]
    for name in ("headset", "left.wrist", "object.0", "right.mano"):
        assert np.isfinite(columns(found, name)).all() == (name != unknown)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("headset_trajectory.csv", b"", "empty"),
        ("headset_trajectory.csv", b"a,b\n1,2\n", "no column"),
        ("dynamic_objects.csv", b"\xff\xfe\n1", "UTF-8"),
        ("dynamic_objects.csv", b"\0" * 100, "no column"),
        ("metadata.json", b"{", "not JSON"),
        ("metadata.json", b"\xff", "not UTF-8"),
    ],
)
def test_a_broken_partner_is_said_and_the_pictures_are_used(folder, name, data, says):
    (folder / name).write_bytes(data)
    (candidate,) = listed(folder)
    assert name in str(candidate.problem) and says in str(candidate.problem)


def test_absurd_values_are_unknown_and_nothing_else(folder):
    path = folder / "mano_hand_pose_trajectory.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["hand_poses"]["0"]["pose"] = [1.0] * 14
    rows[1]["hand_poses"]["0"]["wrist_xform"]["q_wxyz"] = [0, 0, 0, 0]
    rows[2]["hand_poses"]["0"]["betas"] = "betas"
    rows[3]["hand_poses"] = [3]
    rows[4]["hand_poses"]["0"]["wrist_xform"] = {"t_xyz": [0, None, 0], "q_wxyz": [1, 0, 0, 0]}
    rows[5]["hand_poses"]["0"]["pose"] = [float("nan")] * 15
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"timestamp_ns": 567')
    (candidate,) = listed(folder)
    found = HOT3D.trajectory(video_of(candidate), np.arange(7) * STEP / 1e9)
    unknown = {
        name: np.flatnonzero(np.isnan(columns(found, f"left.{name}", n)).any(1)).tolist()
        for name, n in (("mano", 9), ("mano.pose", 15), ("mano.beta", 10))
    }
    assert unknown == {"mano": [1, 3, 4], "mano.pose": [0, 3, 5], "mano.beta": [2, 3]}
    assert np.isfinite(columns(found, "left.wrist")).all()


def test_a_recording_that_cannot_be_placed_in_time_or_space_is_one_line(folder, opened, monkeypatch):
    (candidate,) = listed(folder)
    monkeypatch.setattr(opened, "timecode", False)
    with pytest.raises(VideoError, match="no time code"):
        HOT3D.trajectory(video_of(candidate), np.array([0.0]))
    monkeypatch.setattr(opened, "timecode", True)
    monkeypatch.setattr(opened, "calibrated", False)
    (candidate,) = listed(folder)
    assert "no calibration" in str(candidate.problem)
    with pytest.raises(VideoError, match="no calibration"):
        HOT3D.trajectory(video_of(candidate), np.array([0.0]))


def test_recordings_that_are_not_whole_are_refused_alone(folder, tmp_path):
    write_recording(tmp_path / "quest", [1, 2], "Quest3")
    (tmp_path / "quest" / "recording.vrs").write_bytes(b"VisionRe")
    write_recording(tmp_path / "without", [1, 2])
    write_recording(tmp_path / "broken", [1, 2])
    (tmp_path / "broken" / "recording.vrs").write_bytes(b"no")
    found = {Path(f.name).parent.name: f for f in listed(tmp_path)}
    assert found["quest"].kind == "unsupported" and "HOT3D-Clips" in str(found["quest"])
    assert found["without"].kind == "missing" and found["broken"].kind == "corrupt"
    assert found["P0003_c701bd11"].problem is None


def test_a_folder_without_any_of_it_is_one_line(tmp_path):
    (tmp_path / "other.csv").write_text("a\n")
    with pytest.raises(UserError, match="no HOT3D there"):
        listed(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("projectaria_tools") is not None, reason="it is installed here")
def test_without_the_package_each_recording_says_what_to_install(tmp_path):
    write_recording(tmp_path / "a", [1, 2])
    (tmp_path / "a" / "recording.vrs").write_bytes(b"VisionRe")
    assert "is not installed" in str(listed(tmp_path)[0])


# -- clips ----------------------------------------------------------------------------------------

CLIP_TIMES = [CODE_0 + i * STEP for i in range(12)]


@pytest.mark.parametrize("frame", ["camera", "world"])
def test_a_clip_gives_what_its_frames_say(tmp_path, frame):
    write_tar(tmp_path / "train_aria" / "clip-000001.tar", clip_members(CLIP_TIMES))
    (candidate,) = listed(tmp_path)
    assert candidate.problem is None and candidate.meta["sequence_id"] == "P0003_c701bd11"
    assert json.loads(candidate.meta["objects"]) == ["1", "2", "3"]
    at = np.array([0, 3, 7, 11]) * STEP / 1e9
    found = HOT3D.trajectory(video_of(candidate, "clip"), at, config.Source(kind="hot3d", frame=frame))
    for k in range(3):  # numbered by the benchmark's short ids here
        T_frame = np.eye(4)
        if frame == "camera":
            T_frame = poses.inverse(files.headset(at[1]) @ T_DEVICE_CAMERA @ hot3d._turn())
        thing = pose_columns(T_frame @ files.thing(k, at[1]))
        assert columns(found, f"object.{k}")[1] == pytest.approx(thing, abs=1e-5)
    for t, s in enumerate(at):
        T_wc = files.headset(s) @ T_DEVICE_CAMERA @ hot3d._turn()
        T_frame = np.eye(4) if frame == "world" else poses.inverse(T_wc)
        assert columns(found, "camera")[t] == pytest.approx(pose_columns(T_wc), abs=1e-5)
        for side in ("left", "right"):
            wrist = pose_columns(T_frame @ files.wrist(side, s))
            assert columns(found, f"{side}.wrist")[t] == pytest.approx(wrist, abs=1e-5)
            thetas, T = files.mano(side, s)
            assert columns(found, f"{side}.mano")[t] == pytest.approx(pose_columns(T), abs=1e-5)
            assert columns(found, f"{side}.mano.pose", 15)[t] == pytest.approx(thetas, abs=1e-5)
            assert columns(found, f"{side}.mano.beta", 10)[t] == pytest.approx(BETAS, abs=1e-6)
    joints = columns(found, "left.joint", 22)
    assert joints[:, :20] == pytest.approx(np.full((4, 20), 0.1)) and np.isnan(joints[:, 20:]).all()


def test_a_point_of_the_camera_frame_lies_where_the_upright_picture_shows_it(tmp_path):
    """The frame of the poses, the intrinsics and the decoded picture belong together, to a pixel."""
    stored = camera_of(files.PARAMS, files.WIDTH, files.HEIGHT)
    T_camera_world = poses.inverse(files.headset(0) @ T_DEVICE_CAMERA)
    u, v = stored.project(poses.transform(T_camera_world, files.wrist("left", 0)[:3, 3]))
    y, x = np.mgrid[: files.HEIGHT, : files.WIDTH]
    dot = np.exp(-((x - u) ** 2 + (y - v) ** 2) / 8)  # drawn into the picture as it is stored
    members = dict(clip_members(CLIP_TIMES[:3]))
    members["000000.image_214-1.jpg"] = files.jpeg((255 * dot).astype(np.uint8)[..., None].repeat(3, 2))
    write_tar(tmp_path / "clip-1.tar", members.items())
    (candidate,) = listed(tmp_path)
    video = video_of(candidate, "clip")
    about = json.loads(candidate.meta["intrinsics"])
    assert (about["image_width"], about["image_height"]) == (video.info.width, video.info.height)
    wrist = columns(HOT3D.trajectory(video, np.array([0.0])), "left.wrist")[0, :3]
    expected = camera_of(about["params"], about["image_width"], about["image_height"]).project(wrist)
    spec = FrameSpec(height=video.info.height, width=video.info.width)
    (batch,) = Stills().read("x", candidate.blob, video.info, np.array([0.0]), spec, "cpu")
    light = batch.frames_THWC[0].numpy().mean(-1)
    light[light < 30] = 0
    rows, columns_ = np.mgrid[: light.shape[0], : light.shape[1]]
    seen = [(light * columns_).sum() / light.sum(), (light * rows).sum() / light.sum()]
    assert seen == pytest.approx(expected.tolist(), abs=0.5)
    assert wrist == pytest.approx(CLOCKWISE @ poses.transform(T_camera_world, files.wrist("left", 0)[:3, 3]))


def test_test_clips_without_annotations_say_so_and_know_the_camera(tmp_path):
    write_tar(tmp_path / "clip-1.tar", clip_members(CLIP_TIMES[:4], annotated=False))
    (candidate,) = listed(tmp_path)
    assert "no hands and no objects" in str(candidate.problem)
    found = HOT3D.trajectory(video_of(candidate, "clip"), np.array([0.0]))
    assert np.isfinite(columns(found, "camera")).all() and np.isnan(columns(found, "left.wrist")).all()


def test_a_matrix_of_the_wrist_is_read_as_the_documentation_has_it(tmp_path):
    members = dict(clip_members(CLIP_TIMES[:2]))
    for name in [n for n in members if n.endswith("hands.json")]:
        hands = json.loads(members[name])
        pose = hands["left"]["umetrack_pose"]
        del pose["T_world_from_wrist"]
        pose["wrist_xform"] = files.wrist("left", 0).tolist()
        hands["right"] = None
        members[name] = json.dumps(hands).encode()
    write_tar(tmp_path / "clip-1.tar", members.items())
    (candidate,) = listed(tmp_path)
    found = HOT3D.trajectory(
        video_of(candidate, "clip"), np.array([0.0]), config.Source(kind="hot3d", frame="world")
    )
    assert columns(found, "left.wrist")[0] == pytest.approx(pose_columns(files.wrist("left", 0)), abs=1e-6)
    assert (
        np.isnan(columns(found, "right.wrist")).all()
        and np.isnan(columns(found, "right.mano.beta", 10)).all()
    )


def test_frames_whose_json_is_broken_are_unknown(tmp_path):
    members = dict(clip_members(CLIP_TIMES))
    members["000005.hands.json"] = b"{"
    members["000006.cameras.json"] = b"[]"
    members["__hand_shapes.json__"] = b"nope"
    write_tar(tmp_path / "clip-1.tar", members.items())
    (candidate,) = listed(tmp_path)
    found = HOT3D.trajectory(
        video_of(candidate, "clip"), np.arange(12) * STEP / 1e9, config.Source(kind="hot3d", frame="world")
    )
    assert np.flatnonzero(np.isnan(columns(found, "left.wrist")).any(1)).tolist() == [5]
    assert np.flatnonzero(np.isnan(columns(found, "camera")).any(1)).tolist() == [6]
    assert np.isnan(columns(found, "left.mano.beta", 10)).all()


@pytest.mark.parametrize(
    ("data", "kind"), [(b"", "empty"), (b"text" * 1000, "not_a_video"), ("foreign", "not_a_video")]
)
def test_a_tar_that_is_no_clip_is_refused_alone(tmp_path, data, kind):
    write_tar(tmp_path / "clip-2.tar", clip_members(CLIP_TIMES[:2]))
    if data == "foreign":
        write_tar(tmp_path / "clip-1.tar", [("../../etc/passwd", b"x")])
    else:
        (tmp_path / "clip-1.tar").write_bytes(data)
    first, second = listed(tmp_path)
    assert isinstance(first, VideoError) and first.kind == kind and second.problem is None
