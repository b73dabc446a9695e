import itertools
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ego2robot import config
from ego2robot.jobs.cutting import HELD_FRAMES, clips_of, cut_video, span_of, units_of
from ego2robot.store import atomic
from ego2robot.store.units import StoredPlan, units_table
from ego2robot.types import Blob, Clip, Span, Video, VideoInfo, clip_id


def info(duration_s=180.0):
    return VideoInfo(1920, 1080, 0, 30.0, duration_s, 0.0, round(30 * duration_s), "hevc", "yuv420p", 8)


def video(duration_s=180.0):
    return Video("v" * 16, "v.mp4", "manifest", Blob("/v.mp4", 0, 10), {"worker": "w1"}, info(duration_s))


def cut(spans=(), shots_s=(), duration_s=180.0, **keys):
    clips = config.Clips(**{"stride_s": 6.0, **keys})
    return cut_video("v.mp4", "v" * 16, info(duration_s), clips, spans, shots_s)


def times(clips):
    return [(round(clip.start_s, 3), round(clip.end_s, 3)) for clip in clips]


def test_windows_are_what_they_were_before_there_were_policies():
    clips, problems = cut(policy="windows")
    assert clips == clips_of("v" * 16, info(), config.Clips(stride_s=6.0)) and not problems
    assert times(clips)[:2] == [(0, 6), (6, 12)] and len(clips) == 30


def test_auto_takes_annotated_spans_where_there_are_some():
    span = Span(10.02, 13.9, {"task": "pour"})
    (clip,), problems = cut([span])
    assert times([clip]) == [(10.0, 13.833)] and clip.meta == {"task": "pour"} and not problems
    assert clip.clip_id == clip_id("v" * 16, 60, 23, 6.0)
    assert len(cut()[0]) == 30
    assert times(cut([span], policy="whole", max_s=500)[0]) == [(0, 180)]


def test_what_is_longer_than_max_s_is_cut_in_equal_parts_that_say_which():
    clips, _ = cut([Span(0, math.inf, {"task": "cook"})], max_s=50, duration_s=181.0)
    assert times(clips) == [(0, 45.167), (45.167, 90.5), (90.5, 135.667), (135.667, 181)]
    assert [c.meta["part"] for c in clips] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(c.meta["task"] == "cook" for c in clips)
    whole, _ = cut(policy="whole")
    assert times(whole) == [(0, 60), (60, 120), (120, 180)]


def test_bad_spans_are_counted_by_cause_in_one_line_each():
    spans = [
        Span(5, 5),
        Span(9, 7),
        Span(200, 210),
        Span(170, 200),
        Span(-20, 3),
        Span(math.nan, 3),
        Span(math.inf, math.inf),
        Span(20, 20.5),
        *[Span(1e307, 1e308)] * 1000,
        Span(30, 36),
        Span(176, 180.5),
    ]
    clips, problems = cut(spans)
    assert times(clips) == [(30, 36), (176, 180)]
    causes = {p.cause.partition(" annotated spans are ")[2]: p.cause.split()[0] for p in problems}
    assert causes == {
        "empty or reversed, the first 5 to 5 s": "2",
        "outside the video (0 to 180.00 s), the first 200 to 210 s": "1003",
        "without a time, the first nan to 3 s": "2",
        "shorter than clips.min_frames=10, the first 20 to 20.5 s": "1",
    }
    assert all(p.kind == "metadata" and "\n" not in str(p) for p in problems)


def test_a_video_without_annotations_says_so_where_they_were_asked_for():
    clips, (problem,) = cut(policy="annotated")
    assert not clips and "no span of it is annotated" in problem.cause


def test_spans_of_the_same_time_become_one_clip_with_both_tasks():
    spans = [
        Span(1, 4, {"task": "hold", "verb": "hold"}),
        Span(1.01, 4.02, {"task": "pour", "verb": "hold", "noun": "milk"}),
        Span(1, 4, {"task": "hold"}),
    ]
    (clip,), problems = cut(spans)
    assert clip.meta == {"task": "hold; pour", "verb": "hold", "noun": "milk"} and not problems


