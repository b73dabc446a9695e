"""LeRobot datasets v3.0, to curate again: episodes become spans of the videos that hold them.

``meta/info.json`` says where things are, ``meta/episodes/`` which stretch of which mp4 and which rows of
``data/`` are an episode. A video of one camera (``source.camera``, else the first) is one candidate; its
spans are the episodes, with their tasks. :meth:`LeRobot.trajectory` gives ``observation.state`` and
``action`` as they are stored, of the row that is nearest in time.

With ``clips.sample_fps`` at the dataset's own rate, every row of an episode is a frame of its clip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ego2robot import config
from ego2robot.errors import UserError, VideoError
from ego2robot.sources.base import DEFAULTS, Candidate, Source, display_name, file_blob, find_files, storable
from ego2robot.sources.tables import Counted, broken, small_json
from ego2robot.types import Span, Trajectory, Video

TOLERANCE_S = 1e-4  # LeRobot's own, between a frame's time and the one that is asked for
INFO = Path("meta") / "info.json"
STATE, ACTION = "observation.state", "action"
FIELD = re.compile(r"\{(video_key|chunk_index|file_index)(?::0(\d)d)?\}")
MAX_INDEX, MAX_DIMENSIONS = 1_000_000, 100_000
CONVERT = "convert it with lerobot's own script, convert_dataset_v21_to_v30"


class LeRobot(Source):
    def candidates(
        self, path: str, skip: Path | None, options: config.Source = DEFAULTS
    ) -> Iterator[Candidate | VideoError]:
        for root in _roots(path, skip):
            try:
                dataset = open_dataset(root)
                key = _camera(dataset, options.camera)
                episodes = read_episodes(dataset, key)
            except VideoError as error:
                yield error
                continue
            yield from episodes.problems.problems("episode")
            for (chunk, file), rows in episodes.by_file().items():
                yield _candidate(dataset, key, chunk, file, [episodes.span(row) for row in rows], path)

    def trajectory(
        self, video: Video, times_s: np.ndarray, options: config.Source = DEFAULTS
    ) -> Trajectory | None:
        """``observation.state`` and ``action`` at some times; see :class:`types.Trajectory`.

        Each is that of the stored row nearest in time, to the last bit where it is stored as float32; NaN
        where no row is within half a frame. None where the dataset has neither.

        Raises:
            VideoError: the dataset's files cannot be read, or do not fit each other.
        """
        root = next((p for p in Path(video.blob.path).parents if (p / INFO).is_file()), None)
        if root is None:
            hint = "put the dataset's meta/ folder back"
            raise VideoError(video.name, "the meta/info.json of its dataset is gone", hint, "metadata")
        dataset = open_dataset(root)
        state, action = dataset.feature(STATE), dataset.feature(ACTION)
        if state is None and action is None:
            return None
        episodes = _cached(root, video.meta.get("video_key", ""), _stamp(root))
        try:
            place = int(video.meta["chunk_index"]), int(video.meta["file_index"])
        except (KeyError, ValueError):
            raise VideoError(
                video.name, "not a video of its dataset", "plan the run again", "metadata"
            ) from None
        start_s = video.info.start_s if video.info else 0.0
        at = np.asarray(times_s, np.float64) + start_s
        found = {
            feature.name: np.full((len(at), feature.size), np.nan, np.float32)
            for feature in (state, action)
            if feature
        }
        for row, where in episodes.rows_at(place, at, dataset.fps).items():
            _fill(dataset, episodes, row, at, where, found)
        empty = np.zeros((len(at), 0), np.float32)
        return Trajectory(
            found.get(STATE, empty),
            found.get(ACTION, empty),
            state.columns if state else (),
            action.columns if action else (),
            f"as stored in the dataset ({dataset.robot}), in its own units",
        )


# -- a dataset ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """A vector of every row: its name, number of values, and their names."""

    name: str
    size: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    root: Path
    fps: float
    robot: str
    features: Mapping[str, Mapping[str, Any]]
    data_path: str
    video_path: str

    def videos(self) -> list[str]:
        return [name for name, feature in self.features.items() if feature.get("dtype") == "video"]

    def feature(self, name: str) -> Feature | None:
        described = self.features.get(name)
        if described is None:
            return None
        shape = described.get("shape")
        sizes = shape if isinstance(shape, list) else []
        size = math.prod(n for n in sizes if isinstance(n, int)) if sizes else 1
        if not all(isinstance(n, int) and n > 0 for n in sizes) or size > MAX_DIMENSIONS:
            raise broken(self.root / INFO, f"{name} has the shape {str(shape)[:80]}")
        names = _flat_names(described.get("names"))
        return Feature(name, size, names if len(names) == size else tuple(f"{name}.{i}" for i in range(size)))

    def file(self, template: str, **values: str | int) -> Path:
        """A file of the dataset by one of its templates, always inside of the dataset's folder."""

        def put(match: re.Match[str]) -> str:
            value = values.get(match[1], "")
            return str(value).zfill(int(match[2])) if match[2] else str(value)

        text = FIELD.sub(put, template)
        parts = Path(text).parts
        if not text or "{" in text or "\0" in text or Path(text).is_absolute() or ".." in parts:
            raise broken(self.root / INFO, f"{template[:80]!r} is no path inside of the dataset")
        return self.root / text


