"""Datasets through the whole job: what they annotate comes out as it was."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ego2robot import config, decode, pipeline
from ego2robot.errors import VideoError
from ego2robot.jobs.verify import verify
from ego2robot.sources import SOURCES
from ego2robot.types import Video
from tests import hot3d_files, lerobot_v3
from tests.footage import write_video

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
