"""An export under the real lerobot, in an environment of its own: ``make test-lerobot`` has the release that
Python 3.11 can have, ``make test-lerobot-newest`` the newest. And the other way round: what lerobot wrote."""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ego2robot.export import lerobot
from ego2robot.export.files import Limits
from ego2robot.export.lerobot import CodecName, Schema, export_lerobot, export_lerobot_shard
from ego2robot.jobs.claims import Shard
from ego2robot.sources import SOURCES
from ego2robot.store.units import units_from_table
from ego2robot.types import Clip
from tests.demo import hand_models_missing, run_demo
from tests.footage import frame_number, textured_frame, write_video
from tests.test_export_lerobot import CONFIG, HEIGHT, WIDTH, make_run, source_frames
from tests.test_export_scale import Measured
from tests.test_round_trip import episodes
from tests.test_round_trip import run as run_recipe

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("LEROBOT_PYTHON") or ROOT / ".venv-lerobot" / "bin" / "python")
pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: `make test-lerobot` installs lerobot"),
    pytest.mark.slow,
]


def ffmpeg_for_torchcodec(folder: Path) -> Path:
    """A folder of links ``libavutil.so.59`` … to the FFmpeg that PyAV's wheel brings under other names.

    torchcodec has no FFmpeg of its own and looks for one of the system's, which need not be there.
    """
    folder.mkdir()
    for library in (PYTHON.parents[1] / "lib").glob("python*/site-packages/av.libs/lib*-*.so.*"):
        stem, _, version = library.name.partition(".so.")
        (folder / f"{stem.rpartition('-')[0]}.so.{version.partition('.')[0]}").symlink_to(library)
    return folder