def test_no_clip_goes_across_a_cut():
    shots = [7.5, 20.01, 20.3]
    clips, _ = cut(shots_s=shots, duration_s=30.0)
    assert times(clips)[:2] == [(0, 6), (7.5, 13.5)]
    whole, _ = cut(shots_s=shots, duration_s=30.0, policy="whole")
    assert times(whole) == [(0, 7.5), (7.5, 20.167), (20.333, 30)]
    spanned, _ = cut([Span(5, 15, {"task": "x"})], shots_s=shots, duration_s=30.0)
    assert times(spanned) == [(5, 7.5), (7.5, 15)] and spanned[0].meta["part"] == "1/2"


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(
        st.tuples(st.floats(-10, 200), st.floats(-10, 200), st.sampled_from(["a", "b"])), max_size=12
    ),
    shots=st.lists(st.floats(0.1, 179), max_size=4),
    policy=st.sampled_from(["auto", "windows", "annotated", "whole"]),
)
def test_clips_lie_inside_the_video_in_order_once_each_and_across_no_cut(spans, shots, policy):
    shots = sorted(shots)
    found, _ = cut([Span(a, b, {"task": t}) for a, b, t in spans], shots, policy=policy)
    assert [(c.first, c.n_frames) for c in found] == sorted({(c.first, c.n_frames) for c in found})
    for clip in found:
        assert clip.first >= 0 and clip.end_s <= 180 + 1 / 6 and 10 <= clip.n_frames <= 360
        last_s = clip.end_s - 1 / 6
        assert not any(clip.start_s + 1e-6 < t <= last_s for t in shots)
    # Units: every clip once, ascending in each.
    units = units_of(video(), found)
    assert sorted(c.clip_id for u in units for c in u.clips) == sorted(c.clip_id for c in found)
    for unit in units:
        assert all(a.first <= b.first for a, b in itertools.pairwise(unit.clips))


def clip(first, n):
    return Clip(clip_id("v" * 16, first, n, 6.0), "v" * 16, first, n, 6.0)


def test_units_are_cut_where_a_keyframe_lies_near_and_their_ids_come_from_their_clips():
    clips = clips_of("v" * 16, info(1200.0), config.Clips(stride_s=6.0))
    starts = np.array([c.start_s for c in clips])
    keyframes = np.floor(starts / 50) * 50.0  # every 50 s
    plain, cut = units_of(video(1200.0), clips), units_of(video(1200.0), clips, keyframes)
    assert [u.clips[0].start_s for u in plain] == [0, 300, 600, 900]
    assert all(u.clips[-1].start_s - u.clips[0].start_s <= span_of(video()) for u in cut)
    again = [u.clips[0].start_s % 50 for u in cut]
    assert max(again) <= 4  # a multiple of 6 that lies just behind one of 50
    assert [c for u in cut for c in u.clips] == clips
    assert [u.unit_id for u in cut] == [u.unit_id for u in units_of(video(1200.0), clips, keyframes)]
    # Where clips lie apart nothing is decoded twice: units stay as long as they may be.
    sparse = clips_of("v" * 16, info(1200.0), config.Clips(stride_s=60.0))
    far = np.array([c.start_s - 1 for c in sparse])
    assert [u.clips[0].start_s for u in units_of(video(1200.0), sparse, far)] == [0, 360, 720, 1080]


def test_what_a_unit_holds_at_once_is_bounded_however_many_spans_overlap():
    clips = [clip(6 * i, 300) for i in range(50)]
    units = units_of(video(600.0), clips)
    assert len(units) > 10
    for unit in units:
        for one in unit.clips:
            held = [c for c in unit.clips if c.first <= one.first < c.first + c.n_frames]
            assert sum(c.n_frames for c in held) <= HELD_FRAMES
    apart = [clip(2000 * i, 1800) for i in range(4)]
    assert len({u.unit_id for u in units_of(video(1500.0), apart)}) == len(units_of(video(1500.0), apart))


def test_a_plan_keeps_annotations_and_reads_plans_that_have_none(tmp_path):
    clips, _ = cut([Span(1, 4, {"task": "pour"}), Span(8, 12)])
    units = units_of(video(), clips)
    atomic.write_parquet(tmp_path / "new.parquet", units_table(units))
    (unit,) = [StoredPlan(tmp_path / "new.parquet").unit(0)]
    assert [c.meta for c in unit.clips] == [{"task": "pour"}, {}]
    old = pq.read_table(tmp_path / "new.parquet").drop_columns(["clip_meta"])
    atomic.write_parquet(tmp_path / "old.parquet", old)
    assert [c.meta for c in StoredPlan(tmp_path / "old.parquet").unit(0).clips] == [{}, {}]


@pytest.mark.parametrize("stop", [0.0, 1.0])
def test_a_video_that_is_too_short_has_no_clips_whatever_the_policy(stop):
    for policy in ("windows", "whole"):
        assert cut(policy=policy, duration_s=stop)[0] == []
