"""What `make demo` promises: gates that agree with the truth, skills that are there, a dataset, a page."""

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_rand_score

from ego2robot.jobs.verify import verify
from ego2robot.sample import load_truths, score_gate, truth_of_clip
from tests.demo import hand_models_missing, run_demo

pytestmark = [
    pytest.mark.skipif(bool(why := hand_models_missing()), reason=why or "hand models are here"),
    pytest.mark.timeout(900),  # makes footage and runs the whole job on it
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return run_demo(folder), load_truths(folder / "footage")


def ego2robot(*args):
    command = [sys.executable, "-m", "ego2robot.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_the_gate_agrees_with_the_truth(demo):
    outcome, truths = demo
    score = score_gate(outcome.run.table("clips"), truths)
    assert score.precision >= 0.95 and score.recall >= 0.95, score.text()
    assert verify(outcome.run).ok, verify(outcome.run).problems


def test_both_gates_drop_something_and_say_why(demo):
    outcome, _ = demo
    rows = outcome.run.table("clips").to_pylist()
    reasons = {row["reason"] for row in rows if row["decision"] == "dropped"}
    assert reasons == {"motion below 0.02", "hand visibility below 0.3"}
    unseen = [r for r in rows if r["reason"] == "motion below 0.02"]
    assert all(row["hand_visibility"] is None for row in unseen)  # the cheap gate spared the detector


def test_hand_motion_finds_the_skills_that_were_drawn(demo):
    outcome, truths = demo
    rows = {row["clip_id"]: row for row in outcome.run.table("clips").to_pylist()}
    assigned = pq.read_table(outcome.run.path / "skills" / "assignment.parquet").to_pylist()
    ours, drawn = [], []
    for row in assigned:
        clip = rows[row["clip_id"]]
        truth = truth_of_clip(truths[clip["name"].removesuffix(".mp4")], clip["start_s"], clip["end_s"])
        if truth["skill"] and truth["shares"].get("manipulating", 0) > 0.99:
            ours.append(row["skill"])
            drawn.append(truth["skill"])
    assert len(set(drawn)) >= 3 and len(ours) >= 8
    assert adjusted_rand_score(drawn, ours) > 0.6


def test_kept_clips_have_landmarks_on_most_frames(demo):
    outcome, _ = demo
    hands = outcome.run.table("hands").to_pylist()
    kept = {
        r["clip_id"]: r["n_frames"] for r in outcome.run.table("clips").to_pylist() if r["decision"] == "kept"
    }
    seen = {clip: len({h["frame"] for h in hands if h["clip_id"] == clip}) / n for clip, n in kept.items()}
    assert np.mean(list(seen.values())) > 0.8
    assert all(len(h["landmarks"]) == 63 and np.isfinite(h["landmarks"]).all() for h in hands)
    assert all(h["time_s"] >= 0 and h["side"] in ("left", "right") for h in hands)


def test_every_command_works_on_the_run(demo, tmp_path):
    outcome, _ = demo
    run = outcome.run.path
    said = ego2robot("verify", run, "--truth", run.parent / "footage")
    assert said.returncode == 0 and re.search(r"precision [01]\.\d+, recall [01]\.\d+", said.stdout), said
    state = json.loads(ego2robot("status", run, "--json").stdout)
    assert state["state"] == "finished" and state["clips"] == state["clips_done"] == 24
    assert "kept" in ego2robot("status", run).stdout
    again = ego2robot("cluster", run, "skills.k=2", "skills.projections=[]")
    assert again.returncode == 0 and "2 skills" in again.stdout, again
    assert outcome.run.skills()["k"] == 2
    out = tmp_path / "two"
    exported = ego2robot(
        "export", "lerobot", run, out, "--top", "2", "--schema", "reference", "--codec", "h264"
    )
    assert exported.returncode == 0, exported
    info = json.loads((out / "meta" / "info.json").read_text())
    assert info["total_episodes"] == 2 and info["features"]["action"]["shape"] == [2]
    page = ego2robot("report", run, tmp_path / "page.html")
    assert page.returncode == 0 and (tmp_path / "page.html").stat().st_size > 50_000
    refused = ego2robot("cluster", run, "clips.stride_s=3")
    assert refused.returncode == 2 and "only skills" in refused.stderr and "Traceback" not in refused.stderr


def test_a_damaged_run_fails_verify_with_exit_1(demo, tmp_path):
    import shutil

    outcome, _ = demo
    copy = tmp_path / "copy"
    shutil.copytree(outcome.run.path, copy)
    part = next((copy / "hands").iterdir())
    part.write_bytes(part.read_bytes()[:-100])
    said = ego2robot("verify", copy)
    assert said.returncode == 1 and "problem: hands/" in said.stdout and "Traceback" not in said.stderr, said


def test_doctor_names_what_is_missing_and_what_to_do():
    said = ego2robot("doctor")
    assert said.returncode == 0 and "Traceback" not in said.stderr
    for name in (
        "python",
        "cuda",
        "pyav",
        "torchcodec",
        "decord",
        "palm_detection_full.tflite",
        "videomae-base",
    ):
        assert name in said.stdout
