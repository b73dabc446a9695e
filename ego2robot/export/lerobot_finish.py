"""The end of a LeRobot export: the episodes that could be made get numbers, and their rows become files.

Pictures are not touched any more. Each data and episodes file is written on its own from the units' rows,
by whichever process; what each holds follows from the numbers alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ego2robot.export import stats
from ego2robot.export.files import Place, TableFile, cut
from ego2robot.export.lerobot_format import (
    GROUP_EPISODES,
    GROUP_FRAMES,
    INDEX_FEATURES,
    ORIGIN,
    VIDEO_KEY,
    data_schema,
    episode_schema,
    features,
)
from ego2robot.export.lerobot_unit import Order
from ego2robot.export.staging import Staging, each, unwritable
from ego2robot.store import atomic


@dataclass(frozen=True)
class Numbers:
    """Of the episodes that could be made, in storing order.

    Attributes:
        table: ``row`` (of the plan), ``unit``, ``length``, ``from`` (index of the first frame),
            ``first_in_unit`` (the same among the unit's own frames), ``task`` (index), and the numbers of
            the ``data``, ``episodes`` and ``video`` files; ``part_first``: first frame in that video. int64.
        tasks: texts by index.
        videos: the staged name of each video file.
        skipped: row of the plan → why it is none of them.
        pixels: of all pictures.
        hand_frames: frames with a hand.
        covered: frames in which a face was covered.
    """

    table: pa.Table
    tasks: list[str]
    videos: list[tuple[int, str]]
    skipped: dict[int, str]
    pixels: stats.PixelHistogram
    hand_frames: int
    covered: int

    @property
    def frames(self) -> int:
        return int(pc.sum(self.table["length"]).as_py() or 0)


def number(staging: Staging, order: Order) -> Numbers:
    """Numbers what the units have made; every unit is done."""
    lengths = staging.table(["n_frames"])["n_frames"].to_numpy().astype(np.int64)
    video_of, first = np.full(len(lengths), -1, np.int64), np.zeros(len(lengths), np.int64)
    unit_of = np.repeat(np.arange(staging.n_units), np.diff(staging.starts))
    skipped: dict[int, str] = {}
    videos: list[tuple[int, str]] = []
    pixels, hand_frames, covered = stats.PixelHistogram(), 0, 0
    for unit in range(staging.n_units):
        record = staging.record(unit)
        skipped |= {int(row): reason for row, reason in record["failed"].items()}
        pixels.counts += np.array(record["pixels"], np.int64)
        pixels.frames += record["frames"]
        hand_frames += record["hand_frames"]
        covered += record["covered"]
        made = pq.read_table(staging.path(unit, ".episodes.parquet"), columns=["row", "part", "first"])
        rows = made["row"].to_numpy()
        video_of[rows] = len(videos) + made["part"].to_numpy()
        first[rows] = made["first"].to_numpy()
        videos += [(unit, name) for name in record["videos"]]
    rows = np.flatnonzero(video_of >= 0)
    length, units = lengths[rows], unit_of[rows]
    start = np.cumsum(length) - length
    _, begins = np.unique(units, return_index=True)
    in_unit = start - np.repeat(start[begins], np.diff([*begins, len(units)]))
    texts = staging.table(["task"])["task"].take(pa.array(rows)).combine_chunks().dictionary_encode()
    described = features(order.layout, order.spec, order.fps, order.codec)
    columns = {
        "row": rows,
        "unit": units,
        "length": length,
        "from": start,
        "first_in_unit": in_unit,
        "task": texts.indices.to_numpy().astype(np.int64),
        "data": cut(length * _row_bytes(described), order.limits.data_bytes),
        "episodes": cut(np.full(len(rows), _episode_bytes(described)), order.limits.data_bytes),
        "video": video_of[rows],
        "part_first": first[rows],
    }
    return Numbers(
        pa.table(columns), texts.dictionary.to_pylist(), videos, skipped, pixels, hand_frames, covered
    )


def _row_bytes(described: dict[str, dict[str, Any]]) -> int:
    """Of a frame's row before it is compressed, which is the most that it takes."""
    size = {"float32": 4, "int64": 8}
    return sum(size[f["dtype"]] * f["shape"][0] for f in described.values() if f["dtype"] != "video")


def _episode_bytes(described: dict[str, dict[str, Any]]) -> int:
    """Of an episode's row before it is compressed: 8 for each number, and what its texts take about."""
    columns = sum(3 if f["dtype"] == "video" else f["shape"][0] for f in described.values())
    return 8 * columns * len(stats.NAMES) + 512


def write_files(staging: Staging, order: Order, numbers: Numbers, workers: int) -> list[Place]:
    """Writes data and episodes files, moves the videos where they belong; returns the data files' places."""
    (staging.folder / "numbers").mkdir(exist_ok=True)
    atomic.write_parquet(staging.folder / "numbers" / "episodes.parquet", numbers.table, GROUP_FRAMES)
    atomic.write_json(staging.folder / "numbers" / "tasks.json", numbers.tasks)
    chunk = order.limits.chunk_files
    for i, (unit, name) in enumerate(numbers.videos):
        target = staging.dataset / "videos" / VIDEO_KEY / f"{Place.of(i, chunk)}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        source = staging.path(unit, "").with_name(name)
        if source.exists():  # else it was moved before this was killed
            source.rename(target)
    n_files = {kind: int(pc.max(numbers.table[kind]).as_py() or 0) + 1 for kind in ("data", "episodes")}
    tasks = [(kind, i) for kind, n in n_files.items() for i in range(n)]
    each(writer, (order,), tasks, workers)
    return [Place.of(i, chunk) for i in range(n_files["data"])]


def writer(order: Order) -> Callable[[tuple[str, int]], Iterator[None]]:
    """Writes one file: ``("data", 3)`` or ``("episodes", 0)``."""
    return _Writer(order).write


class _Writer:
    def __init__(self, order: Order) -> None:
        self.order = order
        self.staging = Staging(order.out, order.key)
        self.described = features(order.layout, order.spec, order.fps, order.codec)

    def write(self, task: tuple[str, int]) -> Iterator[None]:
        kind, i = task
        folder = "data" if kind == "data" else "meta/episodes"
        path = self.staging.dataset / folder / f"{Place.of(i, self.order.limits.chunk_files)}.parquet"
        table = pq.read_table(self.staging.folder / "numbers" / "episodes.parquet")
        at = np.flatnonzero(table[kind].to_numpy() == i)
        mine = table.slice(int(at[0]) if len(at) else 0, len(at))  # its episodes lie together
        try:
            if kind == "data":
                self._data(path, int(at[0]) if len(at) else 0, mine)
            else:
                self._episodes(path, int(at[0]) if len(at) else 0, mine)
        except OSError as error:
            raise unwritable(self.order.out, error) from None
        yield

    def _by_unit(self, episodes: pa.Table) -> Iterator[tuple[int, int, pa.Table]]:
        """The units of some consecutive episodes: unit, how many episodes lie before, its episodes."""
        units = episodes["unit"].to_numpy()
        begins = np.flatnonzero(np.diff(units, prepend=-1))
        for begin, end in pairwise([*begins.tolist(), len(units)]):
            yield int(units[begin]), begin, episodes.slice(begin, end - begin)

    def _data(self, path: Any, first_episode: int, mine: pa.Table) -> None:
        schema = data_schema(self.described)
        with TableFile(path, schema, GROUP_FRAMES) as file:
            for unit, before, episodes in self._by_unit(mine):
                length, start, in_unit, task = (
                    episodes[name].to_numpy() for name in ("length", "from", "first_in_unit", "task")
                )
                staged = pq.read_table(self.staging.path(unit, ".frames.parquet"))
                part = staged.slice(int(in_unit[0]), int(length.sum()))
                frame = np.concatenate([np.arange(n) for n in length])
                columns = {name: part[name] for name in part.column_names}
                columns |= {
                    "timestamp": (frame / self.order.fps).astype(np.float32),
                    "frame_index": frame,
                    "episode_index": np.repeat(first_episode + before + np.arange(len(length)), length),
                    "index": np.repeat(start, length) + frame,
                    "task_index": np.repeat(task, length),
                }
                file.add(pa.table({name: columns[name] for name in schema.names}, schema=schema))

    def _episodes(self, path: Any, first_episode: int, mine: pa.Table) -> None:
        schema = episode_schema(self.described)
        texts = json.loads((self.staging.folder / "numbers" / "tasks.json").read_bytes())
        with TableFile(path, schema, GROUP_EPISODES) as file:
            for unit, before, episodes in self._by_unit(mine):
                staged = pq.read_table(self.staging.path(unit, ".episodes.parquet"))
                staged = staged.filter(pc.is_in(staged["row"], value_set=episodes["row"].combine_chunks()))
                plan = self.staging.rows(unit)
                rows = pa.array(episodes["row"].to_numpy() - self.staging.starts[unit])
                columns = self._numbered(episodes, first_episode + before, texts)
                plan = plan.rename_columns([{"name": "video"}.get(name, name) for name in plan.column_names])
                columns |= {name: plan[name].take(rows) for name, _ in ORIGIN}
                if strip := self.order.privacy.stripper:
                    for name, hide in (("video", strip.video), ("clip_id", strip.clip)):
                        columns[name] = pa.array([hide(v) for v in columns[name].to_pylist()], pa.string())
                columns |= {n: staged[n] for n in staged.column_names if n.startswith("stats/")}
                file.add(pa.table([columns[name] for name in schema.names], schema.names).cast(schema))

    def _numbered(self, episodes: pa.Table, first: int, tasks: list[str]) -> dict[str, Any]:
        chunk, fps = self.order.limits.chunk_files, self.order.fps
        at = {name: episodes[name].to_numpy() for name in episodes.column_names}
        index, length, start, n = first + np.arange(len(episodes)), at["length"], at["from"], len(episodes)
        texts = pa.ListArray.from_arrays(
            np.arange(n + 1, dtype=np.int32), pa.array([tasks[t] for t in at["task"]], pa.string())
        )
        columns: dict[str, Any] = {
            "episode_index": index,
            "tasks": texts,
            "length": length,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
            f"videos/{VIDEO_KEY}/from_timestamp": at["part_first"] / fps,
            f"videos/{VIDEO_KEY}/to_timestamp": (at["part_first"] + length) / fps,
        }
        for name, numbers in (
            ("data", "data"),
            (f"videos/{VIDEO_KEY}", "video"),
            ("meta/episodes", "episodes"),
        ):
            columns[f"{name}/chunk_index"], columns[f"{name}/file_index"] = np.divmod(at[numbers], chunk)
        for feature in INDEX_FEATURES:
            value = {"episode_index": index, "task_index": at["task"]}.get(feature)
            for statistic in stats.NAMES:
                cells = [_of_frames(feature, statistic, int(k), fps) for k in length]
                if value is not None:
                    cells = [
                        c if statistic in ("count", "std") else v for c, v in zip(cells, value, strict=True)
                    ]
                elif feature == "index" and statistic not in ("count", "std"):
                    cells = [c + s for c, s in zip(cells, start, strict=True)]
                whole = statistic == "count" or (statistic in ("min", "max") and feature != "timestamp")
                values = pa.array(np.array(cells, np.int64 if whole else np.float64))
                columns[f"stats/{feature}/{statistic}"] = pa.ListArray.from_arrays(
                    np.arange(n + 1, dtype=np.int32), values
                )
        return columns


@cache
def _episode_statistics(timestamps: bool, n: int, fps: int) -> stats.Statistics:
    frame = np.arange(n)
    return stats.vector_statistics((frame / fps).astype(np.float32) if timestamps else frame)


def _of_frames(feature: str, statistic: str, n: int, fps: int) -> Any:
    """A statistic of ``timestamp``, or of 0 … n - 1; of what all frames share only std and count hold."""
    found = _episode_statistics(feature == "timestamp", n, fps)[statistic][0]
    return 0.0 if statistic == "std" and feature in ("episode_index", "task_index") else found


def statistics(staging: Staging, order: Order, numbers: Numbers, data: list[Place]) -> dict[str, Any]:
    """``stats.json``; without frames there is nothing to sum up, and it is empty."""
    if not numbers.frames:
        return {}
    described = features(order.layout, order.spec, order.fps, order.codec)
    files = [staging.dataset / "data" / f"{place}.parquet" for place in data]
    length = numbers.table["length"].to_numpy()
    longer = len(length) - np.cumsum(np.bincount(length, minlength=1))[:-1]  # episodes with a frame k
    per_task = np.bincount(numbers.table["task"].to_numpy(), length).astype(np.int64)
    frame = np.arange(len(longer))
    found: dict[str, stats.Statistics] = {VIDEO_KEY: numbers.pixels.statistics()}
    for name in order.layout.vectors:
        found[name] = stats.column_statistics(files, name, described[name]["shape"][0])
    found["timestamp"] = stats.weighted_statistics((frame / order.fps).astype(np.float32), longer)
    found["frame_index"] = stats.weighted_statistics(frame, longer)
    found["episode_index"] = stats.weighted_statistics(np.arange(len(length)), length)
    found["index"] = stats.count_statistics(numbers.frames)
    found["task_index"] = stats.weighted_statistics(np.arange(len(per_task)), per_task)
    return {name: {k: v.tolist() for k, v in found[name].items()} for name in described}
