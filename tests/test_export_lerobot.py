"""LeRobot export: layout, times, vectors, statistics, provenance, and what happens when things go wrong."""

from __future__ import annotations

import gc
import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from ego2robot import config, decode
from ego2robot.decode import policy
from ego2robot.errors import UserError
from ego2robot.export import episode, lerobot, staging, stats, video
from ego2robot.export.episode import ACTION, STATE
from ego2robot.export.files import Limits
from ego2robot.export.lerobot import export_lerobot
from ego2robot.export.lerobot_format import VIDEO_KEY
from ego2robot.jobs.plan import clips_of, units_of
from ego2robot.sources.base import identity
from ego2robot.store import atomic, schema
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_table
from ego2robot.types import Blob, Clip, FrameSpec, Unit, Video
from tests.footage import frame_number, write_video

HEIGHT, WIDTH, FPS = 180, 320, 6
CONFIG = {
    "clips": {"duration_s": 2.0, "stride_s": 2.0, "sample_fps": float(FPS), "min_frames": 5},
    "frames": {"height": HEIGHT, "width": WIDTH},
}


def landmarks_at(frame: int, side: str) -> np.ndarray:
    """float32 [21, 3]: a hand that drifts; every coordinate tells landmark, axis, side and frame apart."""
    base = np.arange(63, dtype=np.float32).reshape(21, 3) / 200
    shift = np.array([0.01 * frame, -0.004 * frame, 0], np.float32)
    return (base + (0.05 if side == "left" else 0.45) + shift).astype(np.float32)


def hand_rows(clip: Clip, seen: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    return [
        {
            "clip_id": clip.clip_id,
            "frame": frame,
            "time_s": clip.start_s + frame / clip.sample_fps,
            "side": side,
            "score": 0.9,
            "box": [*landmarks_at(frame, side).min(0)[:2], *landmarks_at(frame, side).max(0)[:2]],
            "landmarks": landmarks_at(frame, side).ravel(),
            "presence": 0.99,
            "world": landmarks_at(frame, side).ravel(),
        }
        for side, frames in seen.items()
        for frame in frames
    ]


def clip_row(unit: Unit, clip: Clip, **changes: Any) -> dict[str, Any]:
    info = unit.video.info
    assert info is not None
    number = clip.first // 12
    return {
        "clip_id": clip.clip_id,
        "video_id": unit.video.video_id,
        "source": "folder",
        "name": unit.video.name,
        "start_s": clip.start_s,
        "end_s": clip.end_s,
        "n_frames": clip.n_frames,
        "fps": info.fps,
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
        "motion": 0.1 + 0.01 * number,
        "hand_visibility": 0.5 + 0.1 * number,
        "decision": "kept",
        "reason": None,
        "label": f"task <b>{number % 2}</b> | *x*",
        "label_score": 0.9 - 0.1 * number,
        "labels": [],
        "meta": [],
        **changes,
    }


def make_run(
    folder: Path,
    videos: Sequence[Path],
    tree: Mapping[str, Any] = CONFIG,
    change: Callable[[Clip, int], dict[str, Any]] = lambda clip, number: {},
    random_clip: bool = False,
    hands_of: Callable[[Clip], list[dict[str, Any]]] | None = None,
) -> tuple[RunDir, list[Unit]]:
    """A run directory as the pipeline would leave it: real videos and plan, invented scores and hands."""
    run = RunDir.create_or_resume(folder, config.build(tree), {"weights": {"clip": "test"}})
    units: list[Unit] = []
    for path in videos:
        blob = Blob(str(path), 0, path.stat().st_size)
        info = decode.probe(path.name, blob)
        found = Video(identity(blob), path.name, "folder", blob, {}, info)
        units += units_of(found, clips_of(found.video_id, info, run.config.clips))
    atomic.write_parquet(folder / "plan" / "units.parquet", units_table(units))
    for unit in units:
        clips = [clip_row(unit, c, **change(c, i)) for i, c in enumerate(unit.clips)]
        both = hands_of or (
            lambda c: hand_rows(c, {"left": range(c.n_frames), "right": range(3, c.n_frames)})
        )
        hands = [row for clip in unit.clips for row in both(clip)]
        ids = pa.array([clip.clip_id for clip in unit.clips])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * len(ids), np.float16)), 2)
        run.commit(
            [unit.unit_id],
            {
                "clips": pa.Table.from_pylist(clips, schema=schema.CLIPS),
                "hands": pa.Table.from_pylist(hands, schema=schema.HANDS),
                "embeddings/clip": pa.Table.from_arrays(
                    [ids, vectors], schema=schema.embedding(2, "clip", "test", random_clip)
                ),
            },
        )
    return run, units


