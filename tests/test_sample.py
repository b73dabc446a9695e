"""Generated footage: what the truth says is what the pixels show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ego2robot import models
from ego2robot.errors import UserError
from ego2robot.sample import (
    Footage,
    hands_at,
    load_truth,
    load_truths,
    make_footage,
    score_gate,
    truth_of_clip,
)
from ego2robot.sample.acts import SKILLS, Loop, stage
from ego2robot.sample.footage import ROUND, _plan
from ego2robot.sample.hand import HandPose, joints
from ego2robot.sample.scene import Camera

CODECS = ("h264", "hevc", "vp9", "av1")
# A clip of the kinds, no larger than the detector's picture: 32 s, 8 segments, every kind.
MINUTES, WIDTH, HEIGHT = 32 / 60, 640, 360


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Footage:
    return make_footage(tmp_path_factory.mktemp("footage"), MINUTES, width=WIDTH, height=HEIGHT, seed=3)


@pytest.fixture(scope="module")
def truth(footage: Footage) -> dict[str, Any]:
    return load_truth(footage.truths[0])


@pytest.fixture(scope="module")
def sampled(footage: Footage) -> list[np.ndarray]:
    """Every tenth frame (1/3 s apart): uint8 RGB [360, 640, 3]."""
    return [
        frame.to_ndarray(format="rgb24")
        for index, frame in enumerate(decoded(footage.videos[0]))
        if index % 10 == 0
    ]


def decoded(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


def packet_times(path: Path, fps: int) -> tuple[list[int], list[int], list[int]]:
    """Presentation and decoding times in frames, in file order, and the frames that are keyframes."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    frames = [[round(t * p.time_base * fps) for t in (p.pts, p.dts)] for p in packets]
    keys = [frame[0] for frame, packet in zip(frames, packets, strict=True) if packet.is_keyframe]
    return [f[0] for f in frames], [f[1] for f in frames], keys


def test_the_spans_fill_the_video_and_hold_every_kind(footage: Footage, truth: dict[str, Any]) -> None:
    spans = truth["spans"]
    assert spans[0]["start_s"] == 0 and spans[-1]["end_s"] == truth["duration_s"] == 32.0
    assert all(a["end_s"] == b["start_s"] for a, b in pairwise(spans))
    assert {span["kind"] for span in spans} == {"idle", "walking", "manipulating"}
    assert all((span["kind"] == "manipulating") == (span["skill"] in SKILLS) for span in spans)
    assert all(truth["segments"][span["segment"]]["kind"] == span["kind"] for span in spans)
    frames = sum(s["used"] * s["n_frames"] for s in truth["segments"].values())
    assert frames == truth["n_frames"] == sum(1 for _ in decoded(footage.videos[0])) == 960


def test_motion_tells_idle_from_the_rest(truth: dict[str, Any], sampled: list[np.ndarray]) -> None:
    grey = [np.asarray(Image.fromarray(f).convert("L").reduce(4), np.float32) for f in sampled]
    motion: dict[str, list[float]] = {"idle": [], "walking": [], "manipulating": []}
    for index, (a, b) in enumerate(pairwise(grey)):
        shares = truth_of_clip(truth, index / 3, (index + 1) / 3 + 1 / 30)["shares"]
        kind = max(shares, key=lambda name: shares[name])
        if shares[kind] > 0.999:
            motion[kind].append(float(np.abs(a - b).mean() / 255))
    assert np.mean(motion["idle"]) < 0.010 and max(motion["idle"]) < 0.015
    assert min(motion["walking"]) > 0.03
    assert np.mean(motion["manipulating"]) > 0.03 and min(motion["manipulating"]) > 0.02