def open_dataset(root: Path) -> Dataset:
    """Reads ``meta/info.json``.

    Raises:
        VideoError: not JSON, another version of the format, without features or paths.
    """
    path = root / INFO
    info = small_json(path)
    if not isinstance(info, dict):
        raise broken(path, f"a mapping was expected, this is a {type(info).__name__}")
    version = str(info.get("codebase_version", "")).strip()
    if not version.startswith("v3."):
        cause = f"LeRobot format {storable(version)[:20] or 'unknown'}; v3.0 is read here"
        hint = CONVERT if version.startswith("v2") else "convert it with lerobot"
        raise VideoError(storable(str(path)), cause, hint, "unsupported")
    fps, features = info.get("fps"), info.get("features")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= 1000:
        raise broken(path, f"fps is {str(fps)[:40]}")
    if not isinstance(features, dict) or not all(isinstance(f, dict) for f in features.values()):
        raise broken(path, "it has no features")
    data_path, video_path = info.get("data_path"), info.get("video_path")
    if not isinstance(data_path, str):
        raise broken(path, "it has no data_path")
    robot = storable(str(info.get("robot_type") or "robot unknown"))[:100]
    return Dataset(
        root, float(fps), robot, features, data_path, video_path if isinstance(video_path, str) else ""
    )


def _roots(path: str, skip: Path | None) -> list[Path]:
    """The datasets in a folder and below."""
    if path and (Path(path).expanduser() / INFO).is_file():
        return [Path(path).expanduser()]
    wanted = "give the folder of a LeRobot dataset, which has meta/info.json"
    try:
        found = find_files(path, (".json",), skip, "LeRobot dataset")
    except UserError as error:
        raise UserError(f"{error}; {wanted}") from None
    roots = [file.parent.parent for file in found if file.name == "info.json" and file.parent.name == "meta"]
    if not roots:
        raise UserError(f"source.path={path}: no meta/info.json there; {wanted}")
    return roots


def _camera(dataset: Dataset, wanted: str) -> str:
    videos = dataset.videos()
    if not videos:
        images = [name for name, f in dataset.features.items() if f.get("dtype") == "image"]
        what = (
            f"its pictures ({storable(images[0])} …) are images, not video" if images else "it has no camera"
        )
        hint = "record or convert it with video" if images else "give a dataset with video"
        raise VideoError(storable(str(dataset.root)), what, hint, "unsupported")
    if wanted and wanted not in videos:
        raise UserError(
            f"source.camera={wanted}: {dataset.root} has {', '.join(storable(v) for v in videos)}"
        )
    key = wanted or videos[0]
    if not dataset.video_path:
        raise broken(dataset.root / INFO, "it has no video_path")
    if "/" in key or "\\" in key or key in ("", ".", ".."):
        raise broken(dataset.root / INFO, f"a camera is called {storable(key)[:80]!r}")
    return key


def _flat_names(names: Any) -> tuple[str, ...]:
    """Names as a list, or in lists by kind (``{"motors": [...]}``), as datasets have both."""
    if isinstance(names, dict):
        return tuple(name for value in names.values() for name in _flat_names(value))
    return tuple(storable(str(name)) for name in names) if isinstance(names, list) else ()


# -- episodes -------------------------------------------------------------------------------------

NUMBERS = ("episode_index", "length", "data/chunk_index", "data/file_index")
PLACES = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


