"""Datasets through the whole job: what they annotate comes out as it was."""

import json

import av
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from ego2robot import config, decode, pipeline
from ego2robot.errors import VideoError
from ego2robot.jobs.verify import verify
from ego2robot.sources import SOURCES
from ego2robot.types import Video
from tests import egodex_files, hot3d_files, lerobot_v3
from tests.footage import frame_number, write_video

BASE = (
    "hands.detector=none",
    "gate.min_motion=0",
    "gate.min_hand_visibility=0",
    "embed.videomae.weights=none",
    "embed.clip.weights=none",
    "embed.hand_motion=false",
    "export.codec=h264",
    "workers=1",
)


def run(kind, source, folder, *more):
    recipe = config.load(kind, [*BASE, f"source.path={source}", f"run_dir={folder}", *more])
    outcome = pipeline.run(recipe, tell=lambda _: None)
    assert not verify(outcome.run).problems
    return outcome


def episodes(root):
    """By length: state, action and task of the episodes of a LeRobot dataset, as the source reads them."""
    source, found = SOURCES["lerobot"], {}
    for candidate in source.candidates(str(root), None, config.Source(kind="lerobot")):
        assert not isinstance(candidate, VideoError), candidate
        info = decode.probe(candidate.name, candidate.blob)
        video = Video("0" * 16, candidate.name, "lerobot", candidate.blob, candidate.meta, info)
        for span in candidate.spans:
            n = int(span.meta["length"])
            times = span.start_s + np.arange(n) / float(candidate.meta["dataset_fps"])
            values = source.trajectory(video, times)
            found[n] = (values, span.meta.get("task"))
    return found


TURNS = tuple(f"r{row}{column}" for column in (1, 2) for row in (1, 2, 3))


def test_a_lerobot_dataset_that_is_curated_again_keeps_every_value(tmp_path):
    written = lerobot_v3.write(tmp_path / "set", size=(96, 64))
    size = ("frames.height=64", "frames.width=96", f"clips.sample_fps={lerobot_v3.FPS}")
    run("lerobot", written.root, tmp_path / "run", *size)
    before, after = episodes(written.root), episodes(tmp_path / "run" / "dataset")
    assert sorted(after) == sorted(len(state) for state in written.state)
    for e, state in enumerate(written.state):
        values, task = after[len(state)]
        assert values.state_TD.tobytes() == state.tobytes()
        assert values.action_TA.tobytes() == written.action[e].tobytes()
        assert task == before[len(state)][1] == "; ".join(written.tasks[e])
        assert values.state_names == tuple(lerobot_v3.NAMES) and values.action_names == ("left", "right")
    rows = pq.read_table(next((tmp_path / "run" / "dataset" / "data").rglob("*.parquet"))).to_pydict()
    stamps = {
        e: [t for t, i in zip(rows["timestamp"], rows["episode_index"], strict=True) if i == e]
        for e in range(4)
    }
    for state in stamps.values():
        assert (
            np.array(state, np.float32).tobytes()
            == (np.arange(len(state)) / lerobot_v3.FPS).astype(np.float32).tobytes()
        )


def test_clips_of_hot3d_become_episodes_with_their_poses(tmp_path):
    step = 33_333_333
    for k in range(2):
        stamps = [10**12 + (1000 * k + i) * step for i in range(30)]
        members = hot3d_files.clip_members(stamps)
        hot3d_files.write_tar(tmp_path / "train_aria" / f"clip-{k:06d}.tar", members)
    (tmp_path / "train_aria" / "clip-000002.tar").write_bytes(b"not a tar")
    size = ("frames.height=144", "frames.width=140", "clips.duration_s=1", "clips.min_frames=5")
    outcome = run("hot3d", tmp_path / "train_aria", tmp_path / "run", *size, "source.frame=world")
    clips = outcome.run.table("clips").to_pylist()
    assert len(clips) == 2 and all(clip["decision"] == "kept" for clip in clips)
    refused = outcome.run.table("quarantine").to_pylist()
    assert [row["name"] for row in refused] == ["clip-000002.tar"]
    info = json.loads((tmp_path / "run" / "dataset" / "meta" / "info.json").read_text())
    names = info["features"]["observation.state"]["names"]
    data = pq.read_table(next((tmp_path / "run" / "dataset" / "data").rglob("*.parquet"))).to_pydict()
    # The pose is that of the picture which is on screen at the time, not of the time itself.
    shown = np.floor(np.array(data["timestamp"], float) / (step / 1e9) + 1e-3) * step / 1e9
    for prefix, pose in (("left.mano", lambda s: hot3d_files.mano("left", s)[1]), ("camera", camera_at)):
        at = names.index(f"{prefix}.x")
        expected = [pose(s)[:3, 3] for s in shown]
        found = np.array(data["observation.state"])[:, at : at + 3]
        assert found == pytest.approx(np.array(expected), abs=1e-5)
    assert info["features"]["action"]["names"][0] == "camera.x"


def camera_at(s):
    return hot3d_files.headset(s) @ hot3d_files.T_DEVICE_CAMERA


EGODEX = {
    f"{side}.{ours}": side + theirs
    for side in ("left", "right")
    for ours, theirs in (
        ("wrist", "Hand"),
        ("thumb_tip", "ThumbTip"),
        ("index_tip", "IndexFingerTip"),
        ("middle_tip", "MiddleFingerTip"),
        ("ring_tip", "RingFingerTip"),
        ("little_tip", "LittleFingerTip"),
    )
}


