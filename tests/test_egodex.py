import shutil

import h5py
import numpy as np
import pytest
from scipy import ndimage

from ego2robot import config, decode
from ego2robot.decode import policy
from ego2robot.errors import UserError, VideoError
from ego2robot.sources import SOURCES
from ego2robot.sources.egodex import ACTION_NAMES, JOINTS, STATE_NAMES, task_text
from ego2robot.types import FrameSpec, Video
from tests.egodex_files import (
    ATTRIBUTES,
    FPS,
    HEIGHT,
    INTRINSIC,
    TRACKED,
    WIDTH,
    moving,
    write_poses,
    write_recording,
)
from tests.egodex_files import JOINTS as ALL_JOINTS

EGODEX = SOURCES["egodex"]
SMALL = {"drawn": False, "width": 96, "height": 64}
IN = {frame: config.Source(kind="egodex", frame=frame) for frame in ("world", "camera")}


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """A part of two tasks, with everything that goes wrong in the real ones."""
    root = tmp_path_factory.mktemp("egodex") / "part1"
    good = write_recording(root / "cup_shelf", 0, n=12, **SMALL)
    write_recording(root / "cup_shelf", 2, n=8, n_poses=5, seed=1, confident=False, **SMALL)
    write_recording(root / "stack", 10, n=6, seed=2, **SMALL)
    shutil.copy(good.video, root / "cup_shelf" / "3.mp4")  # no poses
    write_poses(root / "cup_shelf" / "4.hdf5", moving(3))  # no video
    for i, damage in enumerate(("cut", "text", "empty")):
        video, data = (root / "stack" / f"{i}.{suffix}" for suffix in ("mp4", "hdf5"))
        shutil.copy(good.video, video)
        whole = good.data.read_bytes()
        data.write_bytes({"cut": whole[: len(whole) // 2], "text": b"not HDF5", "empty": b""}[damage])
    return root, good


def listed(path, options=IN["camera"]):
    found = list(EGODEX.candidates(str(path), None, options))
    return [c for c in found if not isinstance(c, VideoError)], [
        e for e in found if isinstance(e, VideoError)
    ]


def video(recording_or_candidate, root=None):
    candidate = recording_or_candidate
    if root is not None:
        (candidate,) = [c for c in listed(root)[0] if c.blob.path == str(recording_or_candidate.video)]
    info = decode.probe(candidate.name, candidate.blob)
    return Video("0" * 16, candidate.name, "egodex", candidate.blob, candidate.meta, info)


def columns(trajectory, what="state"):
    names = trajectory.state_names if what == "state" else trajectory.action_names
    values = trajectory.state_TD if what == "state" else trajectory.action_TA
    return dict(zip(names, values.T, strict=True))


def points(found, joint):
    return np.stack([found[f"{joint}.{axis}"] for axis in "xyz"], -1)


# -- what there is --------------------------------------------------------------------------------


def test_the_files_that_tests_write_have_all_68_joints():
    assert len(ALL_JOINTS) == len(set(ALL_JOINTS)) == 68
    assert set(JOINTS.values()) == set(TRACKED)


def test_pairs_are_listed_in_order_and_everything_else_is_refused_with_its_reason(part):
    root, _ = part
    found, refused = listed(root)
    assert [c.name for c in found] == ["cup_shelf/0.mp4", "cup_shelf/2.mp4", "stack/10.mp4"]
    assert {e.name: e.kind for e in refused} == {
        "cup_shelf/3.mp4": "missing",
        "cup_shelf/4.hdf5": "missing",
        "stack/0.hdf5": "truncated",
        "stack/1.hdf5": "corrupt",
        "stack/2.hdf5": "empty",
    }
    assert all(e.hint and "\n" not in str(e) for e in refused)
    assert "no video beside it (4.mp4)" in str(refused[1])


@pytest.mark.parametrize(
    "below", [None, "cup_shelf", "cup_shelf/0.mp4", "cup_shelf/0.hdf5", "cup_shelf/0.*", "*/0.hdf5"]
)
def test_a_folder_of_parts_a_task_a_file_or_a_glob_can_be_given(part, below):
    root, good = part
    found, _ = listed(root / below if below else root.parent)
    assert str(good.video) in [c.blob.path for c in found]
    assert len({c.blob.path for c in found}) == len(found)
    assert found[0].meta["part"] == "part1" and found[0].meta["task_name"] == "cup_shelf"


def test_a_path_without_such_files_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no EgoDex files there"):
        list(EGODEX.candidates(str(tmp_path), None))
    with pytest.raises(UserError, match="no such file"):
        list(EGODEX.candidates(str(tmp_path / "gone"), None))


def test_the_fields_of_a_recording_come_along(part):
    meta = listed(part[0])[0][0].meta
    assert meta["task"] == ATTRIBUTES["llm_description"] and meta["poses"] == "12"
    assert meta["llm_verbs"] == "pick, put" and meta["environment"] == "kitchen table"
    assert '"fx": 736.63' in meta["intrinsics"] and '"model": "pinhole"' in meta["intrinsics"]


@pytest.mark.parametrize(
    ("changed", "text", "origin"),
    [
        ({}, ATTRIBUTES["llm_description"], "llm_description"),
        ({"which_llm_description": "2"}, ATTRIBUTES["llm_description2"], "llm_description2"),
        (
            {"which_llm_description": "2", "llm_type": "reset"},
            ATTRIBUTES["llm_description"],
            "llm_description",
        ),
        ({"which_llm_description": "2", "llm_type": ""}, ATTRIBUTES["llm_description"], "llm_description"),
        ({"llm_description": " "}, "cup shelf", "folder"),
        ({"llm_description": "LLM description unavailable."}, "cup shelf", "folder"),
    ],
)
def test_the_second_description_counts_for_reversible_tasks_only(changed, text, origin):
    assert task_text({**ATTRIBUTES, **changed}, "cup_shelf") == (text, origin)


@pytest.mark.parametrize("which", [2, np.float64(2), b"2", "2"])
def test_which_description_may_be_stored_as_a_number_or_as_text(tmp_path, which):
    write_recording(tmp_path, 0, n=2, attributes={**ATTRIBUTES, "which_llm_description": which}, **SMALL)
    assert listed(tmp_path)[0][0].meta["task"] == ATTRIBUTES["llm_description2"]


# -- poses ----------------------------------------------------------------------------------------


def test_joints_in_the_cameras_frame_lie_in_the_picture_where_they_were_drawn(tmp_path):
    """Decodes the real picture, finds the dots in it, and compares: within a pixel, no joint left over."""
    n = 8
    recording = write_recording(tmp_path / "dots", n=n, seed=3)
    found = video(recording, tmp_path)
    state = columns(EGODEX.trajectory(found, np.arange(n) / FPS, IN["camera"]))
    fx, fy, cx, cy = INTRINSIC[0, 0], INTRINSIC[1, 1], INTRINSIC[0, 2], INTRINSIC[1, 2]
    backend = policy.pick(found.info, "pyav", "cpu")[0]
    spec = FrameSpec(HEIGHT, WIDTH)
    (batch,) = backend.read(found.name, found.blob, found.info, np.arange(n) / FPS, spec, "cpu")
    errors = []
    for i, picture in enumerate(batch.frames_THWC.numpy()):
        bright = picture.mean(-1)
        dots, k = ndimage.label(bright > 150)
        centres = np.array(ndimage.center_of_mass(bright * (dots > 0), dots, range(1, k + 1)))[:, ::-1]
        assert k == len(JOINTS)
        for joint in JOINTS:
            x, y, z = points(state, joint)[i]
            assert z > 0
            errors.append(np.linalg.norm(centres - (fx * x / z + cx, fy * y / z + cy), axis=1).min())
    assert max(errors) < 1


def test_world_poses_are_those_of_the_file(part):
    root, good = part
    found = EGODEX.trajectory(video(good, root), np.arange(12) / FPS, IN["world"])
    state = columns(found)
    with h5py.File(good.data) as file:
        for joint, name in {**JOINTS, "camera": "camera"}.items():
            T = file[f"transforms/{name}"][:]
            assert (points(state, joint) == T[:, :3, 3]).all()
            if joint.endswith(("wrist", "camera")):
                assert (np.stack([state[f"{joint}.r{r}1"] for r in (1, 2, 3)], -1) == T[:, :3, 0]).all()
                assert (np.stack([state[f"{joint}.r{r}2"] for r in (1, 2, 3)], -1) == T[:, :3, 1]).all()
            else:
                assert f"{joint}.r11" not in state
        assert (state["left.wrist.confidence"] == file["confidences/leftHand"][:]).all()
    assert found.state_names == STATE_NAMES and found.action_names == ACTION_NAMES
    assert "metres" in found.units


def test_the_camera_frame_and_the_world_are_one_transform_apart_which_the_state_holds(part):
    root, good = part
    times = np.arange(12) / FPS
    world, camera = (columns(EGODEX.trajectory(video(good, root), times, IN[f])) for f in ("world", "camera"))
    for i in range(12):
        T_world_camera = good.transforms["camera"][i].astype(float)
        for joint in JOINTS:
            seen = np.append(points(camera, joint)[i], 1)
            np.testing.assert_allclose((T_world_camera @ seen)[:3], points(world, joint)[i], atol=1e-5)
    assert (points(world, "camera") == points(camera, "camera")).all()


def test_an_action_is_the_next_pose_seen_by_the_camera_of_its_own_step(part):
    root, good = part
    times = np.arange(0, 12, 3) / FPS
    world = EGODEX.trajectory(video(good, root), times, IN["world"])
    state, action = columns(world), columns(world, "action")
    for name in ACTION_NAMES:
        assert (action[name][:-1] == state[name][1:]).all() and action[name][-1] == state[name][-1]
    action = columns(EGODEX.trajectory(video(good, root), times, IN["camera"]), "action")
    for step, (now, then) in enumerate([(0, 3), (3, 6), (6, 9), (9, 9)]):
        T_camera_world = np.linalg.inv(good.transforms["camera"][now].astype(float))
        for joint, name in {**JOINTS, "camera": "camera"}.items():
            expected = T_camera_world @ good.transforms[name][then]
            np.testing.assert_allclose(points(action, joint)[step], expected[:3, 3], atol=1e-5)


def test_between_frames_poses_are_interpolated(part):
    root, good = part
    state = columns(EGODEX.trajectory(video(good, root), np.array([2.5, 3.25]) / FPS, IN["world"]))
    at = good.transforms["leftHand"][:, :3, 3].astype(float)
    expected = [(at[2] + at[3]) / 2, 0.75 * at[3] + 0.25 * at[4]]
    np.testing.assert_allclose(points(state, "left.wrist"), expected, atol=1e-6)


def test_fewer_poses_than_frames_are_nan_after_the_last_and_more_are_left_alone(part, tmp_path):
    root, _ = part
    short = next(c for c in listed(root)[0] if c.name == "cup_shelf/2.mp4")  # 8 frames, 5 poses
    state = columns(EGODEX.trajectory(video(short), np.arange(8) / FPS, IN["world"]))
    assert np.isfinite(state["right.wrist.x"][:5]).all() and np.isnan(state["right.wrist.x"][5:]).all()
    assert np.isnan(state["right.wrist.confidence"]).all()  # the file has none
    long = write_recording(tmp_path, 0, n=3, n_poses=9, **SMALL)
    state = columns(EGODEX.trajectory(video(long, tmp_path), np.arange(3) / FPS, IN["world"]))
    assert (state["right.wrist.x"] == long.transforms["rightHand"][:3, 0, 3]).all()


def test_what_is_no_pose_is_nan_alone(tmp_path):
    recording = write_recording(tmp_path, 0, n=5, **SMALL)
    with h5py.File(recording.data, "r+") as file:
        file["transforms/leftHand"][1] = 0
        file["transforms/leftHand"][2] = np.nan
        file["transforms/rightHand"][3, :3, :3] *= 2
        del file["transforms/leftThumbTip"]
        del file["camera/intrinsic"]
    (candidate,), refused = listed(tmp_path)
    assert not refused and candidate.problem.kind == "metadata"
    assert "transforms/leftThumbTip, camera/intrinsic" in candidate.problem.cause
    state = columns(EGODEX.trajectory(video(candidate), np.arange(5) / FPS, IN["camera"]))
    assert np.isnan(state["left.wrist.x"]).tolist() == [False, True, True, False, False]
    assert np.isnan(state["right.wrist.z"]).tolist() == [False, False, False, True, False]
    assert np.isnan(state["left.thumb_tip.y"]).all()
    assert np.isfinite(state["left.index_tip.y"]).all()


def test_no_times_give_no_rows(part):
    root, good = part
    found = EGODEX.trajectory(video(good, root), np.zeros(0), IN["camera"])
    assert found.state_TD.shape == (0, len(STATE_NAMES)) and found.action_TA.shape == (0, len(ACTION_NAMES))


# -- hostile files --------------------------------------------------------------------------------


def _external_link(file, _):
    file["transforms/leftHand"] = h5py.ExternalLink("secret.hdf5", "/transforms/leftHand")


def _soft_link(file, _):
    file["transforms/leftHand"] = h5py.SoftLink("/transforms/rightHand")


def _external_data(file, folder):
    (folder / "secret.bin").write_bytes(bytes(5 * 64))
    where = [(str(folder / "secret.bin"), 0, 5 * 64)]
    file.create_dataset("transforms/leftHand", (5, 4, 4), "f4", external=where)


def _virtual(file, folder):
    layout = h5py.VirtualLayout((5, 4, 4), "f4")
    layout[:] = h5py.VirtualSource(folder / "secret.hdf5", "transforms/leftHand", (5, 4, 4))
    file.create_virtual_dataset("transforms/leftHand", layout)


def _huge(file, _):
    file.create_dataset("transforms/leftHand", (1 << 40, 4, 4), "f4", chunks=(1 << 22, 4, 4))


def _huge_shape(file, _):
    file.create_dataset("transforms/leftHand", (5, 1 << 30, 4), "f4", chunks=(1, 64, 4))


def _group(file, _):
    file.create_group("transforms/leftHand")


def _words(file, _):
    file["transforms/leftHand"] = ["a"] * 5


def _references(file, _):
    file["transforms/leftHand"] = np.array([file.ref] * 5, h5py.ref_dtype)


@pytest.mark.parametrize(
    "damage",
    [
        _external_link, _soft_link, _external_data, _virtual, _huge, _huge_shape, _group, _words, _references,
    ],
)  # fmt: skip
def test_nothing_is_read_from_elsewhere_and_nothing_huge(tmp_path, damage):
    folder = tmp_path / "task"
    recording = write_recording(folder, 0, n=5, **SMALL)
    write_poses(folder / ".secret" / "secret.hdf5", moving(5))
    shutil.move(folder / ".secret" / "secret.hdf5", folder / "secret.hdf5")
    with h5py.File(recording.data, "r+") as file:
        del file["transforms/leftHand"]
        damage(file, folder)
    found, refused = listed(folder)
    mine = [e for e in refused if e.name == "0.hdf5"]
    if found:  # of a shape that only reading it refuses
        with pytest.raises(VideoError) as caught:
            EGODEX.trajectory(video(found[0]), np.arange(5) / FPS, IN["world"])
        mine = [caught.value]
    assert [e.kind for e in mine] == ["corrupt"] and "transforms/leftHand" in mine[0].cause


def test_odd_attributes_are_left_out_or_decoded(tmp_path):
    recording = write_recording(tmp_path, 0, n=2, **SMALL)
    with h5py.File(recording.data, "r+") as file:
        file.attrs["object"] = file.ref
        file.attrs["environment"] = h5py.Empty("f")
        file.attrs["session_name"] = np.bytes_(b"caf\xe9\xff")
        file.attrs["llm_objects"] = np.array([(1, 2.0)], [("a", "i4"), ("b", "f4")])
        file.attrs.create("llm_description", "x" * 20_000, dtype=h5py.string_dtype())
    (candidate,), _ = listed(tmp_path)
    assert not {"object", "environment", "llm_objects"} & candidate.meta.keys()
    assert candidate.meta["session_name"] == "caf\ufffd\ufffd"
    assert candidate.meta["task"] == "x" * 10_000
    assert all(text.encode() for text in candidate.meta.values())


def test_poses_that_vanish_between_plan_and_use_cost_that_video_alone(tmp_path):
    recording = write_recording(tmp_path, 0, n=2, **SMALL)
    found = video(recording, tmp_path)
    recording.data.unlink()
    with pytest.raises(VideoError, match=r"0\.hdf5: No such file") as caught:
        EGODEX.trajectory(found, np.zeros(1), IN["world"])
    assert caught.value.kind == "missing"


def test_without_h5py_the_extra_is_named(part, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UserError, match=r"ego2robot\[egodex\]"):
        listed(part[0])


def test_the_recipe_takes_whole_videos_as_clips():
    recipe = config.load("egodex")
    assert recipe.source.kind == "egodex" and recipe.clips.policy == "whole"