@dataclass(frozen=True)
class Episodes:
    """Where the episodes of one camera are: arrays [N] by column, in order of their file and time."""

    columns: Mapping[str, np.ndarray]
    tasks: pa.ChunkedArray
    problems: Counted

    def by_file(self) -> dict[tuple[int, int], list[int]]:
        found: dict[tuple[int, int], list[int]] = {}
        for row, place in enumerate(
            zip(self.columns["chunk_index"], self.columns["file_index"], strict=True)
        ):
            found.setdefault((int(place[0]), int(place[1])), []).append(row)
        return found

    def span(self, row: int) -> Span:
        tasks = [storable(task) for task in self.tasks[row].as_py() or () if isinstance(task, str) and task]
        meta = {name: str(int(self.columns[name][row])) for name in ("episode_index", "length")}
        if tasks:
            meta["task"] = "; ".join(tasks)
        begin, end = (float(self.columns[f"{name}_timestamp"][row]) for name in ("from", "to"))
        return Span(begin, end, meta)

    def rows_at(self, place: tuple[int, int], at_s: np.ndarray, fps: float) -> dict[int, np.ndarray]:
        """The episodes that some moments of a file lie in: row to the indices of its moments.

        A moment belongs to the nearest frame: containers round times to a millisecond at worst.
        """
        rows = np.flatnonzero(
            (self.columns["chunk_index"] == place[0]) & (self.columns["file_index"] == place[1])
        )
        if not len(rows):
            return {}
        begin, end = self.columns["from_timestamp"][rows], self.columns["to_timestamp"][rows]
        k = np.searchsorted(begin, at_s + max(0.5 / fps, TOLERANCE_S), side="right") - 1
        inside = (k >= 0) & (at_s < end[np.maximum(k, 0)] + TOLERANCE_S)
        return {int(rows[i]): np.flatnonzero(inside & (k == i)) for i in np.unique(k[inside])}


def read_episodes(dataset: Dataset, key: str) -> Episodes:
    """Reads ``meta/episodes/`` without its statistics.

    Raises:
        VideoError: there are none, or a file cannot be read or lacks a column.
    """
    folder = dataset.root / "meta" / "episodes"
    files = sorted(folder.glob("chunk-*/file-*.parquet"))
    if not files:
        raise broken(folder, "no chunk-…/file-….parquet in it")
    names = [*NUMBERS, *(f"videos/{key}/{name}" for name in PLACES)]
    tables = [_read(file, [*names, "tasks"], names) for file in files]
    columns: dict[str, np.ndarray] = {}
    for name in names:
        parts = [_floats(table[name]) for table in tables]
        columns[name.removeprefix(f"videos/{key}/")] = np.concatenate(parts)
    tasks = pa.chunked_array(
        [chunk for table in tables for chunk in _tasks(table).chunks], pa.list_(pa.string())
    )
    problems = Counted(folder)
    usable = _check(columns, dataset.fps, problems)
    order = np.lexsort([columns[n][usable] for n in ("from_timestamp", "file_index", "chunk_index")])
    rows = np.flatnonzero(usable)[order]
    return Episodes(
        {name: column[rows] for name, column in columns.items()}, tasks.take(pa.array(rows)), problems
    )


def _check(columns: Mapping[str, np.ndarray], fps: float, problems: Counted) -> np.ndarray:
    """Which episodes can be used, bool [N]."""
    begin, end, length = (columns[name] for name in ("from_timestamp", "to_timestamp", "length"))
    index = columns["episode_index"]
    whole = [c for name, c in columns.items() if not name.endswith("timestamp")]
    usable = np.ones(len(index), bool)
    first = np.zeros(len(index), bool)
    first[np.unique(index, return_index=True)[1]] = True
    with np.errstate(invalid="ignore"):
        checks = (
            ("a number is missing or absurd", ~np.all([(c >= 0) & (c == np.floor(c)) for c in whole], 0)),
            ("a number is missing or absurd", ~np.all([c <= MAX_INDEX for c in _places(columns)], 0)),
            ("its times are no times", ~(np.isfinite(begin) & np.isfinite(end) & (begin >= 0))),
            ("it ends before it starts", ~(end > begin)),
            ("its times do not fit its length", ~(np.abs((end - begin) * fps - length) <= 0.5)),
            ("its episode_index was there before", ~first),
        )
    for reason, bad in checks:
        for row in np.flatnonzero(bad & usable):
            problems.add(reason, f"row {row}")
        usable &= ~bad
    return usable


def _places(columns: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [columns[name] for name in ("chunk_index", "file_index", "data/chunk_index", "data/file_index")]


def _candidate(
    dataset: Dataset, key: str, chunk: int, file: int, spans: list[Span], path: str
) -> Candidate | VideoError:
    try:
        video = dataset.file(dataset.video_path, video_key=key, chunk_index=chunk, file_index=file)
        if not video.is_file():
            cause = f"the video of {len(spans)} episode{'s' * (len(spans) != 1)} is not there"
            return VideoError(display_name(video, path), cause, "fetch the dataset again", "missing")
        blob = file_blob(video)
    except VideoError as error:
        return error
    meta = {
        "video_key": storable(key),
        "chunk_index": str(chunk),
        "file_index": str(file),
        "dataset_fps": f"{dataset.fps:g}",
        "robot_type": dataset.robot,
    }
    return Candidate(display_name(video, path), blob, meta, None, tuple(spans))


def _stamp(root: Path) -> tuple[tuple[str, int], ...]:
    """Changes when the episodes' files do."""
    files = [root / INFO, *sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))]
    return tuple((str(file), file.stat().st_mtime_ns) for file in files)


