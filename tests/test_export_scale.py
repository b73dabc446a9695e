"""An export that many processes share: the same bytes however it is done, and nothing lost on the way."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ego2robot.cli import app
from ego2robot.errors import UserError, VideoError
from ego2robot.export import episode, footage, lerobot, stats, video
from ego2robot.export.episode import ACTION, KNOWN, STATE
from ego2robot.export.files import Limits, cut
from ego2robot.export.lerobot import export_lerobot, export_lerobot_shard
from ego2robot.export.lerobot_format import VIDEO_KEY
from ego2robot.export.staging import Staging
from ego2robot.jobs.claims import Shard
from ego2robot.sources import SOURCES, Source
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.types import Clip, FrameSpec, Trajectory
from tests import export_crashing
from tests.footage import write_video
from tests.test_export_lerobot import (
    FPS,
    HEIGHT,
    WIDTH,
    data_of,
    decode_all,
    episodes_of,
    hand_rows,
    landmarks_at,
    make_run,
    psnr,
    source_frames,
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three videos: five, four and three clips of 12 frames."""
    folder = tmp_path_factory.mktemp("videos")
    return [
        write_video(folder / f"{name}.mp4", n_frames=60 * n, width=WIDTH, height=HEIGHT)
        for name, n in (("a", 5), ("b", 4), ("c", 3))
    ]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clips a unit, so that there is something to share."""
    monkeypatch.setattr(lerobot, "MIN_UNIT_S", 4.0)


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def check_pointers(out: Path, sources: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Everything that says where something lies leads there; returns the episodes."""
    rows, data = episodes_of(out), data_of(out)
    info = json.loads((out / "meta/info.json").read_text())
    assert info["total_episodes"] == len(rows) and info["total_frames"] == data.num_rows
    assert data["index"].to_pylist() == list(range(data.num_rows))
    pictures: dict[Path, np.ndarray] = {}
    begin = 0
    for number, row in enumerate(rows):
        assert row["episode_index"] == number
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (begin, begin + row["length"])
        file = out / info["data_path"].format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        assert pq.read_table(file)["episode_index"].to_pylist().count(number) == row["length"]
        place = [row[f"videos/{VIDEO_KEY}/{key}_index"] for key in ("chunk", "file")]
        path = out / info["video_path"].format(video_key=VIDEO_KEY, chunk_index=place[0], file_index=place[1])
        if path not in pictures:
            pictures[path] = decode_all(path)[0]
        first = round(row[f"videos/{VIDEO_KEY}/from_timestamp"] * FPS)
        shown = pictures[path][first : first + row["length"]]
        for picture, source in zip(shown, sources[row["clip_id"]], strict=True):
            assert psnr(picture, source) >= 30
        begin += row["length"]
    assert {str(p) for p in pictures} == {str(p) for p in (out / "videos").rglob("*.mp4")}
    assert sum(len(p) for p in pictures.values()) == data.num_rows, "videos hold what no episode points to"
    return rows