def column(T, axis):
    """A number of each pose [T, 4, 4]: ``x`` to ``z``, or ``r<row><column>`` of the rotation."""
    row, at = ("xyz".index(axis), 3) if axis in "xyz" else (int(axis[1]) - 1, int(axis[2]) - 1)
    return T[:, row, at]


@pytest.mark.parametrize("frame", ["camera", "world"])
def test_recordings_of_egodex_become_episodes_with_the_numbers_of_their_hdf5(tmp_path, frame):
    """By hand from the file, for the very frames that are in the dataset's pictures; what is broken beside
    them is counted and named."""
    task, small = tmp_path / "test" / "cup_shelf", {"drawn": False, "width": 160, "height": 90}
    lengths = (70, 51)
    for i, n in enumerate(lengths):
        egodex_files.write_recording(task, i, n=n, seed=i, **small)
    egodex_files.write_recording(task, 2, n=31, seed=2, **small).data.unlink()
    egodex_files.write_recording(task, 3, n=31, seed=3, **small).video.unlink()
    cut = egodex_files.write_recording(task, 4, n=31, seed=4, **small).data
    cut.write_bytes(cut.read_bytes()[:5000])
    egodex_files.write_recording(task, 5, n=31, seed=5, **small).video.write_bytes(b"no video")
    size = ("frames.height=90", "frames.width=160", f"source.frame={frame}")
    outcome = run("egodex", tmp_path / "test", tmp_path / "run", *size)
    refused = {row["name"]: row["error_class"] for row in outcome.run.table("quarantine").to_pylist()}
    assert refused == {
        "cup_shelf/2.mp4": "missing",
        "cup_shelf/3.hdf5": "missing",
        "cup_shelf/4.hdf5": "truncated",
        "cup_shelf/5.mp4": "not_a_video",
    }
    assert outcome.run.counts("clips") == {"kept": 2} and outcome.export.episodes == 2
    root = outcome.export.path
    info = json.loads((root / "meta" / "info.json").read_text())
    names = {key: info["features"][key]["names"] for key in ("observation.state", "action")}
    assert (len(names["observation.state"]), len(names["action"])) == (69, 57)
    data = pq.read_table(next((root / "data").rglob("*.parquet"))).to_pydict()
    with av.open(str(next((root / "videos").rglob("*.mp4")))) as container:
        pictures = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    shown = [frame_number(picture) for picture in pictures]
    for i, n in enumerate(lengths):
        rows = np.flatnonzero(np.array(data["episode_index"]) == i)
        at = np.arange(0, n, egodex_files.FPS // 6)
        assert [shown[row] - 128 * i for row in rows] == at.tolist()
        state, action = ({name: np.array(data[key], np.float32)[rows, k] for k, name in enumerate(some)}
                         for key, some in names.items())  # fmt: skip
        following = np.append(at[1:], at[-1])
        with h5py.File(task / f"{i}.hdf5") as file:
            camera = file["transforms/camera"][:].astype(float)
            seen_from = np.linalg.inv(camera[at]) if frame == "camera" else np.eye(4)
            for ours, theirs in EGODEX.items():
                joint = file[f"transforms/{theirs}"][:].astype(float)
                assert state.pop(f"{ours}.confidence").tolist() == file[f"confidences/{theirs}"][at].tolist()
                for axis in ("x", "y", "z", *TURNS) if ours.endswith("wrist") else "xyz":
                    now, then = (column(seen_from @ joint[k], axis) for k in (at, following))
                    assert state.pop(f"{ours}.{axis}") == pytest.approx(now, abs=1e-6)
                    assert action.pop(f"{ours}.{axis}") == pytest.approx(then, abs=1e-6)
        for axis in ("x", "y", "z", *TURNS):
            assert state.pop(f"camera.{axis}").tolist() == column(camera[at], axis).tolist()
            then = column(seen_from @ camera[following], axis)
            assert action.pop(f"camera.{axis}") == pytest.approx(then, abs=1e-6)
        assert not state and not action
    assert np.array(data["observation.known"]).min() == 1
    tasks = pq.read_table(root / "meta" / "tasks.parquet").to_pydict()
    assert egodex_files.ATTRIBUTES["llm_description"] in str(tasks)


def test_actions_of_epic_kitchens_become_clips_with_their_narrations(tmp_path):
    root = tmp_path / "EPIC-KITCHENS"
    (root / "P01" / "videos").mkdir(parents=True)
    write_video(root / "P01" / "videos" / "P01_01.MP4", n_frames=150, width=96, height=64, fps=30)
    columns = (
        "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,narration"
    )
    (root / "EPIC_100_train.csv").write_text(
        f"{columns}\n"
        "P01_01_0,P01,P01_01,00:00:00.5,00:00:00.50,00:00:02.50,open door\n"
        "P01_01_1,P01,P01_01,00:00:00.5,00:00:02.00,00:00:04.50,take cup\n"
        "P01_01_2,P01,P01_01,00:00:00.5,00:01:40.00,00:01:50.00,after the end\n"
    )
    outcome = run("epic_kitchens", root, tmp_path / "run", "frames.height=64", "frames.width=96")
    rows = sorted(outcome.run.table("clips").to_pylist(), key=lambda row: row["start_s"])
    tasks = [(row["start_s"], row["end_s"], dict(row["meta"])["task"]) for row in rows]
    assert tasks == [(0.5, 2.5, "open door"), (2.0, 4.5, "take cup")]
    (refused,) = outcome.run.table("quarantine").to_pylist()
    assert refused["error_class"] == "metadata" and "100 to 110 s" in refused["message"]
