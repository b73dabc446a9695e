"""`verify` finds every kind of damage, and only damage."""

import json

import numpy as np
import pyarrow as pa
import pytest

from ego2robot import config
from ego2robot.jobs.plan import clips_of, units_of
from ego2robot.jobs.repair import Mended, drop_broken
from ego2robot.jobs.status import status
from ego2robot.jobs.verify import verify
from ego2robot.store import atomic, schema
from ego2robot.store.ledger import Record
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_from_table, units_table
from ego2robot.types import Blob, Video, VideoInfo

INFO = VideoInfo(640, 360, 0, 30.0, 21.0, 0.0, 630, "h264", "yuv420p", 8)


@pytest.fixture
def run(tmp_path):
    """Two videos of three 6 s clips and a 3 s one; the first is committed, the second is not."""
    cfg = config.load("folder", ["source.path=x", "clips.stride_s=6"])
    run = RunDir.create_or_resume(tmp_path / "r", cfg, {})
    units = []
    for i in range(2):
        video = Video(f"{i:016x}", f"{i}.mp4", "folder", Blob(f"/{i}.mp4", 0, 9), {}, INFO)
        units += units_of(video, clips_of(video.video_id, INFO, cfg.clips))
    atomic.write_parquet(run.path / "plan" / "units.parquet", units_table(units))
    decisions = ["kept", "dropped", "failed", "kept"]
    rows, kept = [], []
    for clip, decision in zip(units[0].clips, decisions, strict=True):
        rows.append(
            {
                "clip_id": clip.clip_id,
                "video_id": clip.video_id,
                "source": "folder",
                "name": "0.mp4",
                "start_s": clip.start_s,
                "end_s": clip.end_s,
                "n_frames": clip.n_frames,
                "fps": 30.0,
                "width": 640,
                "height": 360,
                "codec": "h264",
                "motion": None if decision == "failed" else 0.2,
                "hand_visibility": 0.5 if decision == "kept" else None,
                "decision": decision,
                "reason": None if decision == "kept" else "because",
                "meta": [],
            }
        )
        kept += [clip.clip_id] if decision == "kept" else []
    run.rows, run.kept, run.unit = rows, kept, units[0]
    commit(run)
    return run


def vectors(ids, values):
    flat = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(values, np.float16).reshape(-1)), 4)
    columns = schema.embedding(4, "hand_motion", "none needed", False)
    return pa.Table.from_arrays([pa.array(ids, pa.string()), flat], schema=columns)


def commit(run, rows=None, ids=None, values=None):
    ids = run.kept if ids is None else ids
    values = np.ones((len(ids), 4)) if values is None else values
    tables = {
        "clips": pa.Table.from_pylist(run.rows if rows is None else rows, schema=schema.CLIPS),
        "embeddings/hand_motion": vectors(ids, values),
    }
    return run.commit([run.unit.unit_id], tables)


def test_a_sound_run_adds_up_and_says_what_is_left(run):
    v = verify(run)
    assert v.ok, v.problems
    assert (v.planned, v.kept, v.dropped, v.failed, v.left, v.units_left) == (8, 2, 1, 1, 4, 1)
    s = status(run)
    assert (s.clips, s.clips_done, s.kept, s.state, s.videos) == (8, 4, 2, "curating", 2)
    assert json.dumps(s.to_dict())