def source_frames(run: RunDir, units: Sequence[Unit]) -> dict[str, np.ndarray]:
    """clip_id → uint8 [T, H, W, 3], decoded again on their own."""
    frames = run.config.frames
    spec = FrameSpec(frames.height, frames.width, frames.fit)
    found = {}
    for unit in units:
        info = unit.video.info
        assert info is not None
        backend, _ = policy.pick(info, "auto", "cpu")
        for item in decode.read_clips(
            unit.video.name, unit.video.blob, info, unit.clips, spec, backend, "cpu"
        ):
            assert not isinstance(item, decode.ClipFailure)
            found[item.clip.clip_id] = item.frames_THWC.numpy()
    return found


def episodes_of(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "meta" / "episodes").glob("*/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def data_of(out: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(f) for f in sorted((out / "data").glob("*/*.parquet")))


def decode_all(path: Path) -> tuple[np.ndarray, list[float], list[bool]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return pictures, [float(frame.time) for frame in frames], [frame.key_frame for frame in frames]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two videos: five clips of 12 frames, and two with a last one of 7 (an odd number)."""
    folder = tmp_path_factory.mktemp("footage")
    return [
        write_video(folder / "b.mp4", n_frames=300, width=WIDTH, height=HEIGHT),
        write_video(folder / "a.mp4", n_frames=95, width=WIDTH, height=HEIGHT, codec="hevc"),
    ]


@pytest.fixture(scope="module")
def exported(
    footage: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, list[Unit], Path, lerobot.ExportResult]:
    folder = tmp_path_factory.mktemp("exported")
    run, units = make_run(folder / "run", footage)
    out = folder / "dataset"
    return run, units, out, export_lerobot(run, out, top=50)


def test_info_describes_the_dataset_as_lerobot_expects(exported: Any) -> None:
    _, _, out, result = exported
    info = json.loads((out / "meta" / "info.json").read_text())
    assert (result.episodes, result.frames, result.tasks) == (7, 79, 2)
    assert result.skipped == [] and result.warnings == []
    assert result.bytes == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert info["codebase_version"] == "v3.0" and info["fps"] == FPS and isinstance(info["fps"], int)
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (7, 79, 2)
    assert info["splits"] == {"train": "0:7"} and info["chunks_size"] == 1000
    assert (info["data_files_size_in_mb"], info["video_files_size_in_mb"]) == (100, 200)
    picture = info["features"][VIDEO_KEY]
    assert picture["dtype"] == "video" and picture["shape"] == [HEIGHT, WIDTH, 3]
    assert picture["info"]["video.codec"] == "av1" and picture["info"]["video.fps"] == FPS
    for name, size in ((STATE, 96), (ACTION, 4)):
        feature = info["features"][name]
        assert feature["dtype"] == "float32" and feature["shape"] == [size]
        assert len(set(feature["names"])) == size
    assert info["features"]["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}
    place = {"chunk_index": 0, "file_index": 0}
    assert (out / info["data_path"].format(**place)).is_file()
    assert (out / info["video_path"].format(video_key=VIDEO_KEY, **place)).is_file()
    assert not list(out.parent.glob("dataset.*")), "something was left beside the dataset"


def test_episodes_lie_in_order_of_video_and_time_and_name_their_clip(exported: Any) -> None:
    run, _, out, _ = exported
    rows = episodes_of(out)
    kept = sorted(run.table("clips").to_pylist(), key=lambda row: (row["name"], row["start_s"]))
    assert [row["clip_id"] for row in rows] == [row["clip_id"] for row in kept]
    assert [row["length"] for row in rows] == [12, 7, 12, 12, 12, 12, 12]
    begin = 0
    for number, (row, clip) in enumerate(zip(rows, kept, strict=True)):
        assert row["episode_index"] == number and row["tasks"] == [clip["label"]]
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (begin, begin + row["length"])
        assert (row["video"], row["start_s"], row["end_s"]) == (clip["name"], clip["start_s"], clip["end_s"])
        for name in ("motion", "hand_visibility", "label", "label_score"):
            assert row[name] == clip[name]
        assert row["skill_id"] is None and row["skill"] is None
        begin += row["length"]
    assert json.loads((out / "meta/ego2robot.json").read_text())["fingerprint"] == run.fingerprint


@pytest.mark.parametrize("codec", ["av1", "h264"])
def test_video_holds_the_source_frames_at_exact_times_with_keyframes_at_episode_starts(
    exported: Any, tmp_path: Path, codec: lerobot.CodecName
) -> None:
    run, units, out, _ = exported
    if codec != "av1":
        out = tmp_path / codec
        export_lerobot(run, out, top=50, codec=codec)
    pictures, times, keys = decode_all(out / f"videos/{VIDEO_KEY}/chunk-000/file-000.mp4")
    assert np.allclose(times, np.arange(79) / FPS, atol=1e-6)
    sources = source_frames(run, units)
    for row in episodes_of(out):
        begin = row[f"videos/{VIDEO_KEY}/from_timestamp"]
        assert row[f"videos/{VIDEO_KEY}/to_timestamp"] == pytest.approx(begin + row["length"] / FPS)
        first = round(begin * FPS)
        assert keys[first], "an episode starts without a keyframe"
        for k, source in enumerate(sources[row["clip_id"]]):
            assert psnr(pictures[first + k], source) >= 30
        wanted = frame_number(sources[row["clip_id"]][0])
        assert frame_number(pictures[first]) == wanted == round(row["start_s"] * 30)
    with av.open(str(out / f"videos/{VIDEO_KEY}/chunk-000/file-000.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == FPS and stream.codec_context.codec.canonical_name == codec
        assert float(stream.duration * stream.time_base) == pytest.approx(79 / FPS)


def test_an_episode_decodes_without_the_ones_before_it() -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), np.uint8)
    folder_bytes = [video.encode_episode(p, FPS, video.CODECS["h264"]) for p in (pictures, pictures[::-1])]
    for mp4, expected in zip(folder_bytes, (pictures, pictures[::-1]), strict=True):
        with av.open(io.BytesIO(mp4)) as container:
            assert len(list(container.decode(video=0))) == len(expected)


@pytest.mark.parametrize("codec", ["av1", "h264"])
def test_colours_come_back(codec: str) -> None:
    colours = np.array(
        [[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 40], [128] * 3, [0] * 3, [255] * 3]
    )
    pictures = np.broadcast_to(colours.astype(np.uint8)[:, None, None], (len(colours), HEIGHT, WIDTH, 3))
    mp4 = video.encode_episode(pictures, FPS, video.CODECS[codec])
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (5, 1)
        for frame, colour in zip(container.decode(stream), colours, strict=True):
            mean = frame.to_ndarray(format="rgb24").mean((0, 1))
            assert np.abs(mean - colour).max() <= 4, (mean, colour)


def test_states_and_actions_follow_the_hands_of_the_right_clip(exported: Any, tmp_path: Path) -> None:
    run, _, _, _ = exported
    out = tmp_path / "dataset"
    export_lerobot(run, out, top=50, action="wrist")
    names = episode.NAMES["hands"][0]
    data = data_of(out).to_pydict()
    for row in episodes_of(out):
        rows = slice(row["dataset_from_index"], row["dataset_to_index"])
        state, action = np.array(data[STATE][rows]), np.array(data[ACTION][rows])
        n = row["length"]
        assert state.shape == (n, 96) and action.shape == (n, 4)
        for side, first in (("left", 0), ("right", 3)):
            visible = state[:, names.index(f"{side}.visible")]
            assert visible.tolist() == [float(k >= first) for k in range(n)]
            for k in range(first, n):
                expected = landmarks_at(k, side)
                assert state[k, names.index(f"{side}.wrist.x")] == pytest.approx(expected[0, 0], abs=1e-6)
                assert state[k, names.index(f"{side}.pinky_tip.y")] == pytest.approx(
                    expected[20, 1], abs=1e-6
                )
                box = state[k, names.index(f"{side}.box.x_min") :][:4]
                assert box == pytest.approx([*expected.min(0)[:2], *expected.max(0)[:2]], abs=1e-6)
            assert not state[:first, [i for i, name in enumerate(names) if name.startswith(side)]].any()
        assert action[:-1, :2] == pytest.approx(np.tile([0.01, -0.004], (n - 1, 1)), abs=1e-5)
        assert not action[:2, 2:].any(), "motion of a hand that is not seen"
        assert action[3:-1, 2:] == pytest.approx(np.tile([0.01, -0.004], (n - 4, 1)), abs=1e-5)


def panning(index: int, width: int, height: int) -> np.ndarray:
    """The view of a camera that turns left: a still scene that moves 2 pixels to the right each frame."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x = x - 2 * index
    waves = [np.sin(x / a + y / b + c) for a, b, c in ((7, 11, 0), (13, -5, 1), (-23, 17, 2), (31, 9, 4))]
    return np.stack([127 + 30 * sum(waves) * k for k in (1.0, 0.8, 0.6)], -1).clip(0, 255).astype(np.uint8)


def test_a_wrist_that_rests_in_the_scene_does_not_act_while_the_camera_turns(tmp_path: Path) -> None:
    path = write_video(tmp_path / "pan.mp4", 60, WIDTH, HEIGHT, picture=panning)
    step = 2 * 5 / WIDTH  # 5 frames of the video between two sampled ones

    def resting(clip: Clip) -> list[dict[str, Any]]:
        rows = hand_rows(clip, {"left": range(clip.n_frames), "right": ()})
        for row in rows:
            points = landmarks_at(0, "left") + np.array([step * row["frame"], 0, 0], np.float32)
            row |= {"landmarks": points.ravel(), "box": [*points.min(0)[:2], *points.max(0)[:2]]}
        return rows

    run, _ = make_run(tmp_path / "run", [path], hands_of=resting)
    actions = {}
    for action in ("wrist", "compensated"):
        out = tmp_path / action
        export_lerobot(run, out, top=1, action=action, smooth="none")
        actions[action] = np.array(data_of(out)[ACTION].to_pylist())
        assert json.loads((out / "meta/ego2robot.json").read_text())["action"] == action
    assert actions["wrist"][:, 0] == pytest.approx(np.full(12, step), abs=1e-4)
    assert np.abs(actions["compensated"]).max() < 0.1 * step


def test_reference_schema_has_four_and_two_numbers(exported: Any, tmp_path: Path) -> None:
    run = exported[0]
    export_lerobot(run, tmp_path / "out", top=2, schema="reference", codec="h264")
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["features"][STATE]["shape"] == [4] and info["features"][ACTION]["shape"] == [2]
    data = data_of(tmp_path / "out").to_pydict()
    assert np.shape(data[STATE]) == (24, 4) and np.shape(data[ACTION]) == (24, 2)
    assert np.abs(data[ACTION]).max() <= 1 and np.any(data[STATE])


def test_index_columns_count_up(exported: Any) -> None:
    _, _, out, _ = exported
    data = data_of(out)
    rows = episodes_of(out)
    assert data["index"].to_pylist() == list(range(79))
    assert data["episode_index"].to_pylist() == [r["episode_index"] for r in rows for _ in range(r["length"])]
    frames = [k for r in rows for k in range(r["length"])]
    assert data["frame_index"].to_pylist() == frames
    assert np.array_equal(data["timestamp"].to_numpy(), (np.array(frames) / FPS).astype(np.float32))
    tasks = pq.read_table(out / "meta/tasks.parquet").to_pydict()
    named = dict(zip(tasks["task_index"], tasks["task"], strict=True))
    assert [named[i] for i in data["task_index"].to_pylist()] == [
        r["tasks"][0] for r in rows for _ in range(r["length"])
    ]


def test_tables_open_with_pandas_and_duckdb(exported: Any) -> None:
    _, _, out, _ = exported
    tasks = pd.read_parquet(out / "meta/tasks.parquet")
    assert list(tasks.columns) == ["task_index"] and tasks.index.name == "task"
    assert (
        tasks.iloc[1].name == "task <b>1</b> | *x*" and int(tasks.loc["task <b>1</b> | *x*"].task_index) == 1
    )
    counts = duckdb.sql(f"select count(*), max(episode_index) from '{out}/data/*/*.parquet'").fetchall()
    assert counts == [(79, 6)]
    described = json.loads(pq.read_schema(out / "data/chunk-000/file-000.parquet").metadata[b"huggingface"])
    assert described["info"]["features"][STATE]["length"] == 96


def naive(values: np.ndarray) -> dict[str, np.ndarray]:
    quantiles = {name: np.quantile(values, q, axis=0) for name, q in stats.QUANTILES.items()}
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
    } | quantiles


