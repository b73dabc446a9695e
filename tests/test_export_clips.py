"""Clips as WebDataset shards and as a folder of videos: what other people's readers find in them."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import av
import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import webdataset
from typer.testing import CliRunner

from ego2robot.cli import app
from ego2robot.errors import UserError
from ego2robot.export import clips
from ego2robot.export import webdataset as shards
from ego2robot.export.clips_parquet import export_parquet, export_parquet_shard
from ego2robot.export.staging import Staging
from ego2robot.export.webdataset import export_webdataset, export_webdataset_shard
from ego2robot.jobs.claims import Shard
from ego2robot.store import atomic, schema
from ego2robot.store.rundir import RunDir
from ego2robot.types import Clip
from tests.footage import write_video
from tests.test_export_lerobot import FPS, HEIGHT, WIDTH, make_run, psnr, source_frames
from tests.test_export_scale import contents


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, np.ndarray]]:
    """Six clips of two videos, with foreign text in what is known of them; and their frames."""

    def change(clip: Clip, number: int) -> dict[str, Any]:
        meta = [("task", f"fold «{number}»"), ("worker_id", "w/../1")] if number else [("task", "x")]
        return {"meta": meta, "labels": [{"label": "wiping", "score": 0.5}]}

    folder = tmp_path_factory.mktemp("clips")
    paths = [
        write_video(folder / f"{name}.mp4", n_frames=60 * n, width=WIDTH, height=HEIGHT)
        for name, n in (("a", 4), ("b", 2))
    ]
    run, units = make_run(folder / "run", paths, change=change)
    return run, source_frames(run, units)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "MIN_UNIT_S", 4.0)


@pytest.fixture
def no_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets imports torchcodec for videos that it only carries; that needs an FFmpeg of the system's."""
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)


def check_video(mp4: bytes, source: np.ndarray) -> None:
    with av.open(io.BytesIO(mp4)) as container:
        frames = list(container.decode(video=0))
    assert [float(frame.time) for frame in frames] == pytest.approx([k / FPS for k in range(len(source))])
    assert frames[0].key_frame
    for frame, picture in zip(frames, source, strict=True):
        assert psnr(frame.to_ndarray(format="rgb24"), picture) >= 30


