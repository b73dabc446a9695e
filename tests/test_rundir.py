import json
from threading import Thread

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ego2robot import config
from ego2robot.errors import UserError
from ego2robot.store import atomic, schema
from ego2robot.store.ledger import SEGMENT, AlreadyCommitted, Ledger, Record
from ego2robot.store.rundir import RunDir
from ego2robot.store.shared import SharedFolder

PRINT = {"rows_version": 1, "videomae": {"sha256": "a"}, "made_with": {"torch": "x"}}


def clip_row(i, decision="kept"):
    return {
        "clip_id": f"{i:016x}",
        "video_id": "v" * 16,
        "source": "folder",
        "name": "a.mp4",
        "start_s": float(i),
        "end_s": i + 1.0,
        "n_frames": 6,
        "fps": 30.0,
        "width": 640,
        "height": 360,
        "codec": "h264",
        "motion": 0.5,
        "decision": decision,
        "reason": None if decision == "kept" else "motion below 0.6",
        "meta": [("task", "sew")],
    }


def clips(*rows):
    return pa.Table.from_pylist(list(rows), schema=schema.CLIPS)


def new_run(path, *overrides):
    cfg = config.load("folder", [f"run_dir={path}", *overrides])
    return RunDir.create_or_resume(path, cfg, PRINT)


def with_a_plan(run):
    """The same run once it has planned something: from then on its configuration is fixed."""
    atomic.write_parquet(run.path / "plan" / "units.parquet", pa.Table.from_pylist([], schema=schema.UNITS))
    return run


def test_a_run_that_has_planned_nothing_takes_another_configuration(tmp_path):
    new_run(tmp_path / "r", "source.path=mistyped")
    new_run(tmp_path / "r", "source.path=right")
    assert RunDir.open(tmp_path / "r").config.source.path == "right"
    with_a_plan(RunDir.open(tmp_path / "r"))
    with pytest.raises(UserError, match=r"source.path: right → other"):
        new_run(tmp_path / "r", "source.path=other")
    assert RunDir.open(tmp_path / "r").config.source.path == "right"


def test_a_run_resumes_with_the_same_configuration_and_refuses_another(tmp_path):
    with_a_plan(new_run(tmp_path / "r", "source.path=x"))
    new_run(tmp_path / "r", "source.path=x", "workers=7")
    with pytest.raises(UserError, match=r"clips.stride_s: 6.0 → 5.0"):
        new_run(tmp_path / "r", "source.path=x", "clips.stride_s=5")
    other = {**PRINT, "videomae": {"sha256": "b"}}
    with pytest.raises(UserError, match="videomae"):
        RunDir.create_or_resume(tmp_path / "r", config.load("folder", ["source.path=x"]), other)
    newer = {**PRINT, "made_with": {"torch": "y"}}
    RunDir.create_or_resume(tmp_path / "r", config.load("folder", ["source.path=x"]), newer)


def test_a_folder_with_other_things_in_it_is_not_taken_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        new_run(tmp_path)
    with pytest.raises(UserError, match="not a run directory"):
        RunDir.open(tmp_path / "nowhere")


def test_committed_rows_are_read_back_and_parts_without_a_record_are_not(tmp_path):
    run = new_run(tmp_path / "r")
    run.commit(["u1"], {"clips": clips(clip_row(1), clip_row(2, "dropped"))})
    run.commit(["u2"], {"clips": clips(clip_row(3))})
    atomic.write_parquet(run.path / "clips" / "part-feedfeedfeedfeed.parquet", clips(clip_row(9)))
    (run.path / "clips" / ".tmp-part-x.1").write_bytes(b"half")
    again = RunDir.open(tmp_path / "r")
    assert sorted(again.table("clips")["clip_id"].to_pylist()) == [f"{i:016x}" for i in (1, 2, 3)]
    assert again.committed_units() == {"u1", "u2"}
    assert len(again.remove_leftovers()) == 2
    assert len(list((run.path / "clips").iterdir())) == 2
    assert again.table("hands").num_rows == 0 and again.embeddings() == []


def test_committing_a_unit_again_replaces_its_part(tmp_path):
    run = new_run(tmp_path / "r")
    run.commit(["u1", "u2"], {"clips": clips(clip_row(1))})
    run.commit(["u2", "u1"], {"clips": clips(clip_row(1), clip_row(2))})
    assert run.table("clips").num_rows == 2 and len(run.records()) == 1
    assert len(list((run.path / "clips").iterdir())) == 1


def test_tables_open_in_duckdb_and_pandas_without_this_package(tmp_path):
    run = new_run(tmp_path / "r")
    run.commit(["u1"], {"clips": clips(clip_row(1), clip_row(2, "dropped"))})
    found = duckdb.sql(
        f"select decision, count(*) n, any_value(meta['task']) from '{run.path}/clips/*.parquet' "
        "group by decision order by decision"
    ).fetchall()
    assert found == [("dropped", 1, "sew"), ("kept", 1, "sew")]
    assert pq.read_table(run.path / "clips").to_pandas()["motion"].tolist() == [0.5, 0.5]


