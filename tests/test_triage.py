"""The first look rules out what the gate would drop, keeps its promise, and gives way where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ego2robot.decode import probe
from ego2robot.decode.sizes import Sizes, packet_sizes
from ego2robot.stages import triage
from ego2robot.types import Blob, Clip, Video, VideoInfo
from tests.footage import remux, write_video

FPS, GOP = 30, 30
# Bytes of a keyframe and of a picture between, of each kind of scene.
KINDS = {"idle": (1e5, 2e3), "working": (9e4, 8e3), "walking": (6e4, 2.5e4)}


def stream(kinds: list[str], seed: int = 0, quality: float = 1.0, gop: int = GOP) -> Sizes:
    """A second of each kind after another, with noise."""
    draw = np.random.default_rng(seed)
    n = len(kinds) * FPS
    key = np.arange(n) % gop == 0
    means = np.array([KINDS[kinds[k // FPS]][0 if key[k] else 1] for k in range(n)])
    return Sizes(np.arange(n) / FPS, quality * means * np.exp(0.15 * draw.standard_normal(n)), key)


def spans(n: int, seconds: int = 5) -> np.ndarray:
    return np.array([(seconds * i, seconds * (i + 1)) for i in range(n)], float)


def world(n: int = 400, share: float = 0.1, seed: int = 1) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features of ``n`` clips of five seconds, which of them are working, and their ids."""
    draw = np.random.default_rng(seed)
    kinds = draw.choice(["idle", "working", "walking"], n, p=[0.6 - share, share, 0.4]).tolist()
    looks = triage.features_of(stream([k for k in kinds for _ in range(5)], seed), spans(n), 4.0)
    return looks, np.array(kinds) == "working", [f"{i:016x}" for i in range(n)]


def fit(looks: np.ndarray, kept: np.ndarray, recall: float = 0.99) -> triage.Rule:
    return triage.fit(looks, kept, np.ones(len(kept)), [str(i) for i in range(len(kept))], recall)


# -- features -------------------------------------------------------------------------------------


def test_quality_settings_do_not_matter() -> None:
    kinds = ["idle"] * 30 + ["walking"] * 10 + ["working"] * 20
    fine = triage.features_of(stream(kinds), spans(12), 4.0)
    coarse = triage.features_of(stream(kinds, quality=0.1), spans(12), 4.0)
    assert fine == pytest.approx(coarse)
    assert np.isfinite(fine).all()


def test_nothing_is_said_where_keyframes_are_far_apart_or_everywhere_or_missing() -> None:
    kinds = ["idle"] * 60
    for gop, gap, known in ((30, 4.0, True), (150, 4.0, False), (150, 6.0, True), (1, 4.0, False)):
        looks = triage.features_of(stream(kinds, gop=gop), spans(10), gap)
        assert np.isfinite(looks).all() == known, (gop, gap)
        assert np.isnan(looks).all((1, 2)).any() == (not known)
    short = stream(["idle"] * 20)
    looks = triage.features_of(short, spans(10), 4.0)
    assert np.isfinite(looks[:4]).all()
    assert np.isnan(looks[4:]).all()
    nothing = Sizes(np.zeros(0), np.zeros(0), np.zeros(0, bool))
    assert np.isnan(triage.features_of(nothing, spans(2), 4.0)).all()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_sizes_are_those_of_the_packets_of_the_stretch(suffix: str, tmp_path: Path) -> None:
    import av

    whole = write_video(tmp_path / "a.mp4", 300, 160, 90, gop=30, bframes=2)
    path = remux(whole, tmp_path / f"b.{suffix}")
    blob = Blob(str(path), 0, path.stat().st_size)
    info = probe("a", blob)
    with av.open(str(path)) as container:
        tick = float(container.streams.video[0].time_base or 1)
        packets = [
            ((p.dts if p.dts is not None else p.pts) * tick - info.start_s, p.size, p.is_keyframe)
            for p in container.demux(video=0)
            if p.size
        ]
    found = packet_sizes("a", blob, info, 3.5, 6.02)
    first = max(k for k, (t, _, key) in enumerate(packets) if key and t <= 3.5)
    expected = [packet for packet in packets[first:] if packet[0] <= 6.02]
    assert 60 <= len(expected) <= 120
    assert found.bytes.tolist() == [float(size) for _, size, _ in expected]
    assert found.key.tolist() == [key for *_, key in expected]
    assert found.times_s == pytest.approx([t for t, *_ in expected], abs=1e-6)