@lru_cache(maxsize=2)
def _cached(root: Path, key: str, stamp: tuple[tuple[str, int], ...]) -> Episodes:
    dataset = open_dataset(root)
    return read_episodes(dataset, _camera(dataset, key))


# -- rows -----------------------------------------------------------------------------------------


def _fill(
    dataset: Dataset,
    episodes: Episodes,
    row: int,
    at_s: np.ndarray,
    where: np.ndarray,
    found: Mapping[str, np.ndarray],
) -> None:
    """Writes the stored values of one episode into ``found`` at the indices ``where``."""
    columns = episodes.columns
    episode = int(columns["episode_index"][row])
    path = dataset.file(
        dataset.data_path,
        chunk_index=int(columns["data/chunk_index"][row]),
        file_index=int(columns["data/file_index"][row]),
    )
    table = _rows_of(path, episode, list(found))
    if not len(table):
        raise broken(path, f"it has no rows of episode {episode}")
    stored_s = _floats(table["timestamp"])
    wanted_s = at_s[where] - columns["from_timestamp"][row]
    order = np.argsort(stored_s, kind="stable")
    right = np.clip(np.searchsorted(stored_s[order], wanted_s), 1, max(1, len(order) - 1))
    left = right - 1
    right = np.minimum(right, len(order) - 1)
    before = np.abs(stored_s[order][left] - wanted_s) <= np.abs(stored_s[order][right] - wanted_s)
    nearest = order[np.where(before, left, right)]
    near = np.abs(stored_s[nearest] - wanted_s) <= 0.5 / dataset.fps + TOLERANCE_S
    for name, values in found.items():
        stored = _matrix(path, name, table[name], values.shape[1])
        values[where[near]] = stored[nearest[near]]


def _rows_of(path: Path, episode: int, features: list[str]) -> pa.Table:
    """The rows of one episode; row groups that cannot have any are not read."""
    names = ["episode_index", "timestamp", *features]
    try:
        with pq.ParquetFile(path) as file:
            if lacking := [name for name in names if name not in file.schema_arrow.names]:
                raise broken(path, f"no column {lacking[0]!r}")
            leaf = next(
                i for i in range(file.metadata.num_columns)
                if file.metadata.schema.column(i).path.partition(".")[0] == "episode_index"
            )  # fmt: skip
            groups = []
            for group in range(file.num_row_groups):
                statistics = file.metadata.row_group(group).column(leaf).statistics
                known = statistics is not None and statistics.has_min_max
                if not known or statistics.min <= episode <= statistics.max:
                    groups.append(group)
            table = file.read_row_groups(groups, columns=names)
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise _unreadable(path, error) from None
    return table.filter(pc.equal(table["episode_index"], episode))


def _read(path: Path, wanted: list[str], needed: list[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if lacking := [name for name in needed if name not in names]:
                raise broken(path, f"no column {storable(lacking[0])!r}", "give the whole dataset")
            return file.read(columns=[name for name in wanted if name in names])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> VideoError:
    if isinstance(error, FileNotFoundError):
        return broken(path, "not there", "fetch the dataset again")
    return broken(path, f"no Parquet, or damaged ({' '.join(str(error).split())[:120]})", "fetch it again")


def _tasks(table: pa.Table) -> pa.ChunkedArray:
    nothing = pa.chunked_array([pa.nulls(len(table), pa.list_(pa.string()))])
    if "tasks" not in table.column_names:
        return nothing
    try:
        return table["tasks"].cast(pa.list_(pa.string()))
    except pa.ArrowException:
        return nothing


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers, or lists of one number, as float64 [N]; NaN for what is neither."""
    try:
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            column = pc.list_element(column, 0)
        return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)
    except pa.ArrowException:
        return np.full(len(column), np.nan)


def _matrix(path: Path, name: str, column: pa.ChunkedArray, size: int) -> np.ndarray:
    """Vectors (or numbers) of a column as float32 [N, size]."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no rows, or too many for one array
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    while (
        pa.types.is_list(array.type)
        or pa.types.is_large_list(array.type)
        or pa.types.is_fixed_size_list(array.type)
    ):
        if array.null_count:
            raise broken(path, f"{storable(name)} has empty rows")
        array = array.flatten()
    try:
        flat = np.asarray(
            array.cast(pa.float64() if pa.types.is_integer(array.type) else array.type), np.float32
        )
    except (pa.ArrowException, ValueError, TypeError):
        raise broken(path, f"{storable(name)} is no column of numbers") from None
    if len(flat) != len(column) * size:
        raise broken(path, f"{storable(name)} has not {size} values a row, as meta/info.json says")
    return flat.reshape(len(column), size)
