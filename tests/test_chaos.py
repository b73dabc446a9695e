"""Runs that are killed, drained, and kept from writing end with the rows of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ego2robot import config, pipeline
from ego2robot.jobs.verify import verify
from ego2robot.store.rundir import RunDir
from tests.footage import write_video

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "hands.detector=none",
    "gate.min_motion=0.001",
    "clips.duration_s=0.5",
    "clips.stride_s=0.5",
    "clips.sample_fps=10",
    "clips.min_frames=3",
    "frames.height=64",
    "frames.width=64",
    "embed.videomae.weights=none",
    "embed.clip.weights=none",
    "export.enabled=false",
    "device=cpu",
    "workers=1",
)


def settings(source: Path, run_dir: Path) -> list[str]:
    return [*SETTINGS, f"source.path={source}", f"run_dir={run_dir}"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "ego2robot.cli", *words]


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    for i in range(30):
        write_video(folder / f"{i:02}.mp4", 60 + i, 64, 64, 20, gop=10)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_soak_in_short(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    script = str(ROOT / "benchmarks" / "soak.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", "20", "--seed", "7", "--scratch", str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1])
def test_a_drained_worker_says_so_and_the_next_one_goes_on(
    footage: Path, tmp_path: Path, how: signal.Signals
) -> None:
    cfg = config.load("folder", settings(footage, tmp_path / "r"))
    pipeline.plan(cfg)
    worker = subprocess.Popen(
        command("work", str(tmp_path / "r"), "--shard", "0/1"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list((tmp_path / "r" / "claims").glob("*-*-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    worker.send_signal(how)
    _, errors = worker.communicate(timeout=300)
    assert worker.returncode == 75, errors
    assert "drained" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not list((tmp_path / "r" / "claims").glob("*"))
    assert not list((tmp_path / "r" / "workers").glob("*"))
    run = pipeline.work(tmp_path / "r")
    verdict = verify(run)
    assert verdict.ok, verdict.problems
    assert verdict.left == 0


def test_a_plan_grows_by_what_is_new_and_nothing_done_is_redone(footage: Path, tmp_path: Path) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.mp4").symlink_to(footage / f"{i:02}.mp4")
    cfg = config.load("folder", settings(source, tmp_path / "r"))
    first = pipeline.plan(cfg)
    assert (first.videos, first.added) == (3, 3)
    before = set(RunDir.open(tmp_path / "r").units()["unit_id"].to_pylist())
    again = pipeline.plan(cfg)
    assert (again.videos, again.added, again.problems) == (3, 0, [])
    (source / "9.mp4").symlink_to(footage / "09.mp4")
    (source / "copy.mp4").symlink_to(footage / "01.mp4")
    (source / "bad.mp4").write_bytes(b"no video")
    grown = pipeline.plan(cfg)
    assert (grown.videos, grown.added) == (4, 1)
    assert {problem.kind for problem in grown.problems} == {"duplicate", "not_a_video"}
    run = RunDir.open(tmp_path / "r")
    assert before < set(run.units()["unit_id"].to_pylist())
    costs = run.units()["cost_s"].to_pylist()
    assert costs == sorted(costs, reverse=True)
    pipeline.plan(cfg)
    refused = RunDir.open(tmp_path / "r").counts("quarantine")
    assert refused == {"duplicate": 1, "not_a_video": 1}


def test_a_read_only_run_directory_is_one_line(footage: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)]
    if subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        pipeline.plan(config.load("folder", settings(footage, mount / "r")))
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        done = subprocess.run(
            command("work", str(mount / "r")), capture_output=True, text=True, timeout=250, check=False,
            cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "read-only file system" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", str(mount)], check=True)