def test_the_detector_sees_the_hands_where_and_only_when_they_are(
    truth: dict[str, Any], sampled: list[np.ndarray]
) -> None:
    try:
        models.hand_networks("full", pull_if_missing=True)
    except UserError as error:
        pytest.skip(f"hand models cannot be had: {error}")
    import torch

    from ego2robot.stages.hands_torch import TorchHands

    with TorchHands() as detector:
        frames = torch.from_numpy(np.stack(sampled))
        found = detector.detect(frames, np.arange(len(sampled)))
    seen: dict[str, list[bool]] = {"idle": [], "walking": [], "manipulating": []}
    sides, errors = [], []
    for index, hands in enumerate(found):
        wanted = hands_at(truth, index / 3)
        kind = next(s["kind"] for s in truth["spans"] if s["start_s"] <= index / 3 + 1e-6 < s["end_s"])
        assert bool(wanted) == (kind == "manipulating")
        seen[kind].append(bool(hands))
        for hand in hands if wanted else ():
            sides.append(hand.side in wanted)
            if hand.side in wanted:
                miss = (hand.landmarks[0, :2] - np.array(wanted[hand.side])) * (WIDTH / HEIGHT, 1)
                errors.append(float(np.hypot(*miss)))
    assert np.mean(seen["manipulating"]) >= 0.8, "the detector misses drawn hands"
    assert np.mean(seen["idle"] + seen["walking"]) <= 0.05, "the detector sees hands where there are none"
    assert np.mean(sides) >= 0.9, "left and right are confused"
    assert np.median(errors) < 0.06, "the wrists are elsewhere than the truth says"


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_decodes_to_the_promised_frames(codec: str, tmp_path: Path) -> None:
    bframes = 2 if codec in ("h264", "hevc") else 0
    made = make_footage(
        tmp_path, 12 / 60, codec=codec, gop=20, bframes=bframes, seed=1, width=320, height=180, fps=10
    )
    truth = load_truth(made.truths[0])
    assert made.duration_s == truth["duration_s"] == 12.0 and truth["n_frames"] == 120
    presented, decoding, keys = packet_times(made.videos[0], 10)
    assert sorted(presented) == list(range(120))
    assert all(a < b for a, b in pairwise(decoding))
    assert (presented != sorted(presented)) == bool(bframes)
    assert keys == list(range(0, 120, 20)), "a keyframe every 20 frames, and none between"
    assert {span["first_frame"] for span in truth["spans"]} <= set(keys)
    frames = list(decoded(made.videos[0]))
    assert [round(f.time * 10) for f in frames] == list(range(120))
    assert all((f.width, f.height, f.format.name) == (320, 180, "yuv420p") for f in frames)
    # Pictures after a join are intact: a cut is the only place where neighbours differ wholly.
    luma = [f.to_ndarray(format="gray").astype(np.float32) for f in frames]
    steps = np.array([np.abs(a - b).mean() for a, b in pairwise(luma)])
    assert {int(i) + 1 for i in np.argsort(steps)[-2:]} == {40, 80}


def test_a_segment_follows_itself_without_a_seam(truth: dict[str, Any], footage: Footage) -> None:
    span = next(s for s in truth["spans"] if s["repeats"] > 1)
    n = truth["segments"][span["segment"]]["n_frames"]
    first = span["first_frame"]
    luma = [
        frame.to_ndarray(format="gray").astype(np.float32)
        for index, frame in enumerate(decoded(footage.videos[0]))
        if first <= index < first + n + 1
    ]
    steps = [np.abs(a - b).mean() for a, b in pairwise(luma)]
    assert steps[-1] < 2 * np.median(steps) + 1


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    def make(name: str, seed: int) -> tuple[str, str]:
        made = make_footage(tmp_path / name, 8 / 60, seed=seed, width=256, height=144, fps=5, gop=20)
        return hashlib.sha256(made.videos[0].read_bytes()).hexdigest(), made.truths[0].read_text()

    assert make("a", 5) == make("b", 5)
    assert make("a", 5)[0] != make("c", 6)[0]


