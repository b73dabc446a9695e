"""The main job from end to end, on good, odd and bad video. Hands have tests of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ego2robot import config, pipeline
from ego2robot.errors import UserError
from ego2robot.jobs.verify import verify
from tests import crashing, menagerie
from tests.footage import textured_frame, write_video

# No hand is in test footage; every clip with motion survives, so that later stages have work.
BASE = (
    "hands.detector=none",
    "gate.min_motion=0.001",
    "clips.duration_s=2",
    "clips.stride_s=2",
    "frames.height=90",
    "frames.width=160",
    "embed.videomae.weights=none",
    "embed.clip.weights=none",
    "skills.projections=[tsne]",
    "export.codec=h264",
    "workers=2",
)


def recipe(source, run_dir, *more):
    return config.load("folder", [*BASE, f"source.path={source}", f"run_dir={run_dir}", *more])


def command(source, run_dir, *more):
    args = [*BASE, f"source.path={source}", f"run_dir={run_dir}", *more]
    return [sys.executable, "-m", "ego2robot.cli", "run", "folder", *args]


def rows(run, table="clips"):
    """The rows of a table in an order that does not depend on who wrote them."""
    found = run.table(table)
    return found.sort_by([(found.column_names[0], "ascending")]).to_pylist() if found.num_rows else []


def still(index, width, height):
    return textured_frame(7, width, height)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Good and bad videos in one folder, and the outcome of running over them."""
    folder = tmp_path_factory.mktemp("world")
    source = folder / "videos"
    source.mkdir()
    good = menagerie.good(source)
    bad = menagerie.bad(source)
    menagerie.cut_in_the_middle(source)
    shutil.copy(source / "plain.mp4", source / "plain_copy.mp4")
    write_video(source / "still.mp4", n_frames=120, picture=still)
    told = []
    outcome = pipeline.run(recipe(source, folder / "run"), tell=told.append)
    return outcome, good, bad, told


def test_good_and_odd_videos_are_used_and_everything_adds_up(world):
    outcome, good, _, _ = world
    verdict = verify(outcome.run)
    assert verdict.ok, verdict.problems
    assert verdict.left == 0 and verdict.planned == verdict.kept + verdict.dropped + verdict.failed
    kept = {row["name"] for row in rows(outcome.run) if row["decision"] == "kept"}
    assert set(good) <= kept


def test_each_bad_video_has_one_clear_line_and_a_row_in_quarantine(world):
    outcome, _, bad, told = world
    found = {row["name"]: row for row in rows(outcome.run, "quarantine")}
    for name, kind in bad.items():
        row = next(r for n, r in found.items() if n.endswith(name))
        assert row["error_class"] == kind, (name, row)
        lines = [line for line in told if name in line]
        assert len(lines) == 1 and "\n" not in lines[0] and len(lines[0]) > len(name) + 10, lines
    assert found["plain_copy.mp4"]["error_class"] == "duplicate"
    assert "plain.mp4" in found["plain_copy.mp4"]["message"]


def test_a_video_cut_in_the_middle_keeps_its_whole_clips_and_fails_the_others(world):
    outcome, *_ = world
    cut = [row for row in rows(outcome.run) if row["name"] == "cut.mp4"]
    cut.sort(key=lambda row: row["start_s"])
    assert len(cut) == 10
    decisions = [row["decision"] for row in cut]
    n = decisions.index("failed")
    assert 3 <= n <= 7 and decisions == ["kept"] * n + ["failed"] * (10 - n)
    assert all("ends before" in row["reason"] or "corrupt" in row["reason"] for row in cut[n:])
    assert any(row["name"] == "cut.mp4" for row in rows(outcome.run, "quarantine"))


def test_a_still_video_is_dropped_with_the_reason(world):
    outcome, *_ = world
    dropped = [row for row in rows(outcome.run) if row["name"] == "still.mp4"]
    assert dropped and all(row["decision"] == "dropped" for row in dropped)
    assert {row["reason"] for row in dropped} == {"motion below 0.001"}
    assert all(row["motion"] < 0.001 for row in dropped)