def test_any_number_of_workers_and_shards_give_the_same_bytes(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to eight processes, each of which has something to do: 12 units, and several files of each kind."""
    monkeypatch.setattr(lerobot, "MIN_UNIT_S", 2.0)
    run, units = make_run(tmp_path / "run", videos)
    options: dict[str, Any] = {"codec": "h264", "limits": Limits(data_bytes=12_000)}
    export_lerobot(run, tmp_path / "alone", 50, **options)
    export_lerobot(run, tmp_path / "eight", 50, **options, workers=8)
    left = [export_lerobot_shard(run, tmp_path / "shards", 50, Shard(i, 3), **options) for i in (2, 0, 1)]
    assert left == [8, 4, 0] and not (tmp_path / "shards").exists()
    told: list[tuple[int, int]] = []
    export_lerobot(run, tmp_path / "shards", 50, **options, progress=lambda *a: told.append(a))
    assert told == [(12, 12)], "what the shards have done is not done again"
    again = export_lerobot_shard(run, tmp_path / "shards", 50, Shard(1, 3), **options)
    assert again == 0, "a shard that starts after the end does nothing again"
    expected = contents(tmp_path / "alone")
    assert sum(name.endswith(".mp4") for name in expected) == 12
    assert min(sum(name.startswith(kind) for name in expected) for kind in ("data/", "meta/episodes/")) > 2
    for other in ("eight", "shards"):
        found = contents(tmp_path / other)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
    assert not list(tmp_path.glob("*.partial-*"))
    check_pointers(tmp_path / "alone", source_frames(run, units))


KILLED = """
import os, signal, sys
from pathlib import Path
from ego2robot.export import lerobot
from ego2robot.store.rundir import RunDir

def die(done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

lerobot.MIN_UNIT_S = 4.0
lerobot.export_lerobot(RunDir.open(sys.argv[1]), Path(sys.argv[2]), 50, codec="h264", progress=die)
"""


def test_a_killed_export_goes_on_with_what_was_complete(videos: list[Path], tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", videos)
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, run.path, out], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    told: list[tuple[int, int]] = []
    export_lerobot(run, out, 50, codec="h264", progress=lambda *a: told.append(a))
    assert told[0] == (4, 12) and told[-1] == (12, 12), "two units of two clips were complete"
    export_lerobot(run, tmp_path / "undisturbed", 50, codec="h264")
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not list(tmp_path.glob("*.partial-*"))


def test_an_interrupted_export_keeps_what_is_complete_and_other_settings_do_not_take_it(
    videos: list[Path], tmp_path: Path
) -> None:
    run, _ = make_run(tmp_path / "run", videos[2:])
    out = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_lerobot(run, out, 50, codec="h264", progress=interrupt)
    (kept,) = tmp_path.glob("out.partial-*")
    told: list[tuple[int, int]] = []
    export_lerobot(run, out, 50, codec="h264", action="wrist", progress=lambda *a: told.append(a))
    assert told[0] == (1, 3) and not kept.exists(), "its own folder; the other's is removed at the end"


def test_only_one_process_ends_an_export(videos: list[Path], tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", videos[2:])
    out = tmp_path / "out"
    export = lerobot._prepare(run, out, 50, "hands", "h264", "compensated", "action", Limits(), False)
    staging = Staging(out.resolve(), export.order.key)
    with (
        staging.held(shared=True),
        pytest.raises(UserError, match=r"another process writes this dataset; wait .*--shard"),
    ):
        export_lerobot(run, out, 50, codec="h264")
    with staging.held(), pytest.raises(UserError, match="another process writes this dataset"):
        export_lerobot_shard(run, out, 50, Shard(0, 2), codec="h264")


def test_clips_that_cannot_be_decoded_leave_no_hole(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that the look at a video's identity does not see: only the decoder finds it."""
    folder = tmp_path / "videos"
    folder.mkdir()
    paths = [Path(shutil.copy(path, folder / path.name)) for path in videos]
    run, units = make_run(tmp_path / "run", paths)
    sources = source_frames(run, units)
    data = bytearray(paths[0].read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = np.random.default_rng(0).bytes(4000)
    paths[0].write_bytes(data)
    ids = {unit.video.blob.path: unit.video.video_id for unit in units}
    monkeypatch.setattr(footage, "identity", lambda blob: ids[blob.path])
    result = export_lerobot(run, tmp_path / "out", 50, codec="h264", limits=Limits(data_bytes=12_000))
    assert 0 < len(result.skipped) < 5 and result.episodes == 12 - len(result.skipped)
    assert all("corrupt" in reason or "ends before" in reason for _, reason in result.skipped)
    rows = check_pointers(tmp_path / "out", sources)
    assert {row["clip_id"] for row in rows} == set(sources) - {clip for clip, _ in result.skipped}
    assert [row["start_s"] for row in rows if row["video"] == "b.mp4"] == [0.0, 2.0, 4.0, 6.0]


def test_a_video_that_kills_the_decoder_costs_its_own_episodes(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, units = make_run(tmp_path / "run", videos)
    bad = next(unit.video.video_id for unit in units if unit.video.name == "b.mp4")
    (run.path / "kills").write_text(bad)
    monkeypatch.setattr(lerobot, "worker", export_crashing.worker)
    result = export_lerobot(run, tmp_path / "out", 50, codec="h264", workers=2)
    assert result.episodes == 8 and len(result.skipped) == 4
    assert {reason for _, reason in result.skipped} == {"the decoding process was ended by SIGSEGV"}
    assert {row["video"] for row in check_pointers(tmp_path / "out", source_frames(run, units))} == {
        "a.mp4",
        "c.mp4",
    }


def test_hands_keep_their_identity_across_units(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hand through a whole video, called the other one from the second clip on: it stays what it was."""

    def calling(clip: Clip) -> list[dict[str, Any]]:
        rows = hand_rows(clip, {"left": range(clip.n_frames)})
        for row in rows:
            shown = landmarks_at(clip.first + row["frame"], "left")
            row.update({"landmarks": shown.ravel(), "box": [*shown.min(0)[:2], *shown.max(0)[:2]]})
            if clip.first:
                row.update(side="right", score=0.6)
        return rows

    run, _ = make_run(tmp_path / "run", videos[:1], hands_of=calling)
    export_lerobot(run, tmp_path / "units", 50, codec="h264")
    monkeypatch.setattr(lerobot, "MIN_UNIT_S", 30.0)
    export_lerobot(run, tmp_path / "whole", 50, codec="h264")
    assert len(list((tmp_path / "units/videos").rglob("*.mp4"))) == 3
    assert len(list((tmp_path / "whole/videos").rglob("*.mp4"))) == 1
    left = episode.NAMES["hands"][0].index("left.visible")
    for name in ("units", "whole"):
        state = np.array(data_of(tmp_path / name)[STATE].to_pylist())
        assert state[:, left].all(), name
    assert data_of(tmp_path / "units").equals(data_of(tmp_path / "whole"))
    assert contents(tmp_path / "units")["meta/stats.json"] == contents(tmp_path / "whole")["meta/stats.json"]


def test_hands_are_followed_from_far_enough_back() -> None:
    rows = [{"video_id": "v", "first": 12 * i, "n_frames": 12} for i in range(100)]
    gap = [{**row, "first": row["first"] + 1000 * (i >= 95)} for i, row in enumerate(rows)]
    assert len(episode.warm_up(rows[:99], rows[99], FPS)) == episode.WARM_UP
    assert episode.warm_up(gap[:99], gap[99], FPS) == gap[95:99]
    assert episode.warm_up(rows[:1], {**rows[1], "video_id": "w"}, FPS) == []


def test_a_unit_whose_videos_are_larger_than_expected_makes_more_files(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, units = make_run(tmp_path / "run", videos[:1])
    monkeypatch.setattr(lerobot, "MIN_UNIT_S", 30.0)
    monkeypatch.setattr(video, "EXPECTED_BYTES", 1e-9)
    limit = 40_000
    export_lerobot(run, tmp_path / "out", 50, codec="h264", limits=Limits(video_bytes=limit, chunk_files=2))
    files = sorted((tmp_path / "out/videos").rglob("*.mp4"))
    assert len(files) > 1 and all(path.stat().st_size < limit + 2000 for path in files)
    check_pointers(tmp_path / "out", source_frames(run, units))


def test_units_are_cut_by_the_settings_alone() -> None:
    spec, fps = FrameSpec(360, 640), 6
    assert lerobot.unit_frames(900, fps, spec, Limits()) == 4 * fps, "this module's shortest unit"
    assert lerobot.unit_frames(64 * 1200, fps, spec, Limits()) == 1200
    assert lerobot.unit_frames(10**9, fps, spec, Limits()) == video.MAX_FILE_S * fps
    large = FrameSpec(2160, 3840)
    assert lerobot.unit_frames(10**9, 30, large, Limits()) * 3840 * 2160 * video.EXPECTED_BYTES < 200 << 20
    assert lerobot.unit_frames(10, 6, large, Limits(video_bytes=1)) == 1


def test_files_are_cut_where_the_limit_would_be_passed() -> None:
    assert cut(np.array([3, 3, 3, 9, 1]), 6).tolist() == [0, 0, 1, 2, 3]
    assert cut(np.array([7, 7]), 6).tolist() == [0, 1]
    assert cut(np.array([0, 0, 5]), 5).tolist() == [0, 0, 0] and cut(np.zeros(0, int), 5).tolist() == []


def test_exact_quantiles_are_found_by_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of all sizes and signs, equal ones, zeros of both signs: as numpy finds them by sorting."""
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(5000, 3)) * 10.0 ** rng.integers(-30, 30, (5000, 3))
    values = np.concatenate([spread, np.full((500, 3), 0.25), np.full((200, 3), -0.0)]).astype(np.float32)
    values[:, 2] = -7.5
    rng.shuffle(values)
    for name, some in (("a", values[:100]), ("b", values[100:])):
        column = pa.FixedSizeListArray.from_arrays(pa.array(some.ravel()), 3)
        pq.write_table(pa.table({"x": column}), tmp_path / f"{name}.parquet")
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    at_once = stats.column_statistics(files, "x", 3)
    monkeypatch.setattr(stats, "COLUMN_BYTES", 1000)
    monkeypatch.setattr(stats, "BLOCK_ROWS", 777)
    counted = stats.column_statistics(files, "x", 3)
    for name, q in stats.QUANTILES.items():
        assert np.array_equal(counted[name], at_once[name])
        assert np.allclose(counted[name], np.quantile(values.astype(np.float64), q, axis=0), rtol=1e-12)
    assert np.allclose(counted["mean"], values.mean(0, dtype=np.float64), rtol=1e-9)
    assert np.allclose(counted["std"], values.std(0, dtype=np.float64), rtol=1e-9)
    assert counted["count"].tolist() == [5700]


def test_the_commands_share_an_export_and_say_what_is_left(videos: list[Path], tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", videos[2:])
    out = tmp_path / "out"
    options = ["--codec", "h264", "--workers", "0"]

    def command(*arguments: str | Path) -> str:
        done = CliRunner().invoke(app, ["export", *map(str, arguments), *options])
        assert done.exit_code == 0, done.output
        return done.output

    said = command("lerobot", run.path, out, "--shard", "0/2")
    assert "shard 0/2 done, 1 units are left; the same command without --shard ends it" in said
    assert "exporting" in said and not out.exists()
    assert "3 episodes, 36 frames" in command("lerobot", run.path, out) and out.is_dir()
    said = command("webdataset", run.path, tmp_path / "shards", "--shard-mb", "1", "--hands")
    assert "3 clips, 1 shards" in said
    assert "2 clips, 2 videos" in command("parquet", run.path, tmp_path / "videos", "--top", "2")


def test_near_duplicates_are_left_out_when_asked(videos: list[Path], tmp_path: Path) -> None:
    run, units = make_run(tmp_path / "run", videos[2:])
    with pytest.raises(UserError, match="near-duplicates were not looked for"):
        export_lerobot(run, tmp_path / "out", 50, only_representatives=True)
    ids = [clip.clip_id for clip in units[0].clips]
    table = pa.table(
        {
            "clip_id": sorted(ids),
            "skill": pa.array([0] * 3, pa.int32()),
            "representative": [clip != ids[1] for clip in sorted(ids)],
        }
    )
    atomic.write_parquet(run.path / "skills/assignment.parquet", table)
    atomic.write_json(
        run.path / "skills/skills.json", {"random": False, "skills": [{"skill": 0, "name": "one"}]}
    )
    export_lerobot(run, tmp_path / "out", 50, codec="h264", only_representatives=True)
    assert [row["clip_id"] for row in episodes_of(tmp_path / "out")] == [ids[0], ids[2]]


# -- states of the dataset's own -------------------------------------------------------------------


class Measured(Source):
    """A source whose videos come with a state of three numbers, known from time to time."""

    def __init__(self, action: bool = True) -> None:
        self.action = action
        self.unknown: dict[str, Sequence[float]] = {}  # name of the video → times at which y is not known
        self.broken = ""  # name of a video whose file cannot be read
        self.other = ""  # name of a video with another state

    def candidates(self, path: str, skip: Path | None, options: Any = None) -> Any:
        yield from ()

    def trajectory(self, video: Any, times_s: np.ndarray, options: Any = None) -> Trajectory | None:
        if video.name == self.broken:
            raise VideoError(video.name, "its HDF5 file is truncated", "re-download it", "truncated")
        state = np.stack([times_s, np.sin(times_s), 7 - times_s], 1).astype(np.float32)
        state[np.isin(np.round(times_s, 3), np.round(self.unknown.get(video.name, ()), 3)), 1] = np.nan
        names = ("left.wrist.x", "left.wrist.y", "z" if video.name == self.other else "left.wrist.z")
        action = 2 * state[:, :2] if self.action else state[:, :0]
        return Trajectory(state, action, names, ("dx", "dy") if self.action else (), "metres")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    source = Measured()
    monkeypatch.setitem(SOURCES, "folder", source)
    return source


def vectors(out: Path, row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    part = data_of(out).slice(row["dataset_from_index"], row["length"])
    return {name: np.array(part[name].to_pylist(), np.float32) for name in (STATE, ACTION, KNOWN)}


def own_task(clip: Clip, number: int) -> dict[str, Any]:
    return {"meta": [("task", f"stack cup {number}")]}


def test_a_datasets_own_state_and_action_are_kept_to_the_bit(
    measured: Measured, videos: list[Path], tmp_path: Path
) -> None:
    run, _ = make_run(tmp_path / "run", videos[:2], change=own_task)
    out = tmp_path / "out"
    result = export_lerobot(run, out, 50, schema="auto", codec="h264")
    assert result.warnings == []
    info = json.loads((out / "meta/info.json").read_text())["features"]
    assert info[STATE]["names"] == ["left.wrist.x", "left.wrist.y", "left.wrist.z"]
    assert info[ACTION]["names"] == ["dx", "dy"] and info[STATE]["units"] == info[ACTION]["units"] == "metres"
    for row in episodes_of(out):
        times = row["start_s"] + np.arange(row["length"]) / FPS
        found = vectors(out, row)
        expected = np.stack([times, np.sin(times), 7 - times], 1).astype(np.float32)
        assert np.array_equal(found[STATE], expected) and np.array_equal(found[ACTION], 2 * expected[:, :2])
        assert (found[KNOWN] == 1).all()
        assert row["tasks"] == [f"stack cup {round(row['start_s'] / 2)}"], "its own words, not a model's"
    text = (out / "README.md").read_text()
    assert "Measured states" in text and "metres" in text and "Pseudo-actions" not in text
    assert json.loads((out / "meta/ego2robot.json").read_text())["pseudo_actions"] is False


def test_what_a_trajectory_does_not_know_is_held_and_marked(
    measured: Measured, videos: list[Path], tmp_path: Path
) -> None:
    measured.action = False
    measured.unknown["c.mp4"] = [k / FPS for k in (0, 1, 5, 6)]
    run, _ = make_run(tmp_path / "run", videos[2:])
    export_lerobot(run, tmp_path / "out", 50, schema="native", codec="h264")
    first = episodes_of(tmp_path / "out")[0]
    found = vectors(tmp_path / "out", first)
    y = np.sin(np.arange(12) / FPS).astype(np.float32)
    y[[0, 1, 5, 6]] = y[[2, 2, 4, 4]]
    assert np.array_equal(found[STATE][:, 1], y)
    assert found[KNOWN][:, 0].tolist() == [
        np.float32(2 / 3) if k in (0, 1, 5, 6) else np.float32(1) for k in range(12)
    ]
    assert np.array_equal(found[ACTION][:-1], found[STATE][1:]), "an action is the state of the next frame"
    assert np.array_equal(found[ACTION][-1], found[STATE][-1])
    assert np.isfinite(found[ACTION]).all()


def test_episodes_without_a_usable_trajectory_are_left_out_one_line_each(
    measured: Measured, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, units = make_run(tmp_path / "run", videos)
    measured.broken, measured.other = "b.mp4", "c.mp4"
    result = export_lerobot(run, tmp_path / "out", 50, schema="native", codec="h264")
    reasons = [reason for _, reason in result.skipped]
    assert result.episodes == 5 and len(reasons) == 7
    assert reasons[0] == "b.mp4: its HDF5 file is truncated; re-download it"
    assert reasons[4].startswith("c.mp4 at 0.0 s: its state has other columns")
    check_pointers(tmp_path / "out", source_frames(run, units))
    monkeypatch.setattr(episode, "MIN_KNOWN", 0.9)
    measured.unknown["a.mp4"] = [k / FPS for k in range(12)]
    result = export_lerobot(run, tmp_path / "out", 50, schema="native", codec="h264")
    assert result.episodes == 4
    assert result.skipped[0][1] == "a.mp4 at 0.0 s: only 60% of its states and actions are known"


def test_native_needs_a_dataset_that_measured_something(videos: list[Path], tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", videos[2:])
    with pytest.raises(UserError, match=r"schema=native: folder: .*no states or actions of its own; use"):
        export_lerobot(run, tmp_path / "out", 50, schema="native")
    export_lerobot(run, tmp_path / "out", 1, schema="auto", codec="h264")
    assert json.loads((tmp_path / "out/meta/ego2robot.json").read_text())["schema"] == "hands"


def test_a_plan_that_lost_a_clip_costs_that_clip(videos: list[Path], tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", videos[1:])
    other, _ = make_run(tmp_path / "other", videos[:1])
    shutil.copy(other.plan_path, run.plan_path)
    result = export_lerobot(RunDir.open(run.path), tmp_path / "out", 50, codec="h264")
    assert result.episodes == 0 and len(result.skipped) == 7
    assert "plan does not have it any more" in result.skipped[0][1]