def test_minutes_are_shared_among_the_files_and_no_scrap_is_left(tmp_path: Path) -> None:
    told: list[float] = []
    made = make_footage(
        tmp_path, 24 / 60, videos=2, width=256, height=144, fps=5, gop=10, progress=told.append
    )
    assert [path.name for path in made.videos] == ["ego_000.mp4", "ego_001.mp4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in (*made.videos, *made.truths))
    truths = load_truths(tmp_path)
    assert [t["duration_s"] for t in truths.values()] == [12.0, 12.0]
    assert truths["ego_000"]["spans"] != truths["ego_001"]["spans"]
    assert told == sorted(told) and told[-1] == 1.0
    assert made.bytes == sum(p.stat().st_size for p in made.videos) and made.unique_s <= made.duration_s
    assert "2 videos" in made.text()


def test_long_footage_has_spans_of_6_to_20_seconds_half_of_them_manipulating() -> None:
    plan = list(_plan(0, 300, 4.0, seed=1, variants=3, round_of=ROUND))
    assert sum(span.repeats for span in plan) == 300
    later = plan[4:-1]  # the first round is short on purpose, the last span fills up
    assert all(6 <= 4 * span.repeats <= 20 for span in later)
    assert not any(a.kind == b.kind != "manipulating" for a, b in pairwise(plan))
    working = sum(span.repeats for span in plan if span.skill)
    assert 0.35 < working / 300 < 0.65
    assert {span.skill for span in plan if span.skill} == set(SKILLS)


@pytest.mark.parametrize("skill", list(SKILLS))
def test_hands_stay_in_view_and_come_back_to_where_they_began(skill: str) -> None:
    take = Loop(4.0, np.linspace(0, 0.9, 16), (0.03, 0.02))
    aspect = 16 / 9

    def points(t: float) -> dict[str, np.ndarray]:
        return stage(skill, take, t, Camera(), aspect, 0).joints

    track = [points(t) for t in np.linspace(0, 1, 49)]
    for side in track[0]:
        path = np.stack([frame[side][:, :2] for frame in track])
        assert np.allclose(path[0], path[-1], atol=1e-6)
        assert path.min() > 0 and path[..., 0].max() < aspect and path[..., 1].max() < 1
        assert np.ptp(path[:, 8], axis=0).max() > 0.01, "nothing is done"


def test_the_thumb_is_on_the_inner_side_and_curled_fingers_are_shorter() -> None:
    right = joints(HandPose("right", (1.0, 0.6), 0.0))
    left = joints(HandPose("left", (1.0, 0.6), 0.0))
    assert right[4, 0] < right[8, 0] < right[20, 0]
    assert np.allclose(left[:, 0] - 1.0, 1.0 - right[:, 0]) and np.allclose(left[:, 1:], right[:, 1:])
    fist = joints(HandPose("right", (1.0, 0.6), 0.0, curl=(1, 1, 1, 1, 1)))
    assert (fist[[8, 12, 16, 20], 1] > right[[8, 12, 16, 20], 1] + 0.05).all()
    assert (fist[[8, 12, 16, 20], 2] < right[[8, 12, 16, 20], 2]).all()


def spans(*items: tuple[float, float, str, str | None]) -> dict[str, Any]:
    return {"spans": [dict(zip(("start_s", "end_s", "kind", "skill"), item, strict=True)) for item in items]}


def test_a_clip_is_what_fills_half_of_it() -> None:
    truth = spans(
        (0, 6, "idle", None), (6, 12, "manipulating", "wiping"), (12, 30, "manipulating", "assembling")
    )
    assert truth_of_clip(truth, 0, 6) == {
        "shares": {"idle": 1.0, "walking": 0.0, "manipulating": 0.0},
        "manipulating": False,
        "skill": None,
    }
    half = truth_of_clip(truth, 3, 9)
    assert half["manipulating"] and half["shares"]["manipulating"] == pytest.approx(0.5)
    assert not truth_of_clip(truth, 2.9, 8.9)["manipulating"]
    assert truth_of_clip(truth, 8, 14)["skill"] == "wiping"
    assert truth_of_clip(truth, 10.5, 16.5)["skill"] == "assembling"
    with pytest.raises(ValueError, match="empty span"):
        truth_of_clip(truth, 3, 3)


def test_the_gate_is_scored_on_clear_clips_only() -> None:
    truths = {"ego_000": spans((0, 30, "manipulating", "wiping"), (30, 60, "walking", None))}
    rows = [
        (0.0, 6.0, "kept"),  # rightly
        (6.0, 12.0, "dropped"),  # wrongly
        (12.0, 18.0, "failed"),
        (27.0, 33.0, "kept"),  # half and half
        (25.5, 31.5, "kept"),  # exactly three quarters: clear
        (36.0, 42.0, "kept"),  # wrongly
        (42.0, 48.0, "dropped"),  # rightly
        (48.0, 54.0, "dropped"),
    ]
    start, end, decision = zip(*rows, strict=True)
    table = pa.table(
        {"name": ["in/ego_000.mp4"] * len(rows), "start_s": start, "end_s": end, "decision": decision}
    )
    score = score_gate(table, truths)
    assert (score.true_positive, score.false_positive, score.false_negative, score.true_negative) == (
        2,
        1,
        1,
        2,
    )
    assert (score.clips, score.mixed, score.mixed_kept, score.failed) == (8, 1, 1, 1)
    assert score.precision == pytest.approx(2 / 3) and score.recall == pytest.approx(2 / 3)
    assert "precision 0.667, recall 0.667 on 6 clips" in score.text() and "left out: 1 clips" in score.text()
    nothing = score_gate(table.slice(3, 1), truths)
    assert nothing.precision is None and nothing.recall is None and "undefined" in nothing.text()
    with pytest.raises(UserError, match=r"in/ego_000\.mp4: no truth"):
        score_gate(table, {})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("minutes", 0, "minutes=0: should be above 0"),
        ("minutes", float("nan"), "minutes=nan"),
        ("codec", "mpeg2", "codec=mpeg2: should be one of h264, hevc, vp9, av1"),
        ("gop", 601, "gop=601: should be 1 to 600"),
        ("bframes", 40, "bframes=40"),
        ("width", 1921, "size=1921x1080: should be even"),
        ("seed", -1, "seed=-1"),
        ("videos", 0, "videos=0"),
        ("fps", 0, "fps=0"),
    ],
)
def test_wrong_arguments_are_refused_before_work_starts(
    argument: str, value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        make_footage(tmp_path / "out", **{argument: value})
    assert not (tmp_path / "out").exists()


def test_b_frames_are_refused_where_a_codec_has_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use h264 or hevc"):
        make_footage(tmp_path, codec="vp9", bframes=2)


def test_unwritable_folders_and_foreign_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(UserError, match=r"file: cannot write the footage"):
        make_footage(file, 0.1)
    with pytest.raises(UserError, match="no truth files"):
        load_truths(tmp_path)
    with pytest.raises(UserError, match="no truth file"):
        load_truth(tmp_path / "missing.json")
    other = tmp_path / "other.json"
    for text, message in (
        ("{", "cannot be read as truth"),
        (json.dumps({"spans": []}), "not the truth"),
        (json.dumps({"format": "ego2robot-sample", "version": 0}), "version 0"),
    ):
        other.write_text(text)
        with pytest.raises(UserError, match=message):
            load_truth(other)