def test_no_folder_of_this_machine_gets_into_the_dataset(footage: list[Path], tmp_path: Path) -> None:
    places = {"run_dir": str(tmp_path / "run"), "source": {"path": str(footage[0])}}
    run, _ = make_run(tmp_path / "run", footage[:1], {**CONFIG, **places})
    export_lerobot(run, tmp_path / "out", top=1, codec="h264")
    assert (
        json.loads((tmp_path / "out/meta/ego2robot.json").read_text())["config"]["source"]["path"] == "b.mp4"
    )
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        for folder in (tmp_path, footage[0].parent):
            assert str(folder).encode() not in path.read_bytes(), path


def test_statistics_are_exact_per_episode_and_for_the_dataset(exported: Any) -> None:
    run, units, out, _ = exported
    rows, data, sources = episodes_of(out), data_of(out).to_pydict(), source_frames(run, units)
    whole = json.loads((out / "meta/stats.json").read_text())
    for name, column in data.items():
        values = np.array(column, np.float64).reshape(79, -1)
        for statistic, expected in naive(values).items():
            assert np.allclose(whole[name][statistic], expected, rtol=1e-12, atol=1e-12), (name, statistic)
        assert whole[name]["count"] == [79]
        for row in rows:
            some = values[row["dataset_from_index"] : row["dataset_to_index"]]
            for statistic, expected in naive(some).items():
                assert np.allclose(row[f"stats/{name}/{statistic}"], expected, rtol=1e-12, atol=1e-12)
    everything = np.concatenate([sources[row["clip_id"]].reshape(-1, 3) for row in rows]) / 255
    for statistic, expected in naive(everything).items():
        found = np.array(whole[VIDEO_KEY][statistic])
        assert found.shape == (3, 1, 1) and np.allclose(found.ravel(), expected, rtol=1e-9), statistic
    one = rows[1]
    for statistic, expected in naive(sources[one["clip_id"]].reshape(-1, 3) / 255).items():
        found = np.array(one[f"stats/{VIDEO_KEY}/{statistic}"])
        assert found.shape == (3, 1, 1) and np.allclose(found.ravel(), expected, rtol=1e-9), statistic
    assert one[f"stats/{VIDEO_KEY}/count"] == [7]