def test_embeddings_say_whose_they_are(tmp_path):
    run = new_run(tmp_path / "r")
    columns = schema.embedding(3, "videomae", "some/weights", True)
    flat = pa.array(np.arange(6, dtype=np.float16))
    table = pa.Table.from_arrays(
        [pa.array(["a", "b"]), pa.FixedSizeListArray.from_arrays(flat, 3)], schema=columns
    )
    run.commit(["u"], {"embeddings/videomae": table})
    read = run.dataset("embeddings/videomae")
    assert read.schema.metadata[b"random"] == b"true" and read.schema.metadata[b"weights"] == b"some/weights"
    assert read.to_table()["embedding"].to_pylist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(KeyError):
        run.dataset("embeddings/clip")


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    atomic.write_json(path, {"a": 1})

    def fill(file):
        file.write(b"half of i")
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space"):
        atomic.write(path, fill)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_metrics_line_cut_by_a_crash_is_left_out(tmp_path):
    run = new_run(tmp_path / "r")
    run.add_metrics({"clips": 1})
    with (run.path / "metrics" / "run.jsonl").open("a") as file:
        file.write('{"clips": 2, "tim')
    assert [line["clips"] for line in run.metrics()] == [1]


def test_a_resumed_run_takes_the_workers_of_this_start(tmp_path):
    new_run(tmp_path / "r", "source.path=x", "workers=1")
    assert new_run(tmp_path / "r", "source.path=x", "workers=7").config.workers == 7


# -- the ledger -----------------------------------------------------------------------------------


def test_of_two_who_commit_one_unit_the_first_is_recorded_and_nothing_is_left_of_the_other(tmp_path):
    ours, theirs = new_run(tmp_path / "r"), RunDir.open(tmp_path / "r")
    assert theirs.records() == []
    ours.commit(["u1", "u2"], {"clips": clips(clip_row(1), clip_row(2))})
    with pytest.raises(AlreadyCommitted) as error:
        theirs.commit(["u2", "u3"], {"clips": clips(clip_row(2), clip_row(3))})
    assert error.value.units == ("u2",)
    theirs.commit(["u3"], {"clips": clips(clip_row(3))})
    assert ours.table("clips").num_rows == 3 and ours.remove_leftovers() == []
    assert [record.units for record in ours.records()] == [("u1", "u2"), ("u3",)]


class Stale(SharedFolder):
    """Shows what others made only after some looks, as a network file system may; our own at once."""

    def __init__(self, path, looks):
        super().__init__(path)
        self.looks, self.seen = looks, {}

    def create(self, name, data, durable=True):
        made = super().create(name, data, durable)
        self.seen[name] = self.looks if made else self.seen.get(name, 0)
        return made

    def read(self, name):
        data = super().read(name)
        if data is None:
            return None
        self.seen[name] = self.seen.get(name, 0) + 1
        return data if self.seen[name] > self.looks else None


def test_whoever_sees_the_others_late_commits_nothing_twice(tmp_path):
    ledgers = [Ledger(Stale(tmp_path / "ledger", 5)) for _ in range(3)]
    lost = 0

    def work(ledger, order):
        nonlocal lost
        for i in order:
            try:
                ledger.append(Record(f"{id(ledger)}-{i}", (f"u{i}",), {}, {}))
            except AlreadyCommitted:
                lost += 1

    orders = [range(40), range(39, -1, -1), [*range(20, 40), *range(20)]]
    threads = [Thread(target=work, args=pair) for pair in zip(ledgers, orders, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger = Ledger(SharedFolder(tmp_path / "ledger"))
    ledger.refresh()
    assert len(ledger.parts) == len(ledger.owner) == 40 and lost == 80
    assert not [name for name in (tmp_path / "ledger").iterdir() if name.name.startswith(".")]


def test_segments_hold_the_same_as_the_records_and_nothing_depends_on_them(tmp_path):
    ledger = Ledger(SharedFolder(tmp_path))
    for i in range(2 * SEGMENT + 3):
        dropped = (f"p{i - 7}",) if i % 50 == 10 else ()
        ledger.append(Record(f"p{i}", (f"u{i}", f"w{i}"), {f"clips/{i}": {"rows": i}}, {"at": i}, dropped))
    segments = sorted(tmp_path.glob("segment-*"))
    assert len(segments) == 2

    def read():
        fresh = Ledger(SharedFolder(tmp_path))
        assert [record.n for record in fresh.refresh()] == list(range(1, 2 * SEGMENT + 4))
        return fresh.parts, fresh.owner

    assert read() == (ledger.parts, ledger.owner)
    segments[1].write_bytes(segments[1].read_bytes()[:-9])
    assert read() == (ledger.parts, ledger.owner)
    segments[0].unlink()
    assert read() == (ledger.parts, ledger.owner)


def test_a_half_written_record_holds_nothing_and_the_ledger_goes_on_after_it(tmp_path):
    ledger = Ledger(SharedFolder(tmp_path))
    ledger.append(Record("p1", ("u1",), {}, {}))
    (tmp_path / "00000002.json").write_bytes(Record("p2", ("u2",), {}, {}).to_bytes()[:20])
    ledger.append(Record("p3", ("u3",), {}, {}))
    fresh = Ledger(SharedFolder(tmp_path))
    fresh.refresh()
    assert fresh.owner == {"u1": "p1", "u3": "p3"} and fresh.damaged == [2] and fresh.n == 3


def test_a_dropped_part_counts_no_more_and_its_units_can_be_committed_again(tmp_path):
    run = new_run(tmp_path / "r")
    old = run.commit(["u1", "u2"], {"clips": clips(clip_row(1), clip_row(2))})
    run.append(Record("", (), {}, {}, (old.part,)))
    assert run.committed_units() == set() and not list((run.path / "clips").iterdir())
    run.commit(["u1"], {"clips": clips(clip_row(1))}, replace=False)
    assert RunDir.open(run.path).table("clips").num_rows == 1
    with pytest.raises(ValueError, match="no such part"):
        run.append(Record("", (), {}, {}, (old.part,)))