def test_the_dataset_and_the_report_are_there(world):
    outcome, *_ = world
    info = json.loads((outcome.run.path / "dataset" / "meta" / "info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["total_episodes"] == outcome.export.episodes > 0
    page = outcome.report.read_text()
    assert "cut.mp4" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_a_second_run_does_nothing_and_another_configuration_is_refused(world):
    outcome, *_ = world
    source = outcome.run.config.source.path
    before = {p: p.stat().st_mtime_ns for p in (outcome.run.path / "clips").iterdir()}
    pipeline.run(recipe(source, outcome.run.path, "workers=1"))
    assert {p: p.stat().st_mtime_ns for p in (outcome.run.path / "clips").iterdir()} == before
    with pytest.raises(UserError, match=r"clips\.stride_s"):
        pipeline.run(recipe(source, outcome.run.path, "clips.stride_s=9"))


# -- determinism, interruption, crashes -----------------------------------------------------------


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("footage")
    for i in range(4):
        write_video(folder / f"{i}.mp4", n_frames=300 + 30 * i, gop=15 * (i + 1))
    return folder


@pytest.fixture(scope="module")
def clean(footage, tmp_path_factory):
    return pipeline.run(recipe(footage, tmp_path_factory.mktemp("clean") / "r", "workers=1")).run


def test_rows_depend_neither_on_workers_nor_on_file_names(footage, clean, tmp_path):
    renamed = tmp_path / "other"
    renamed.mkdir()
    for i, path in enumerate(sorted(footage.iterdir())):
        shutil.copy(path, renamed / f"{9 - i}.mp4")
    other = pipeline.run(recipe(renamed, tmp_path / "r", "workers=3")).run
    for ours, theirs in zip(rows(other), rows(clean), strict=True):
        assert {**ours, "name": ""} == {**theirs, "name": ""}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_rows(footage, clean, tmp_path, how):
    many = tmp_path / "many"
    many.mkdir()
    for path in footage.iterdir():
        shutil.copy(path, many)
    run_dir = tmp_path / "r"
    process = subprocess.Popen(
        command(many, run_dir, "workers=1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (run_dir / "plan" / "gate.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(2.0)  # somewhere in the middle
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been faster than us
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how], (
            errors
        )
        if how != signal.SIGKILL:
            assert "same command again" in errors.splitlines()[-1] and "Traceback" not in errors
    done = subprocess.run(command(many, run_dir), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    from ego2robot.store.rundir import RunDir

    run = RunDir.open(run_dir)
    assert verify(run).ok, verify(run).problems
    assert rows(run) == rows(clean)
    assert not list(run_dir.glob("**/.tmp-*"))


def test_a_decoder_that_crashes_its_process_costs_one_video(footage, clean, tmp_path, monkeypatch):
    source = tmp_path / "videos"
    source.mkdir()
    for path in footage.iterdir():
        shutil.copy(path, source / ("crash.mp4" if path.name == "2.mp4" else path.name))
    monkeypatch.setattr(pipeline, "scoring", crashing.scoring)
    told = []
    run = pipeline.run(recipe(source, tmp_path / "r"), tell=told.append).run
    assert verify(run).ok, verify(run).problems
    found = {row["clip_id"]: row for row in rows(run)}
    for row in rows(clean):
        if row["name"] != "2.mp4":
            assert found[row["clip_id"]] == row
    crashed = sorted((r for r in found.values() if r["name"] == "crash.mp4"), key=lambda r: r["start_s"])
    assert [r["decision"] for r in crashed] == ["kept"] + ["failed"] * (len(crashed) - 1)
    (refused,) = rows(run, "quarantine")
    assert (refused["error_class"], refused["attempts"]) == ("crash", 2) and "SIGSEGV" in refused["message"]
    assert any("crash.mp4" in line and "SIGSEGV" in line for line in told)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(footage, clean, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        done = subprocess.run(
            command(footage, mount / "r"), capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 2, done.stderr
        assert "no space left" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        again = subprocess.run(
            command(footage, mount / "r"), capture_output=True, text=True, timeout=240, check=False
        )
        assert again.returncode == 0, again.stderr
        from ego2robot.store.rundir import RunDir

        run = RunDir.open(mount / "r")
        assert verify(run).ok and rows(run) == rows(clean)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# -- gates and ends -------------------------------------------------------------------------------


def test_a_quantile_gate_keeps_its_share(footage, tmp_path):
    run = pipeline.run(recipe(footage, tmp_path / "r", "gate.min_motion={quantile: 0.5}")).run
    motion = np.array(run.table("clips")["motion"].to_pylist(), np.float32)
    gate = run.read_json("plan/gate.json")
    assert gate["calibrated_on"] == len(motion)
    kept = pc.sum(pc.equal(run.table("clips")["decision"], "kept")).as_py()
    assert kept == (motion >= np.float32(gate["min_motion"])).sum()
    assert abs(kept / len(motion) - 0.5) <= 0.5 / len(motion) + 1e-9


def test_nothing_survives_is_a_valid_empty_dataset_and_exit_0(footage, tmp_path):
    done = subprocess.run(
        command(footage, tmp_path / "r", "gate.min_motion=1"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" in done.stderr and "Traceback" not in done.stderr
    info = json.loads((tmp_path / "r" / "dataset" / "meta" / "info.json").read_text())
    assert info["total_episodes"] == 0
    assert (tmp_path / "r" / "report.html").is_file()


def test_fewer_survivors_than_skills_is_a_warning(tmp_path):
    write_video(tmp_path / "a.mp4", n_frames=120)
    weights = "embed.videomae.weights=random"
    outcome = pipeline.run(recipe(tmp_path / "a.mp4", tmp_path / "r", weights, "embed.videomae.batch_size=1"))
    assert outcome.run.skills()["k"] == 2 and outcome.run.skills()["random"]
    assert any("fewer" in w or "k=" in w for w in outcome.warnings), outcome.warnings
    assert "random" in outcome.report.read_text().lower()
    assert verify(outcome.run).ok


def test_only_bad_videos_is_an_error_that_names_them(tmp_path):
    (tmp_path / "zero.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"no usable video \(zero.mp4: .*0 bytes"):
        pipeline.run(recipe(tmp_path, tmp_path / "r"))


def test_a_mistyped_path_or_an_unusable_source_can_be_mended_in_the_same_run_directory(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    (source / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="no such file or folder"):
        pipeline.run(recipe(tmp_path / "vidoes", tmp_path / "r"))
    with pytest.raises(UserError, match="no usable video"):
        pipeline.run(recipe(source, tmp_path / "r"))
    write_video(source / "a.mp4", n_frames=120)
    run = pipeline.run(recipe(source, tmp_path / "r")).run
    assert verify(run).ok, verify(run).problems
    assert verify(run).kept == 2 and rows(run, "quarantine") == []
    with pytest.raises(UserError, match="another configuration"):
        pipeline.run(recipe(tmp_path, tmp_path / "r"))


def test_tars_are_read_in_place(footage, clean, tmp_path):
    worker = tmp_path / "factory_001" / "workers" / "worker_001"
    worker.mkdir(parents=True)
    with tarfile.open(worker / "part00.tar", "w") as tar:
        for i, path in enumerate(sorted(footage.iterdir())):
            tar.add(path, f"factory001_worker001_{i:05d}.mp4")
    run = pipeline.run(recipe(tmp_path, tmp_path / "r", "source.kind=egocentric10k")).run
    assert verify(run).ok
    same = ("clip_id", "motion", "decision", "start_s", "end_s")
    for ours, theirs in zip(rows(run), rows(clean), strict=True):
        assert [ours[key] for key in same] == [theirs[key] for key in same]
    assert {dict(row["meta"])["worker_id"] for row in rows(run)} == {"worker_001"}
    assert [row["error_class"] for row in rows(run, "quarantine")] == ["metadata"] * 4
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} >= {".tar"}
    assert not list((tmp_path / "r").glob("**/*.tmp"))


def test_two_starts_at_once_do_not_both_work_on_a_run(world):
    outcome, *_ = world
    with outcome.run.alone(), pytest.raises(UserError, match="another process is working"):
        pipeline.run(recipe(outcome.run.config.source.path, outcome.run.path))


def test_the_run_directory_may_lie_inside_the_source(tmp_path):
    write_video(tmp_path / "a.mp4", n_frames=120)
    pipeline.run(recipe(tmp_path, tmp_path / "r"))
    shutil.rmtree(tmp_path / "r" / "plan")
    run = pipeline.run(recipe(tmp_path, tmp_path / "r")).run
    assert set(pa.compute.unique(run.units()["name"]).to_pylist()) == {"a.mp4"}


def test_an_unset_or_impossible_setting_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="run_dir is not set"):
        pipeline.run(config.load("folder", ["source.path=x"]))
    with pytest.raises(UserError, match="no such file or folder"):
        pipeline.run(recipe(tmp_path / "nowhere", tmp_path / "r"))
    if not os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        import torch

        if not torch.cuda.is_available():
            with pytest.raises(UserError, match="torch sees no GPU"):
                pipeline.run(recipe(tmp_path, tmp_path / "r", "device=cuda"))
    assert Path(tmp_path).exists()
