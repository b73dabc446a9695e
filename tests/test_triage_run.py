"""Curating with a first look: the same clips are kept, each has one row, and the audit has the last word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ego2robot import config, pipeline
from ego2robot.jobs import triage as jobs
from ego2robot.jobs.verify import verify
from ego2robot.stages import triage
from ego2robot.store.rundir import RunDir
from tests.footage import textured_frame, write_video

BASE = (
    "hands.detector=none",
    "gate.min_motion=0.02",
    "clips.duration_s=2",
    "clips.stride_s=2",
    "frames.height=90",
    "frames.width=160",
    "embed.videomae.weights=none",
    "embed.clip.weights=none",
    "skills.projections=[tsne]",
    "export.enabled=false",
    "workers=1",
)
FPS, CLIPS = 10, 60  # of each video, two seconds each


def moving(video: int) -> np.ndarray:
    """Which clips of a video move: about a quarter, in runs."""
    draw = np.random.default_rng(video)
    return np.repeat(draw.random(CLIPS // 2) < 0.25, 2)


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triage")
    for video in range(3):
        moves = moving(video)

        def picture(index: int, width: int, height: int, moves: np.ndarray = moves) -> np.ndarray:
            return textured_frame(4 * index if moves[index // (2 * FPS)] else 7, width, height)

        n = CLIPS * 2 * FPS
        write_video(folder / f"{video}.mp4", n, 160, 90, fps=FPS, gop=FPS, picture=picture, crf=28)
    return folder


def recipe(source: Path, run_dir: Path, *more: str) -> config.Config:
    looked = ("decode.triage.enabled=true", "decode.triage.calibrate_clips=60", "decode.triage.audit=0.1")
    return config.load("folder", [*BASE, *looked, f"source.path={source}", f"run_dir={run_dir}", *more])


def rows(run: RunDir) -> dict[str, dict]:
    found = {row["clip_id"]: row for row in run.table("clips").to_pylist()}
    assert len(found) == 3 * CLIPS
    return found


@pytest.fixture(scope="module")
def full(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("full") / "r"
    return rows(pipeline.run(recipe(footage, path, "decode.triage.enabled=false")).run)


@pytest.fixture(scope="module")
def looked(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, list[str]]:
    told: list[str] = []
    return pipeline.run(recipe(footage, tmp_path_factory.mktemp("looked") / "r"), tell=told.append).run, told


def test_the_same_clips_are_kept_and_every_clip_has_one_row(
    looked: tuple[RunDir, list[str]], full: dict[str, dict]
) -> None:
    run, told = looked
    assert verify(run).ok, verify(run).problems
    assert verify(run).left == 0
    found = rows(run)
    ruled_out = {clip for clip, row in found.items() if row["reason"] == triage.REASON}
    assert len(ruled_out) >= 0.3 * len(found)
    for clip, row in found.items():
        if clip in ruled_out:
            assert (row["decision"], row["motion"]) == ("dropped", None)
            assert full[clip]["decision"] == "dropped"
        else:
            assert row == full[clip]
    kept = sum(row["decision"] == "kept" for row in full.values())
    assert kept >= triage.MIN_KEPT
    assert any("% of the clips worth keeping were found" in line for line in told)


def test_the_audit_decodes_some_of_what_was_ruled_out(looked: tuple[RunDir, list[str]]) -> None:
    run, _ = looked
    (recall,) = run.read_json("plan/triage.json")["recall"].values()
    found = rows(run)
    out = sum(row["reason"] == triage.REASON for row in found.values())
    assert (recall["ruled_out"], recall["estimate"]) == (out, 1.0)
    assert recall["audited"] >= 3
    assert recall["low"] < 1.0
    assert recall["found"] == sum(row["decision"] == "kept" for row in found.values())


@pytest.mark.slow
def test_rows_depend_neither_on_workers_nor_on_where_it_was_interrupted(
    looked: tuple[RunDir, list[str]], footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = recipe(footage, tmp_path / "r", "workers=2")
    decode = pipeline.score_and_embed
    calls: list[int] = []

    def interrupted(run_dir: RunDir, units: list, *rest: object) -> None:
        """In the middle of the first step, after it, and in the middle of the second."""
        calls.append(len(units))
        stop = len(calls) <= 3
        decode(run_dir, units[: len(units) // 2] if stop and len(calls) != 2 else units, *rest)
        if stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "score_and_embed", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(cfg)
    run = pipeline.run(cfg).run
    assert len(calls) >= 4
    assert verify(run).ok, verify(run).problems
    assert rows(run) == rows(looked[0])
    assert run.read_json("plan/triage.json") == looked[0].read_json("plan/triage.json")


def test_a_rule_that_loses_clips_is_found_out_and_everything_is_decoded(
    full: dict[str, dict], footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = triage.fit

    def greedy(*args: object) -> triage.Rule:
        return replace(honest(*args), off=None, threshold=1e9)  # type: ignore[arg-type]

    monkeypatch.setattr(triage, "fit", greedy)
    told: list[str] = []
    run = pipeline.run(recipe(footage, tmp_path / "r", "decode.triage.audit=0.3"), tell=told.append).run
    assert verify(run).ok, verify(run).problems
    assert rows(run) == full
    assert any("decoded after all" in line for line in told)
    state = run.read_json("plan/triage.json")
    assert list(state["recall"]) == state["refused"]
    assert all(recall["estimate"] < 0.99 for recall in state["recall"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("decode.triage.max_keyframe_gap_s=0.5", "keyframes too far apart"),
        ("decode.triage.calibrate_clips=100", "too few clips"),
    ],
)
def test_where_nothing_can_be_said_everything_is_decoded(
    more: str, says: str, full: dict[str, dict], footage: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    run = pipeline.run(recipe(footage, tmp_path / "r", more), tell=told.append).run
    assert rows(run) == full
    assert any(says in line for line in told), told


def test_units_are_split_without_losing_a_clip(looked: tuple[RunDir, list[str]]) -> None:
    from ego2robot.store.units import units_from_table

    units = units_from_table(looked[0].units())
    ids = [clip.clip_id for unit in units for clip in unit.clips]
    inside, outside = jobs.split(units, ids[::3])
    assert sorted(c.clip_id for unit in inside for c in unit.clips) == sorted(ids[::3])
    assert sorted(c.clip_id for unit in (*inside, *outside) for c in unit.clips) == sorted(ids)
    again = jobs.split([*inside, *outside], ids[::3])
    assert ({u.unit_id for u in again[0]}, {u.unit_id for u in again[1]}) == (
        {u.unit_id for u in inside},
        {u.unit_id for u in outside},
    )