def test_the_index_is_enough_no_packet_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ego2robot.decode import sizes

    path = write_video(tmp_path / "a.mp4", 300, 160, 90, gop=30)
    blob = Blob(str(path), 0, path.stat().st_size)
    info = probe("a", blob)
    monkeypatch.setattr(sizes, "_from_packets", None)
    clips = [Clip(f"{k:016x}", "v", 30 * k, 30, 6.0) for k in range(2)]
    looks = triage.features("a", blob, info, clips, 4.0)
    assert looks.shape == (2, triage.WINDOWS, len(triage.NAMES))
    assert np.isfinite(looks).all()


# -- the rule -------------------------------------------------------------------------------------


def test_the_rule_keeps_what_it_promises_on_clips_it_never_saw() -> None:
    looks, kept, _ = world(400)
    rule = fit(looks, kept)
    assert rule.off is None
    assert rule.recall is not None
    assert rule.recall_low is not None
    assert rule.recall_low < rule.recall
    fresh, worth, _ = world(3000, seed=9)
    out = rule.rules_out(fresh)
    assert out[worth].mean() <= 0.01
    assert out[~worth].mean() >= 0.9
    assert abs(out.mean() - rule.ruled_out) < 0.08


def test_the_rule_survives_being_stored() -> None:
    from dataclasses import asdict

    looks, kept, _ = world(300)
    rule = fit(looks, kept)
    again = triage.Rule(**json.loads(json.dumps(asdict(rule))))
    assert again == rule
    assert np.array_equal(again.rules_out(looks), rule.rules_out(looks))


def test_the_rule_is_off_where_sizes_say_nothing() -> None:
    draw = np.random.default_rng(3)
    looks, _, _ = world(400)
    rule = fit(looks, draw.random(400) < 0.3)
    assert rule.off is not None
    assert "would" in rule.off
    assert not rule.rules_out(looks).any()


def test_the_rule_is_off_where_too_few_were_kept_to_know() -> None:
    looks, kept, _ = world(400)
    kept &= np.cumsum(kept) < triage.MIN_KEPT
    rule = fit(looks, kept)
    assert rule.off is not None
    assert f"{kept.sum()} clips were kept" in rule.off
    assert not rule.rules_out(looks).any()


def test_what_is_unknown_or_unlike_anything_seen_is_not_ruled_out() -> None:
    looks, kept, _ = world(400)
    rule = fit(looks, kept)
    dull = looks[rule.rules_out(looks)][:1]
    assert rule.rules_out(dull).all()
    strange = dull.copy()
    strange[0, 3, 1] += 10 * rule.scale[1]
    for look in (np.full_like(dull, np.nan), strange):
        assert not rule.rules_out(look).any()


# -- calibration and audit ------------------------------------------------------------------------


def test_calibration_sees_what_is_rare_and_weighs_it_rightly() -> None:
    estimates, shares = [], []
    for seed in range(5):
        looks, kept, ids = world(1000, share=0.05, seed=seed)
        chosen = triage.choose(ids, looks, 80, seed=0)
        assert len(chosen) == 80
        rare = [clip for clip in chosen if kept[int(clip, 16)]]
        shares.append(len(rare) / 80)
        assert sum(chosen.values()) == pytest.approx(1000)
        estimates.append(sum(chosen[clip] for clip in rare) / kept.sum())
    assert np.mean(shares) >= 0.08
    assert np.mean(estimates) == pytest.approx(1, abs=0.2)


def test_calibration_does_not_depend_on_the_order_of_the_clips() -> None:
    looks, _, ids = world(300)
    order = np.random.default_rng(5).permutation(300)
    shuffled = triage.choose([ids[i] for i in order], looks[order], 40, seed=0)
    assert shuffled == triage.choose(ids, looks, 40, seed=0)