@pytest.mark.parametrize("n", [1, 2, 3, 50, 1001])
def test_histogram_quantiles_are_those_of_the_values(n: int) -> None:
    pixels = np.random.default_rng(n).integers(0, 256, (n, 1, 1, 3), np.uint8)
    histogram = stats.PixelHistogram()
    half = stats.PixelHistogram()
    histogram.add(torch.from_numpy(pixels[: n // 2]))
    half.add(torch.from_numpy(pixels[n // 2 :]))
    histogram.merge(half)
    found = histogram.statistics()
    for name, expected in naive(pixels.reshape(-1, 3) / 255).items():
        assert np.allclose(found[name].ravel(), expected, atol=1e-12), name
    assert found["count"].tolist() == [n]


def test_dataset_statistics_do_not_depend_on_how_much_fits_in_memory(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, out, _ = exported
    files = sorted((out / "data").glob("*/*.parquet"))
    at_once = stats.column_statistics(files, STATE, 96)
    monkeypatch.setattr(stats, "COLUMN_BYTES", 8 * 79 * 7)  # 7 dimensions a pass
    in_passes = stats.column_statistics(files, STATE, 96)
    assert all(np.array_equal(at_once[name], in_passes[name]) for name in stats.NAMES)


def test_files_roll_over_at_their_limits(exported: Any, tmp_path: Path) -> None:
    run, units, _, _ = exported
    out = tmp_path / "small"
    limits = Limits(chunk_files=2, data_bytes=1, video_bytes=1)
    export_lerobot(run, out, top=50, limits=limits)
    sources = source_frames(run, units)
    for kind in ("data", "meta/episodes", f"videos/{VIDEO_KEY}"):
        files = [str(f.relative_to(out / kind).with_suffix("")) for f in sorted((out / kind).glob("*/*"))]
        assert files == [f"chunk-{i // 2:03d}/file-{i % 2:03d}" for i in range(7)], kind
    for i, row in enumerate(episodes_of(out)):
        assert (row[f"videos/{VIDEO_KEY}/chunk_index"], row[f"videos/{VIDEO_KEY}/file_index"]) == divmod(i, 2)
        assert (row["data/chunk_index"], row["data/file_index"]) == divmod(i, 2)
        assert (row["meta/episodes/chunk_index"], row["meta/episodes/file_index"]) == divmod(i, 2)
        assert row[f"videos/{VIDEO_KEY}/from_timestamp"] == 0.0
        name = f"chunk-{i // 2:03d}/file-{i % 2:03d}"
        pictures, _, _ = decode_all(out / f"videos/{VIDEO_KEY}/{name}.mp4")
        assert min(psnr(a, b) for a, b in zip(pictures, sources[row["clip_id"]], strict=True)) >= 30
        assert pq.read_table(out / f"data/{name}.parquet")["episode_index"].unique().to_pylist() == [i]


def test_no_video_file_is_so_long_that_float32_times_blur(tmp_path: Path) -> None:
    """LeRobot finds frames by float32 seconds, with a tolerance of 1e-4."""
    assert np.spacing(np.float32(video.MAX_FILE_S)) < 1e-4
    black = np.zeros((500, 32, 64, 3), np.uint8)
    mp4 = video.encode_episode(black, 1, video.CODECS["h264"])
    with video.VideoFiles(lambda part: tmp_path / f"{part}.mp4", 1, Limits()) as files:
        segments = [files.add(mp4, 500) for _ in range(3)]
    assert [(s.part, s.first) for s in segments] == [(0, 0), (0, 500), (1, 0)]
    assert files.n_files == 2


def test_the_best_clips_are_chosen_by_label_score(exported: Any, tmp_path: Path) -> None:
    run = exported[0]
    result = export_lerobot(run, tmp_path / "out", top=3, codec="h264")
    rows = episodes_of(tmp_path / "out")
    # label_score falls with the clip's number: both first clips (0.9), then the second with the smaller id,
    # because their motion is equal.
    seconds = sorted(r["clip_id"] for r in run.table("clips").to_pylist() if r["start_s"] == 2.0)
    assert result.episodes == 3 and sorted(r["start_s"] for r in rows) == [0.0, 0.0, 2.0]
    assert next(r["clip_id"] for r in rows if r["start_s"] == 2.0) == seconds[0]


def test_random_weights_neither_rank_nor_name_and_the_card_says_so(
    footage: list[Path], tmp_path: Path
) -> None:
    run, _ = make_run(tmp_path / "run", footage[:1], random_clip=True)
    result = export_lerobot(run, tmp_path / "out", top=1, codec="h264")
    (row,) = episodes_of(tmp_path / "out")
    assert row["start_s"] == 8.0, "hand_visibility rises with the clip's number"
    assert row["tasks"] == ["unlabelled hand manipulation"]
    assert any("random" in warning for warning in result.warnings)
    assert "**Random weights.** clip" in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/meta/ego2robot.json").read_text())["random_weights"] == ["clip"]


def test_task_text_falls_back_from_label_to_the_sources_own_to_the_skill(
    footage: list[Path], tmp_path: Path
) -> None:
    def change(clip: Clip, number: int) -> dict[str, Any]:
        unlabelled = {"label": None, "label_score": None}
        return [{}, {**unlabelled, "meta": [("task", "fold a shirt")]}, unlabelled][min(number, 2)]

    run, units = make_run(tmp_path / "run", footage[:1], change=change)
    ids = [clip.clip_id for clip in units[0].clips]
    atomic.write_parquet(
        tmp_path / "run/skills/assignment.parquet",
        pa.table({"clip_id": ids[:3], "skill": pa.array([0, 0, 1], pa.int32())}),
    )
    names = [{"skill": 0, "name": "task #1"}, {"skill": 1, "name": "skill 1"}]
    atomic.write_json(tmp_path / "run/skills/skills.json", {"random": False, "skills": names})
    export_lerobot(run, tmp_path / "out", top=9, codec="h264")
    rows = episodes_of(tmp_path / "out")
    assert [r["tasks"][0] for r in rows] == [
        "task <b>0</b> | *x*",
        "fold a shirt",
        "unlabelled hand manipulation (skill 1)",
        "unlabelled hand manipulation",
        "unlabelled hand manipulation",
    ]
    assert [(r["skill_id"], r["skill"]) for r in rows[:4]] == [
        (0, "task #1"),
        (0, "task #1"),
        (1, "skill 1"),
        (None, None),
    ]


def test_card_is_plain_about_pseudo_actions_and_escapes_foreign_text(exported: Any) -> None:
    _, _, out, _ = exported
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["task_categories"] == ["robotics"] and "LeRobot" in head["tags"]
    assert head["configs"] == [{"config_name": "default", "data_files": "data/*/*.parquet"}]
    assert head["license"] == "other", "nobody said which licence the footage has"
    assert "Pseudo-actions, not robot actions" in body
    assert (
        "| episodes | 7 |" in body
        and "7 → 7 → 7" in body
        and "| a hand is seen in | 100% of the frames |" in body
    )
    assert "<b>" not in body and "&lt;b&gt;" in body and r"\| \*x\*" in body


def test_card_names_the_licence_that_all_sources_share(footage: list[Path], tmp_path: Path) -> None:
    run, _ = make_run(
        tmp_path / "run", footage[:1], change=lambda clip, number: {"source": "egocentric10k", "meta": []}
    )
    export_lerobot(run, tmp_path / "out", top=2, codec="h264")
    front = (tmp_path / "out/README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "apache-2.0"


def test_nothing_kept_makes_a_valid_empty_dataset_and_a_warning(footage: list[Path], tmp_path: Path) -> None:
    run, _ = make_run(
        tmp_path / "run",
        footage[:1],
        change=lambda clip, number: {"decision": "dropped", "reason": "motion 0.1 < 0.2"},
    )
    out = tmp_path / "out"
    result = export_lerobot(run, out, top=5)
    assert (result.episodes, result.frames, result.tasks, result.skipped) == (0, 0, 0, [])
    assert "no clip was kept" in result.warnings[0]
    info = json.loads((out / "meta/info.json").read_text())
    assert info["total_episodes"] == 0 and info["splits"] == {"train": "0:0"}
    assert VIDEO_KEY in info["features"]
    full = data_of(out)
    assert full.num_rows == 0 and full.schema.field(STATE).type == pa.list_(pa.float32(), 96)
    assert episodes_of(out) == [] and len(pd.read_parquet(out / "meta/tasks.parquet")) == 0
    assert json.loads((out / "meta/stats.json").read_text()) == {}
    assert not (out / "videos").exists()
    assert "**Empty.**" in (out / "README.md").read_text()


def test_a_video_that_is_gone_or_changed_costs_its_own_episodes_only(tmp_path: Path) -> None:
    paths = [
        write_video(tmp_path / f"{name}.mp4", n_frames=n, width=WIDTH, height=HEIGHT)
        for name, n in (("gone", 60), ("changed", 61), ("here", 62))
    ]
    run, units = make_run(tmp_path / "run", paths)
    paths[0].unlink()
    data = bytearray(paths[1].read_bytes())
    data[len(data) // 2] ^= 0xFF
    paths[1].write_bytes(data)
    result = export_lerobot(run, tmp_path / "out", top=9, codec="h264")
    assert result.episodes == 1 and [r["video"] for r in episodes_of(tmp_path / "out")] == ["here.mp4"]
    reasons = dict(result.skipped)
    assert "gone.mp4: No such file" in reasons[units[0].clips[0].clip_id]
    assert "changed.mp4: its bytes have changed" in reasons[units[1].clips[0].clip_id]
    assert "2 of 3 chosen clips were left out" in result.warnings[0]


def test_progress_is_told_after_every_clip(exported: Any, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    export_lerobot(exported[0], tmp_path / "out", 3, codec="h264", progress=lambda *a: told.append(a))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_an_own_export_is_replaced_and_anything_else_refused(exported: Any, tmp_path: Path) -> None:
    run, out = exported[0], tmp_path / "out"
    export_lerobot(run, out, top=1, codec="h264")
    (out / "stale").write_text("from the earlier export")
    assert export_lerobot(run, out, top=2, codec="h264").episodes == 2
    assert not (out / "stale").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a dataset made by ego2robot"):
        export_lerobot(run, other, top=1)
    assert (other / "thesis.txt").read_text() == "mine"
    with pytest.raises(UserError, match="a file is in the way"):
        export_lerobot(run, other / "thesis.txt", top=1)
    with pytest.raises(UserError, match="not empty"):
        export_lerobot(run, run.path, top=1)


def test_an_interrupted_export_leaves_the_earlier_one(exported: Any, tmp_path: Path) -> None:
    run, out = exported[0], tmp_path / "out"
    export_lerobot(run, out, top=1, codec="h264")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_lerobot(run, out, top=3, codec="h264", progress=interrupt)
    assert len(episodes_of(out)) == 1 and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_cleaned_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = staging.sibling(out, "old").name.rpartition("-")[0] + f"-{child.pid}"
    (tmp_path / dead).mkdir()
    (tmp_path / dead / "old").write_text("")
    foreign = tmp_path / "out.old-elsewhere-1"
    foreign.mkdir()
    staging.remove_leftovers(out)
    assert (out / "old").exists(), "killed between the two renames: the earlier dataset comes back"
    assert {p.name for p in tmp_path.iterdir()} == {"out", foreign.name}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [20_000, 300], ids=["in the video", "in the first small file"])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(
    exported: Any, tmp_path: Path, limit: int
) -> None:
    """A limit on file size stands for the full disk: the same write fails, with the same kind of error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"^[^\n]*cannot be written \(File too large\); make room[^\n]*$"):
            export_lerobot(exported[0], tmp_path / "out", 50, codec="h264")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()  # destructors of half-written files must not complain either
    assert list(tmp_path.iterdir()) == []


def test_frame_rates_that_lerobot_cannot_say_are_refused(footage: list[Path], tmp_path: Path) -> None:
    tree = {**CONFIG, "clips": {**CONFIG["clips"], "sample_fps": 7.5}}
    run, _ = make_run(tmp_path / "run", footage[:1], tree)
    with pytest.raises(UserError, match=r"sample_fps=7\.5: a LeRobot dataset has a whole number"):
        export_lerobot(run, tmp_path / "out", top=1)
    assert not (tmp_path / "out").exists()


def test_other_whole_frame_rates_keep_exact_times(footage: list[Path], tmp_path: Path) -> None:
    tree = {**CONFIG, "clips": {**CONFIG["clips"], "sample_fps": 7.0}}
    run, _ = make_run(tmp_path / "run", footage[:1], tree)
    export_lerobot(run, tmp_path / "out", top=2, codec="h264")
    _, times, _ = decode_all(tmp_path / f"out/videos/{VIDEO_KEY}/chunk-000/file-000.mp4")
    assert np.allclose(times, np.arange(28) / 7, atol=1e-6)


def test_wrong_arguments_are_refused_before_any_work(exported: Any, tmp_path: Path) -> None:
    run: RunDir = exported[0]
    with pytest.raises(UserError, match="top=0"):
        export_lerobot(run, tmp_path / "out", top=0)
    with pytest.raises(UserError, match="one of auto, hands, reference, native"):
        export_lerobot(run, tmp_path / "out", top=1, schema="robot")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one of av1, h264"):
        export_lerobot(run, tmp_path / "out", top=1, codec="hevc")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_gives_the_same_bytes(exported: Any, tmp_path: Path) -> None:
    run, _, out, _ = exported
    again = tmp_path / "again"
    export_lerobot(run, again, top=50)
    for path in sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file()):
        assert (again / path).read_bytes() == (out / path).read_bytes(), path