def damaged_byte(run):
    path = next((run.path / "clips").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_rows(change):
    def damage(run):
        rows = [dict(row) for row in run.rows]
        change(rows)
        commit(run, rows)

    return damage


def edit(index, **values):
    return other_rows(lambda rows: rows[index].update(values))


def embeddings(ids, values=None):
    return lambda run: commit(run, ids=ids(run), values=values)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damaged_byte, "checksum"),
        (lambda run: next((run.path / "clips").iterdir()).unlink(), "missing"),
        (
            lambda run: (run.path / "clips" / "part-0123456789abcdef.parquet").write_bytes(b"x"),
            "no ledger record",
        ),
        (other_rows(lambda rows: rows.pop()), "has no row"),
        (other_rows(lambda rows: rows.append(dict(rows[0]))), "occurs twice"),
        (edit(0, clip_id="f" * 16), "not in the plan"),
        (edit(1, reason=None), "with the reason None"),
        (edit(0, decision="maybe"), "'maybe'"),
        (edit(1, end_s=99.0), "spans"),
        (edit(0, motion=float("nan")), "motion nan"),
        (edit(0, motion=None), "without a motion score"),
        (embeddings(lambda run: run.kept[:1]), "has no vector"),
        (embeddings(lambda run: [*run.kept, run.rows[1]["clip_id"]]), "is no kept clip"),
        (embeddings(lambda run: [run.kept[0]] * 2), "occurs twice"),
        (embeddings(lambda run: run.kept, [[np.nan] * 4, [1] * 4]), "norm nan"),
        (embeddings(lambda run: run.kept, [[0] * 4, [1] * 4]), "norm 0"),
    ],
)
def test_damage_is_found_and_named(run, damage, says):
    damage(run)
    assert any(says in problem for problem in verify(run).problems), verify(run).problems


@pytest.mark.parametrize(
    "damage",
    [
        damaged_byte,
        lambda run: next((run.path / "clips").iterdir()).unlink(),
        edit(0, motion=float("nan")),
        embeddings(lambda run: run.kept[:1]),
    ],
)
def test_what_is_broken_is_dropped_and_can_be_done_again(run, damage):
    damage(run)
    broken = verify(run)
    assert not broken.ok
    mended = drop_broken(run, broken)
    assert (mended.parts, mended.units) == (1, 1)
    after = verify(run)
    assert after.ok, after.problems
    assert (after.left, after.units_left) == (8, 2)
    commit(run)
    assert verify(run).ok
    assert verify(run).left == 4


def test_a_stray_part_is_removed_and_nothing_is_done_again(run):
    stray = run.path / "hands" / "part-0123456789abcdef.parquet"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"x")
    assert drop_broken(run, verify(run)) == Mended(0, 0, 1)
    assert verify(run).ok
    assert verify(run).left == 4


def test_the_sound_units_of_a_part_are_kept_as_they_are(run):
    other = units_from_table(run.units())[1]
    more = [
        {**row, "clip_id": clip.clip_id, "video_id": clip.video_id}
        for row, clip in zip(run.rows, other.clips, strict=True)
    ]
    tables = {
        "clips": pa.Table.from_pylist([*run.rows, *more], schema=schema.CLIPS),
        "embeddings/hand_motion": vectors(
            [*run.kept, more[0]["clip_id"], more[3]["clip_id"]], [[np.nan] * 4, *[[1] * 4] * 3]
        ),
    }
    run.commit([run.unit.unit_id, other.unit_id], tables)
    broken = verify(run)
    assert [set(units) for units in broken.broken.values()] == [{run.unit.unit_id}]
    drop_broken(run, broken)
    after = verify(run)
    assert after.ok, after.problems
    assert (after.kept, after.left) == (2, 4)
    assert run.committed_units() == {other.unit_id}
    assert run.table("clips").to_pylist() == pa.Table.from_pylist(more, schema=schema.CLIPS).to_pylist()
    assert run.counts("clips") == {"dropped": 1, "failed": 1, "kept": 2}


def test_a_unit_that_is_committed_twice_is_found(run):
    record = Record("f" * 16, (run.unit.unit_id, "0123456789abcdef"), {}, {})
    (run.path / "ledger" / "00000002.json").write_bytes(record.to_bytes())
    problems = verify(run).problems
    assert any("committed 2 times" in p for p in problems) and any("not in the plan" in p for p in problems)


def test_a_run_without_a_plan_says_so(tmp_path):
    run = RunDir.create_or_resume(tmp_path / "r", config.load("folder"), {})
    assert "plan is missing" in verify(run).problems[0]
    assert status(run).state == "planning"