def test_shards_hold_each_clip_with_what_is_known_of_it(world: Any, tmp_path: Path) -> None:
    run, sources = world
    out = tmp_path / "out"
    result = export_webdataset(run, out, None, codec="h264", hands=True)
    assert (result.clips, result.files, result.skipped, result.warnings) == (6, 1, [], [])
    rows = {row["clip_id"]: row for row in run.table("clips").to_pylist()}
    with tarfile.open(out / "shard-000000.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        assert all(m.mtime == 0 and m.uid == 0 and m.isreg() for m in tar.getmembers())
    assert {name.partition(".")[0] for name in members} == set(sources) and len(members) == 18
    order = [name.partition(".")[0] for name in members][::3]
    assert order == sorted(order, key=lambda c: (rows[c]["name"], rows[c]["start_s"]))
    for clip_id, source in sources.items():
        check_video(members[f"{clip_id}.mp4"], source)
        known = json.loads(members[f"{clip_id}.json"])
        row = rows[clip_id]
        for name in ("clip_id", "video_id", "start_s", "end_s", "n_frames", "motion", "label"):
            assert known[name] == row[name]
        assert (known["video_name"], known["fps"]) == (row["name"], FPS)
        assert (known["width"], known["height"]) == (WIDTH, HEIGHT)
        assert known["task"] == dict(row["meta"])["task"] and known["labels"] == row["labels"]
        assert {item["key"]: item["value"] for item in known["meta"]} == dict(row["meta"])
        hands = pq.read_table(io.BytesIO(members[f"{clip_id}.hands.parquet"]))
        assert hands.schema.equals(schema.HANDS) and hands.num_rows == 12 + 9
        assert set(hands["clip_id"].to_pylist()) == {clip_id}
    assert str(run.path) not in "".join(p.read_text() for p in out.iterdir() if p.suffix != ".tar")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own readers
def test_shards_open_in_webdataset_and_datasets(world: Any, no_torchcodec: None, tmp_path: Path) -> None:
    run, sources = world
    export_webdataset(run, tmp_path / "out", None, shard_mb=0.03, codec="h264")
    paths = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(paths) > 1 and paths[1].endswith("shard-000001.tar")
    found = {}
    for sample in webdataset.WebDataset(paths, shardshuffle=False).decode():
        found[sample["__key__"]] = sample
    assert set(found) == set(sources)
    for clip_id, sample in found.items():
        check_video(sample["mp4"], sources[clip_id])
        assert sample["json"]["clip_id"] == clip_id
    loaded = datasets.load_dataset(
        "webdataset", data_files=paths, split="train", cache_dir=str(tmp_path / "cache")
    )
    loaded = loaded.cast_column("mp4", datasets.Video(decode=False))
    assert sorted(loaded["__key__"]) == sorted(sources)
    by_id = {row["clip_id"]: row for row in loaded["json"]}
    assert by_id.keys() == sources.keys() and {row["n_frames"] for row in by_id.values()} == {12}


def test_shards_are_as_large_as_they_may_be_and_the_same_for_any_number_of_workers(
    world: Any, tmp_path: Path
) -> None:
    run, _ = world
    limit = 60_000
    export_webdataset(run, tmp_path / "alone", None, shard_mb=limit / (1 << 20), codec="h264")
    export_webdataset(run, tmp_path / "two", None, shard_mb=limit / (1 << 20), codec="h264", workers=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "two")
    sizes, clip_sizes = [], []
    for path in sorted((tmp_path / "alone").glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert len(names) % 2 == 0, "a clip's members lie together"
            ends = [m.offset_data + -(-m.size // 512) * 512 for m in tar.getmembers()]
            clip_sizes += np.diff([0, *ends[1::2]]).tolist()
        sizes.append(path.stat().st_size - len(shards.END))
    assert len(sizes) > 1 and max(sizes) <= limit
    firsts = np.cumsum([0, *[round(s) for s in sizes]])[1:-1]
    for i, end in enumerate(firsts):
        following = clip_sizes[int(np.searchsorted(np.cumsum(clip_sizes), end, side="right"))]
        assert sizes[i] + following > limit, "the next clip would have fitted"


def test_a_folder_of_videos_has_one_table_that_names_them(world: Any, tmp_path: Path) -> None:
    run, sources = world
    out = tmp_path / "out"
    result = export_parquet(run, out, None, codec="h264", hands=True)
    assert (result.clips, result.files, result.skipped) == (6, 6, [])
    table = pd.read_parquet(out / "metadata.parquet")
    assert set(table.clip_id) == set(sources)
    for row in table.itertuples():
        assert row.file_name == f"clips/{row.clip_id[:2]}/{row.clip_id}.mp4"
        check_video((out / row.file_name).read_bytes(), sources[row.clip_id])
    assert len(list(out.rglob("*.mp4"))) == 6
    said = duckdb.sql(
        f"select count(*), min(motion) > 0, list_distinct(list(task)) from '{out}/metadata.parquet'"
    ).fetchall()[0]
    assert said[:2] == (6, True) and "fold «1»" in said[2]
    hands = pq.read_table(out / "hands.parquet")
    assert hands.schema.equals(schema.HANDS) and hands.num_rows == 6 * 21
    export_parquet(run, tmp_path / "two", None, codec="h264", hands=True, workers=2)
    assert contents(out) == contents(tmp_path / "two")


def test_a_folder_of_videos_opens_in_datasets(world: Any, no_torchcodec: None, tmp_path: Path) -> None:
    run, sources = world
    out = tmp_path / "out"
    export_parquet(run, out, 3, codec="h264")
    loaded = datasets.load_dataset(
        "videofolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache")
    )
    loaded = loaded.cast_column("video", datasets.Video(decode=False))
    assert len(loaded) == 3 and set(loaded["clip_id"]) < set(sources)
    for row in loaded:
        assert Path(row["video"]["path"]).stem == row["clip_id"]
        check_video(Path(row["video"]["path"]).read_bytes(), sources[row["clip_id"]])


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_interrupted_goes_on_and_a_video_that_is_gone_costs_its_own_clips(tmp_path: Path, form: str) -> None:
    export: Any = export_webdataset if form == "webdataset" else export_parquet
    paths = [
        write_video(tmp_path / f"{name}.mp4", n_frames=120 + i, width=WIDTH, height=HEIGHT)
        for i, name in enumerate("abc")
    ]
    run, units = make_run(tmp_path / "run", paths)
    out = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run, out, None, codec="h264", progress=interrupt)
    assert not out.exists()
    paths[2].unlink()
    told: list[tuple[int, int]] = []
    result = export(run, out, None, codec="h264", progress=lambda *a: told.append(a))
    assert told[0] == (4, 6) and result.clips == 4
    assert {clip for clip, _ in result.skipped} == {c.clip_id for c in units[2].clips}
    assert "c.mp4: No such file" in result.skipped[0][1] and "2 of 6 chosen clips" in result.warnings[0]
    assert len(list(out.rglob("*.mp4"))) == (4 if form == "parquet" else 0), "no video that no row names"
    names = [path.name for path in tmp_path.iterdir()]
    assert not [name for name in names if ".partial-" in name or ".old-" in name]


EXPORTS: dict[str, Any] = {
    "webdataset": (export_webdataset, export_webdataset_shard),
    "parquet": (export_parquet, export_parquet_shard),
}


@pytest.mark.parametrize("form", EXPORTS)
def test_shards_make_the_bytes_of_one_process_whatever_they_left_behind(
    world: Any, tmp_path: Path, form: str
) -> None:
    run, _ = world
    export, export_shard = EXPORTS[form]
    asked: dict[str, Any] = {"codec": "h264", "hands": True}
    export(run, tmp_path / "alone", None, **asked)
    out = tmp_path / "out"
    left = [export_shard(run, out, None, Shard(i, 3), **asked) for i in (2, 0, 1)]
    assert left == [2, 1, 0] and not out.exists()
    (partial,) = tmp_path.glob("out.partial-*")
    (partial / "dataset").mkdir(exist_ok=True)
    (partial / "dataset" / f"{atomic.TEMPORARY_PREFIX}half.mp4").touch()  # of somebody who was killed
    if form == "webdataset":  # of one who ended it with smaller shards, and was killed too
        (partial / "dataset" / "shard-000007.tar").touch()
    told: list[tuple[int, int]] = []
    export(run, out, None, progress=lambda *a: told.append(a), **asked)
    assert told == [(6, 6)], "what the shards have done is not done again"
    assert contents(out) == contents(tmp_path / "alone")
    assert export_shard(run, out, None, Shard(1, 3), **asked) == 0, "after the end there is nothing to do"
    assert not list(tmp_path.glob("*.partial-*"))


TOGETHER = """
import os, signal, sys
from pathlib import Path
from ego2robot.export import clips
from ego2robot.export.clips_parquet import export_parquet_shard as parquet
from ego2robot.export.webdataset import export_webdataset_shard as webdataset
from ego2robot.jobs.claims import Shard
from ego2robot.store.rundir import RunDir

run, out, form = sys.argv[1:]
clips.MIN_UNIT_S = 4.0

def start(last):
    def tell(done, total):
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)

    if child := os.fork():
        return child
    share = {"webdataset": webdataset, "parquet": parquet}[form]
    share(RunDir.open(run), Path(out), None, Shard(0, 1), codec="h264", hands=True, progress=tell)
    os._exit(0)

def code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

print(code(start(3)), *[code(child) for child in (start(None), start(None))])
"""


@pytest.mark.parametrize("form", EXPORTS)
def test_processes_that_do_the_same_units_at_the_same_time_or_are_killed_spoil_nothing(
    world: Any, tmp_path: Path, form: str
) -> None:
    run, _ = world
    out = tmp_path / "out"
    command = [sys.executable, "-c", TOGETHER, run.path, out, form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL), "0", "0"], done.stderr
    told: list[tuple[int, int]] = []
    EXPORTS[form][0](run, out, None, codec="h264", hands=True, progress=lambda *a: told.append(a))
    EXPORTS[form][0](run, tmp_path / "alone", None, codec="h264", hands=True)
    assert told == [(6, 6)] and contents(out) == contents(tmp_path / "alone")


def test_a_plan_that_others_read_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame({"clip_id": ["a", "b"]})
    mine, other = (Staging(tmp_path / "out", "k") for _ in range(2))
    chosen = clips.pa.Table.from_pandas(table)
    real = atomic.write

    def slowly(path: Path, fill: Any) -> None:
        monkeypatch.undo()
        other.plan(chosen, [0, 1])
        read.append(other.folder.joinpath("plan.parquet").stat().st_ino)
        real(path, fill)

    read: list[int] = []
    monkeypatch.setattr(atomic, "write", slowly)
    mine.plan(chosen, [0, 1])
    assert [path.stat().st_ino for path in mine.folder.iterdir()] == read and mine.n_units == 2


def test_locks_are_taken_as_nfs_gives_them(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There flock(2) is a lock of bytes: a shared one needs a file that can be read, else it is EBADF."""
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    run, _ = world
    assert export_webdataset_shard(run, tmp_path / "out", 2, Shard(0, 1), codec="h264") == 0
    assert export_webdataset(run, tmp_path / "out", 2, codec="h264").clips == 2

    def none(file: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)  # Lustre, where it is mounted without
    with pytest.raises(UserError, match=r"no locks \(Function not implemented\); .*-o flock"):
        export_webdataset_shard(run, tmp_path / "other", 2, Shard(0, 1), codec="h264")


@pytest.mark.parametrize("form", EXPORTS)
def test_a_share_is_asked_for_on_the_command_line(world: Any, tmp_path: Path, form: str) -> None:
    run, _ = world
    command = ["export", form, str(run.path), str(tmp_path / "out"), "--codec", "h264", "--workers", "0"]
    shard = CliRunner().invoke(app, [*command, "--shard", "1/2"])
    assert shard.exit_code == 0, shard.output
    assert "shard 1/2 done, 2 units are left; the same command without --shard ends it" in shard.output
    assert CliRunner().invoke(app, [*command, "--shard", "2/2"]).exit_code == 2
    end = CliRunner().invoke(app, command)
    assert end.exit_code == 0 and "out: 6 clips, " in end.output


def test_a_full_disk_is_one_line_and_the_earlier_export_stays(world: Any, tmp_path: Path) -> None:
    run, _ = world
    out = tmp_path / "out"
    export_webdataset(run, out, 1, codec="h264")
    before = contents(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))
    try:
        with pytest.raises(UserError, match=r"^[^\n]*cannot be written \(File too large\); make room[^\n]*$"):
            export_webdataset(run, out, 6, codec="h264")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="not empty and not a dataset made by ego2robot"):
        export_parquet(run, run.path, 1)


def test_nothing_kept_is_an_empty_dataset_and_a_warning(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", n_frames=60, width=WIDTH, height=HEIGHT)
    dropped = {"decision": "dropped", "reason": "no hands"}
    run, _ = make_run(tmp_path / "run", [path], change=lambda clip, number: dropped)
    assert "no clip was kept" in export_webdataset(run, tmp_path / "w", None).warnings[0]
    assert "no clip was kept" in export_parquet(run, tmp_path / "p", None).warnings[0]
    assert len(pd.read_parquet(tmp_path / "p/metadata.parquet")) == 0
    assert not list((tmp_path / "w").glob("*.tar"))
