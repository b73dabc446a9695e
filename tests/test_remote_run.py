"""The whole job on what lies at addresses: a manifest of annotated videos, and tars."""

import io
import json
import tarfile

import pandas as pd
import pytest

from ego2robot import config, pipeline
from ego2robot.errors import UserError
from ego2robot.export.lerobot import export_lerobot
from ego2robot.export.webdataset import export_webdataset
from ego2robot.jobs.triage import looking
from ego2robot.jobs.verify import verify
from ego2robot.remote import objects
from ego2robot.report import write_report
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_from_table
from tests.footage import write_video
from tests.store_server import serving
from tests.test_cameras import META
from tests.test_pipeline import BASE, rows, still

pytest.importorskip("aiohttp")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path / "cache"))
    objects._stats.clear()
    yield
    objects.configure(20.0)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "files").mkdir()
    with serving(tmp_path / "files") as found:
        yield found


def recipe(kind, path, run_dir, *more):
    settings = [*BASE, "hands.dense=false", f"source.path={path}", f"run_dir={run_dir}", "workers=1", *more]
    return config.load(kind, settings)


def test_a_remote_manifest_becomes_clips_with_tasks_in_spite_of_a_flaky_store(tmp_path, store):
    write_video(store.root / "a.mp4", n_frames=240, gop=30)
    write_video(store.root / "b.mp4", n_frames=90, gop=30, bframes=2)
    (store.root / "list.csv").write_text(
        "uri,start,end,task,worker\n"
        "a.mp4,0.5,2.5,open the box,w1\n"
        "a.mp4,0.5,2.5,hold the lid,w1\n"
        "a.mp4,3,2,backwards,w1\n"
        "a.mp4,100,120,outside,w1\n"
        "b.mp4,,,stir,w2\n"
        "gone.mp4,0,2,nothing,w3\n"
    )
    store.trouble = lambda path, n: 503 if n % 5 == 4 else None
    wanted = recipe(
        "manifest",
        f"{store.url}/list.csv",
        tmp_path / "run",
        "clips.stride_s=2",
        "source.cache_gib=0.01",
    )
    told = []
    outcome = pipeline.run(wanted, tell=told.append)
    assert verify(outcome.run).ok
    found = rows(outcome.run)
    clips = {(r["name"].rpartition("/")[2], r["start_s"], r["end_s"]): dict(r["meta"]) for r in found}
    assert clips.pop(("a.mp4", 0.5, 2.5)) == {"task": "open the box; hold the lid", "worker": "w1"}
    assert set(clips) == {("b.mp4", 0.0, 2.0)} and clips.popitem()[1] == {"task": "stir", "worker": "w2"}
    problems = "\n".join(told)
    assert (
        "a row of 6 cannot be used" in problems and "1 of 3 annotated spans are outside the video" in problems
    )
    assert "gone.mp4: not there" in problems and "503" not in problems
    assert outcome.export.episodes == 2
    tasks = outcome.export.path / "meta" / "tasks.parquet"
    assert sorted(pd.read_parquet(tasks).index) == ["open the box; hold the lid", "stir"]
    # Planned again: what is known is not probed again, though its size was not listed.
    asked = len(store.asked)
    write_video(store.root / "gone.mp4", n_frames=60)
    planned = pipeline.plan(wanted)
    assert planned.added == 1 and not any(path in ("/a.mp4", "/b.mp4") for _, path, _ in store.asked[asked:])


def test_a_store_that_lets_nobody_in_is_one_line_and_not_one_for_each_file(tmp_path, store):
    write_video(store.root / "0.mp4", n_frames=30)
    for i in range(1, 9):
        (store.root / f"{i}.mp4").write_bytes((store.root / "0.mp4").read_bytes())
    (store.root / "list.csv").write_text("uri\n" + "".join(f"{store.url}/{i}.mp4\n" for i in range(9)))
    store.gated = True
    wanted = recipe("manifest", str(store.root / "list.csv"), tmp_path / "run")
    with pytest.raises(UserError, match="access denied") as caught:
        pipeline.plan(wanted)
    assert "\n" not in str(caught.value)


def test_whoever_opens_a_run_keeps_no_more_of_its_videos_than_it_says(tmp_path, store, monkeypatch):
    write_video(store.root / "a.mp4", n_frames=60)
    write_video(store.root / "still.mp4", n_frames=60, picture=still)
    (store.root / "list.csv").write_text("uri,task\na.mp4,stir\nstill.mp4,wait\n")
    more = "source.cache_gib=0", "export.enabled=false"
    run = pipeline.run(recipe("manifest", f"{store.url}/list.csv", tmp_path / "run", *more)).run
    (unit,) = (unit for unit in units_from_table(run.units()) if unit.video.name.endswith("/a.mp4"))
    for name, read in (
        ("still", lambda: write_report(run, tmp_path / "report.html")),
        ("a", lambda: export_lerobot(run, tmp_path / "dataset", None, codec="h264")),
        ("a", lambda: export_webdataset(run, tmp_path / "shards", None, codec="h264")),
        ("a", lambda: list(looking(1e9, run.config.source.cache_gib)(unit))),
    ):
        monkeypatch.setattr(objects, "_cache", None)  # as a process begins
        asked = len(store.asked)
        read()
        assert f"/{name}.mp4" in [path for _, path, _ in store.asked[asked:]]
        assert not [path for path in (tmp_path / "cache" / "remote").rglob("*") if path.is_file()]


def test_remote_tars_are_worked_on_in_place_and_exported_without_their_camera_s_bend(tmp_path, store):
    worker = store.root / "factory_001" / "workers" / "worker_001"
    worker.mkdir(parents=True)
    (worker / "intrinsics.json").write_text(META["intrinsics"])
    video = write_video(tmp_path / "v.mp4", n_frames=72, width=320, height=180).read_bytes()
    with tarfile.open(worker / "factory001_worker001_part00.tar", "w") as tar:
        key = "factory001_worker001_00000"
        for name, data in {f"{key}.mp4": video, f"{key}.json": b"{}"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    run_dir = tmp_path / "run"
    more = "frames.undistort=true", "gate.min_hand_visibility=0"
    outcome = pipeline.run(recipe("egocentric10k", f"{store.url}/", run_dir, *more))
    (row,) = rows(outcome.run)
    meta = dict(row["meta"])
    assert row["decision"] == "kept" and meta["factory_id"] == "factory_001"
    assert json.loads(meta["intrinsics"])["fx"] == 1030.5
    assert outcome.export.episodes == 1 and RunDir.open(run_dir).config.frames.undistort
