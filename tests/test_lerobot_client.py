"""An export under the real lerobot, in an environment of its own (``make test-lerobot``)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ego2robot.export import lerobot
from ego2robot.export.files import Limits
from ego2robot.export.lerobot import CodecName, Schema, export_lerobot
from ego2robot.sources import SOURCES
from ego2robot.store.units import units_from_table
from ego2robot.types import Clip
from tests.demo import hand_models_missing, run_demo
from tests.footage import write_video
from tests.test_export_lerobot import CONFIG, HEIGHT, WIDTH, make_run, source_frames
from tests.test_export_scale import Measured

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


def open_with_lerobot(dataset: Path, frames: Path, *options: str) -> str:
    """Runs ``lerobot_client.py``; returns its line. Offline: a dataset that is not complete must fail."""
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    keep |= {"HOME": str(frames), "HF_HOME": str(frames / "hub")}  # nothing of the user's caches
    keep |= {"LD_LIBRARY_PATH": str(ffmpeg_for_torchcodec(frames / "lib"))}
    done = subprocess.run(
        [PYTHON, ROOT / "tests" / "lerobot_client.py", dataset, frames, *options],
        env={**keep, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("codec", "schema", "limits", "backend"),
    [
        ("av1", "hands", Limits(), "torchcodec"),
        ("h264", "reference", Limits(chunk_files=2, data_bytes=1, video_bytes=60_000), "pyav"),
    ],
    ids=["av1-hands-one file", "h264-reference-many files"],
)
def test_lerobot_reads_every_frame(
    tmp_path: Path, codec: CodecName, schema: Schema, limits: Limits, backend: str
) -> None:
    paths = [
        write_video(tmp_path / "b.mp4", n_frames=240, width=WIDTH, height=HEIGHT),
        write_video(tmp_path / "a.mp4", n_frames=95, width=WIDTH, height=HEIGHT, codec="hevc"),
    ]
    run, units = make_run(tmp_path / "run", paths)
    result = export_lerobot(run, tmp_path / "out", 50, schema, codec, limits=limits)
    assert result.episodes == 6 and not result.skipped
    (tmp_path / "frames").mkdir()
    for clip_id, frames in source_frames(run, units).items():
        np.save(tmp_path / "frames" / f"{clip_id}.npy", frames)
    said = open_with_lerobot(tmp_path / "out", tmp_path / "frames", "--backend", backend)
    assert f"6 episodes, {result.frames} frames all decoded ({backend})" in said


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
    (tmp_path / "frames").mkdir()
    for clip_id, frames in source_frames(run, units).items():
        np.save(tmp_path / "frames" / f"{clip_id}.npy", frames)
    said = open_with_lerobot(tmp_path / "out", tmp_path / "frames", "--backend", "pyav")
    assert "4 episodes, 48 frames all decoded" in said


@pytest.mark.skipif(bool(why := hand_models_missing()), reason=why or "hand models are here")
@pytest.mark.timeout(600)
def test_lerobot_opens_what_the_demo_exports(tmp_path: Path) -> None:
    outcome = run_demo(tmp_path)
    assert outcome.export and outcome.export.episodes >= 10 and not outcome.export.skipped
    (tmp_path / "frames").mkdir()
    units = units_from_table(outcome.run.units())
    for clip_id, frames in source_frames(outcome.run, units).items():
        np.save(tmp_path / "frames" / f"{clip_id}.npy", frames)
    said = open_with_lerobot(outcome.export.path, tmp_path / "frames", "--backend", "torchcodec")
    assert f"{outcome.export.episodes} episodes, {outcome.export.frames} frames all decoded" in said


def test_lerobot_reads_the_metadata_of_an_empty_export(tmp_path: Path) -> None:
    def dropped(clip: Clip, number: int) -> dict[str, Any]:
        return {"decision": "dropped", "reason": "no hands"}

    path = write_video(tmp_path / "a.mp4", n_frames=60, width=WIDTH, height=HEIGHT)
    run, _ = make_run(tmp_path / "run", [path], CONFIG, dropped)
    export_lerobot(run, tmp_path / "out", 5)
    (tmp_path / "frames").mkdir()
    assert "empty, and valid" in open_with_lerobot(tmp_path / "out", tmp_path / "frames")


def test_the_client_notices_a_wrong_picture(tmp_path: Path) -> None:
    """The check itself is checked: one episode's frames exchanged for another's must not pass."""
    path = write_video(tmp_path / "a.mp4", n_frames=120, width=WIDTH, height=HEIGHT)
    run, units = make_run(tmp_path / "run", [path])
    export_lerobot(run, tmp_path / "out", 5, codec="h264")
    (tmp_path / "frames").mkdir()
    frames = source_frames(run, units)
    first, second = list(frames)[:2]
    frames[first], frames[second] = frames[second], frames[first]
    for clip_id, pictures in frames.items():
        np.save(tmp_path / "frames" / f"{clip_id}.npy", pictures)
    with pytest.raises(AssertionError, match="PSNR"):
        open_with_lerobot(tmp_path / "out", tmp_path / "frames")