def test_what_the_first_clips_taught_finds_more_that_are_kept() -> None:
    shares, estimates = [], []
    for seed in range(5):
        looks, kept, ids = world(1000, share=0.05, seed=seed)
        first = triage.choose(ids, looks, 60, seed=0)
        decided = {clip: bool(kept[int(clip, 16)]) for clip in first}
        chosen = triage.choose_more(ids, looks, first, decided, 60)
        assert len(chosen) == 120
        assert first.keys() < chosen.keys()
        assert sum(chosen.values()) == pytest.approx(1000)
        more = [clip for clip in chosen if clip not in first]
        shares.append(np.mean([kept[int(clip, 16)] for clip in more]))
        estimates.append(sum(chosen[clip] for clip in chosen if kept[int(clip, 16)]) / kept.sum())
    assert np.mean(shares) >= 0.12  # of 0.05
    assert np.mean(estimates) == pytest.approx(1, abs=0.15)


def test_where_the_first_clips_taught_nothing_more_are_chosen_all_the_same() -> None:
    looks, _, ids = world(300)
    first = triage.choose(ids, looks, 30, seed=0)
    for decided in (dict.fromkeys(first, False), {}):
        chosen = triage.choose_more(ids, looks, first, decided, 30)
        assert len(chosen) == 60
        assert sum(chosen.values()) == pytest.approx(300)


def test_few_or_unknown_clips_can_be_chosen_from() -> None:
    looks, _, ids = world(20)
    assert len(triage.choose(ids, looks, 40, seed=0)) == 20
    assert triage.choose(ids, np.full_like(looks, np.nan), 40, seed=0) == {}


def test_the_audit_is_a_share_that_depends_on_the_clip_alone() -> None:
    ids = [f"{i:016x}" for i in range(20000)]
    found = [clip for clip in ids if triage.audited(clip, 0.05)]
    assert len(found) == pytest.approx(1000, abs=100)
    assert {c for c in ids if triage.audited(c, 0.02)} < set(found)
    assert not any(triage.audited(clip, 0.0) for clip in ids)
    assert all(triage.audited(clip, 1.0) for clip in ids)


def test_recall_is_estimated_from_the_audit() -> None:
    """Repeated audits of a known loss: right on average, and the interval holds it nearly always."""
    draw = np.random.default_rng(2)
    lost = draw.random(4000) < 0.01
    found, held, estimates = 500, 0, []
    for _ in range(300):
        audit = draw.random(4000) < 0.05
        recall = triage.estimate_recall(
            found + int(lost[audit].sum()), int((~audit).sum()), int(audit.sum()), int(lost[audit].sum())
        )
        truth = (found + lost[audit].sum()) / (found + lost.sum())
        assert recall.estimate is not None
        assert recall.low <= recall.estimate <= recall.high
        held += recall.low <= truth <= recall.high
        estimates.append(recall.estimate - truth)
    assert held >= 0.9 * 300
    assert abs(np.mean(estimates)) < 0.01


def test_recall_where_nothing_was_ruled_out_or_nothing_audited() -> None:
    assert triage.estimate_recall(0, 0, 0, 0).estimate == 1.0
    unknown = triage.estimate_recall(10, 90, 0, 0)
    assert (unknown.estimate, unknown.low) == (None, 0.1)
    assert triage.estimate_recall(0, 50, 10, 0).estimate == 1.0
    assert triage.estimate_recall(0, 50, 10, 1).estimate == 0.0


def test_the_interval_is_wilsons() -> None:
    assert triage.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert triage.wilson(5, 20) == pytest.approx((0.1119, 0.4687), abs=1e-4)


def test_groups_are_kinds_of_footage() -> None:
    def video(codec: str, fps: float) -> Video:
        info = VideoInfo(1920, 1080, 0, fps, 60.0, 0.0, 1800, codec, "yuv420p", 8)
        return Video("0" * 16, "a", "folder", Blob("a", 0, 1), {}, info)

    assert triage.group_of(video("h264", 29.97)) == triage.group_of(video("h264", 30.0))
    assert triage.group_of(video("hevc", 30.0)) != triage.group_of(video("h264", 30.0))