def run_lerobot(script: str, home: Path, *arguments: str | Path) -> str:
    """Runs a script of this folder in lerobot's environment; returns what it prints.

    Offline: a dataset that is not complete must fail. ``home`` keeps the user's caches out of it.
    """
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    keep |= {"HOME": str(home), "HF_HOME": str(home / "hub")}
    keep |= {"LD_LIBRARY_PATH": str(ffmpeg_for_torchcodec(home / "lib"))}
    done = subprocess.run(
        [PYTHON, ROOT / "tests" / script, *arguments],
        env={**keep, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def open_with_lerobot(dataset: Path, pictures: Mapping[str, np.ndarray], folder: Path) -> str:
    """What ``lerobot_client.py`` says of an export, given the pictures of its clips."""
    folder.mkdir()
    for clip_id, frames in pictures.items():
        np.save(folder / f"{clip_id}.npy", frames)
    said = run_lerobot("lerobot_client.py", folder, dataset, folder)
    print(said, end="")
    if "torchcodec does not load" in said:
        warnings.warn(said.splitlines()[0], stacklevel=2)
    return said


@pytest.mark.parametrize(
    ("codec", "schema", "limits", "shards"),
    [
        ("av1", "hands", Limits(), 0),
        ("h264", "reference", Limits(chunk_files=2, data_bytes=1, video_bytes=60_000), 0),
        ("h264", "hands", Limits(), 3),
    ],
    ids=["av1-hands-one file", "h264-reference-many files", "h264-hands-shards"],
)
def test_lerobot_reads_every_frame(
    tmp_path: Path,
    codec: CodecName,
    schema: Schema,
    limits: Limits,
    shards: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [
        write_video(tmp_path / "b.mp4", n_frames=240, width=WIDTH, height=HEIGHT),
        write_video(tmp_path / "a.mp4", n_frames=95, width=WIDTH, height=HEIGHT, codec="hevc"),
    ]
    run, units = make_run(tmp_path / "run", paths)
    if shards:
        monkeypatch.setattr(lerobot, "MIN_UNIT_S", 2.0)
    for i in range(shards):
        left = export_lerobot_shard(run, tmp_path / "out", 50, Shard(i, shards), schema, codec, limits=limits)
        assert (left == 0) == (i == shards - 1)
    result = export_lerobot(run, tmp_path / "out", 50, schema, codec, limits=limits)
    assert result.episodes == 6 and not result.skipped
    said = open_with_lerobot(tmp_path / "out", source_frames(run, units), tmp_path / "frames")
    assert f"6 episodes, {result.frames} frames all decoded" in said


def test_lerobot_reads_states_that_the_dataset_itself_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several units, one of whose clips cannot be read, and features with names and units of their own."""
    source = Measured()
    source.broken = "b.mp4"
    monkeypatch.setitem(SOURCES, "folder", source)
    monkeypatch.setattr(lerobot, "MIN_UNIT_S", 2.0)
    paths = [
        write_video(tmp_path / f"{name}.mp4", n_frames=n, width=WIDTH, height=HEIGHT)
        for name, n in (("a", 120), ("b", 60), ("c", 125))
    ]
    run, units = make_run(tmp_path / "run", paths)
    result = lerobot.export_lerobot(run, tmp_path / "out", 50, "native", "h264")
    assert result.episodes == 4 and len(result.skipped) == 1
    assert len(list((tmp_path / "out/videos").rglob("*.mp4"))) == 4
    said = open_with_lerobot(tmp_path / "out", source_frames(run, units), tmp_path / "frames")
    assert "4 episodes, 48 frames all decoded" in said


@pytest.mark.skipif(bool(why := hand_models_missing()), reason=why or "hand models are here")
@pytest.mark.timeout(600)
def test_lerobot_opens_what_the_demo_exports(tmp_path: Path) -> None:
    outcome = run_demo(tmp_path)
    assert outcome.export and outcome.export.episodes >= 10 and not outcome.export.skipped
    pictures = source_frames(outcome.run, units_from_table(outcome.run.units()))
    said = open_with_lerobot(outcome.export.path, pictures, tmp_path / "frames")
    assert f"{outcome.export.episodes} episodes, {outcome.export.frames} frames all decoded" in said


@pytest.mark.timeout(600)
def test_what_lerobot_wrote_is_curated_again_and_keeps_every_value(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    (tmp_path / "episodes").mkdir()
    written: dict[int, dict[str, np.ndarray]] = {}
    for e, n in enumerate((20, 31)):
        written[n] = {
            "frames": np.stack([textured_frame(100 * e + k, 192, 128) for k in range(n)]),
            "state": rng.normal(size=(n, 3)).astype(np.float32),
            "action": rng.normal(size=(n, 2)).astype(np.float32),
            "task": np.array(f"stack cup {e}"),
        }
        np.savez(tmp_path / "episodes" / f"{e}.npz", **written[n])
    (tmp_path / "home").mkdir()
    run_lerobot("lerobot_writer.py", tmp_path / "home", tmp_path / "episodes", tmp_path / "set", "30")
    size = ("frames.height=128", "frames.width=192", "clips.sample_fps=30")
    outcome = run_recipe("lerobot", tmp_path / "set", tmp_path / "run", *size)
    assert outcome.export and outcome.export.episodes == 2
    again = episodes(outcome.export.path)
    assert sorted(again) == sorted(written)
    for n, episode in written.items():
        values, task = again[n]
        assert values.state_TD.tobytes() == episode["state"].tobytes()
        assert values.action_TA.tobytes() == episode["action"].tobytes()
        assert values.state_names == ("state_0", "state_1", "state_2") and task == str(episode["task"])
    pictures = source_frames(outcome.run, units_from_table(outcome.run.units()))
    for frames_THWC in pictures.values():
        numbers = [frame_number(frame) for frame in frames_THWC]
        assert numbers == [numbers[0] + k for k in range(len(frames_THWC))] and numbers[0] in (0, 100)
    said = open_with_lerobot(outcome.export.path, pictures, tmp_path / "frames")
    assert "2 episodes, 51 frames all decoded" in said


def test_lerobot_reads_the_metadata_of_an_empty_export(tmp_path: Path) -> None:
    def dropped(clip: Clip, number: int) -> dict[str, Any]:
        return {"decision": "dropped", "reason": "no hands"}

    path = write_video(tmp_path / "a.mp4", n_frames=60, width=WIDTH, height=HEIGHT)
    run, _ = make_run(tmp_path / "run", [path], CONFIG, dropped)
    export_lerobot(run, tmp_path / "out", 5)
    assert "empty, and valid" in open_with_lerobot(tmp_path / "out", {}, tmp_path / "frames")


def test_the_client_notices_a_wrong_picture(tmp_path: Path) -> None:
    """The check itself is checked: one episode's frames exchanged for another's must not pass."""
    path = write_video(tmp_path / "a.mp4", n_frames=120, width=WIDTH, height=HEIGHT)
    run, units = make_run(tmp_path / "run", [path])
    export_lerobot(run, tmp_path / "out", 5, codec="h264")
    pictures = source_frames(run, units)
    first, second = list(pictures)[:2]
    pictures[first], pictures[second] = pictures[second], pictures[first]
    with pytest.raises(AssertionError, match="PSNR"):
        open_with_lerobot(tmp_path / "out", pictures, tmp_path / "frames")
