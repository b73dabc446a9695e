"""A LeRobot v3.0 folder as a table of moments: two small pictures, the action that follows, the one before.

Reads with pyarrow and PyAV alone, ours or anybody's. Pictures are decoded once, small, into a file on disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ego2robot.errors import UserError

ACTION = "action"
MOST_PER_EPISODE = 200  # moments of an episode, evenly over it
LEAST_PER_EPISODE = 8  # where that is too many for all episodes, some episodes are left out instead
# Names of files come from their numbers, never from what info.json says.
DATA_PATH = "data/chunk-{chunk:03d}/file-{file:03d}.parquet"
VIDEO_PATH = "videos/{key}/chunk-{chunk:03d}/file-{file:03d}.mp4"
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_TOLERANCE = 0.25  # of a frame: pictures lie where the dataset says


@dataclass(frozen=True)
class Episode:
    """One episode as ``meta/episodes`` has it."""

    index: int
    length: int  # frames
    data: tuple[int, int]  # chunk and file
    video: tuple[int, int]
    from_s: float  # of its first frame in that video
    group: str | None  # the source video that it was cut from; None: the dataset does not say


@dataclass(frozen=True)
class Dataset:
    """What the dataset says of itself.

    Attributes:
        camera: the feature whose pictures are looked at.
        names: of the action's dimensions.
    """

    path: Path
    fps: float
    camera: str
    names: tuple[str, ...]
    episodes: tuple[Episode, ...]


@dataclass(frozen=True)
class Moments:
    """N moments of E episodes, those of an episode together.

    Attributes:
        pictures: uint8 [P, H, W, 3], on disk; P pictures, each shared by up to two moments.
        now_N, before_N: int64, the picture at each moment and the one a frame earlier.
        action_NA: float64, the action at each moment.
        last_NA: float64, the one a frame earlier.
        episode_N: int64, number of the episode in the dataset.
        group_N: int64, source video, or episode where the dataset does not say.
        grouped: whether it does.
        left_out: (what, why), one each for episodes that cannot be used.
        holes: moments left out for a value that is not finite.
    """

    pictures: np.ndarray
    now_N: np.ndarray
    before_N: np.ndarray
    action_NA: np.ndarray
    last_NA: np.ndarray
    episode_N: np.ndarray
    group_N: np.ndarray
    grouped: bool
    left_out: tuple[tuple[str, str], ...]
    holes: int


# -- what there is --------------------------------------------------------------------------------


def open_dataset(path: Path, camera: str | None = None) -> Dataset:
    """Reads ``meta/``.

    Args:
        camera: a video feature; None: the first one.

    Raises:
        UserError: no LeRobot v3.0 dataset, damaged, without videos or actions, or no such camera.
    """
    info = _info(path)
    version = str(info.get("codebase_version", ""))
    if version.startswith("v2"):
        raise UserError(
            f"{path}: LeRobot {version}, too old; convert it with lerobot's own "
            "lerobot.datasets.v30.convert_dataset_v21_to_v30"
        )
    if not version.startswith("v3."):
        raise UserError(f"{path}: codebase_version is {version!r}; `check` reads LeRobot v3.0")
    features, fps = info.get("features"), info.get("fps")
    if not isinstance(features, dict) or not isinstance(fps, int | float) or not 0 < fps <= 1000:
        raise UserError(f"{path}/meta/info.json: no features or no fps; export the dataset again")
    cameras = [k for k, f in features.items() if isinstance(f, dict) and f.get("dtype") == "video"]
    usable = [key for key in cameras if _KEY.fullmatch(key) and ".." not in key]
    if camera is not None and camera not in usable:
        raise UserError(f"{path}: no camera {camera!r}; there is {', '.join(usable) or 'none'}")
    if not usable:
        raise UserError(f"{path}: no pictures in videos (no feature of dtype video); `check` needs them")
    names = _action_names(path, features.get(ACTION))
    chosen = camera or usable[0]
    return Dataset(path, float(fps), chosen, names, tuple(_episodes(path, chosen)))


def _info(path: Path) -> Mapping[str, Any]:
    file = path / "meta" / "info.json"
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path}: not a LeRobot dataset (no meta/info.json); give the folder that `ego2robot export "
            "lerobot` wrote"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: not JSON; export or download the dataset again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: a {type(found).__name__} where an object is expected")
    return found


def _action_names(path: Path, feature: Any) -> tuple[str, ...]:
    shape = feature.get("shape") if isinstance(feature, dict) else None
    if not (
        isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int) and 0 < shape[0] <= 4096
    ):
        raise UserError(f"{path}: no feature `{ACTION}` that is a vector; `check` predicts actions")
    names = feature.get("names")
    if isinstance(names, dict):  # as in {"motors": [...]}
        names = next((value for value in names.values() if isinstance(value, list)), None)
    if isinstance(names, list) and len(names) == shape[0]:
        return tuple("".join(c if c.isprintable() else "?" for c in str(name))[:80] for name in names)
    return tuple(f"{ACTION}[{i}]" for i in range(shape[0]))


def _episodes(path: Path, camera: str) -> Iterator[Episode]:
    files = sorted((path / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise UserError(f"{path}: no meta/episodes/*/*.parquet; export or download the dataset again")
    columns = {
        "index": "episode_index",
        "length": "length",
        "data_chunk": "data/chunk_index",
        "data_file": "data/file_index",
        "video_chunk": f"videos/{camera}/chunk_index",
        "video_file": f"videos/{camera}/file_index",
        "from_s": f"videos/{camera}/from_timestamp",
    }
    for file in files:
        with _reading(file):
            there = pq.read_schema(file).names
            missing = [name for name in columns.values() if name not in there]
            if missing:
                raise UserError(f"{file}: no column {missing[0]!r}; export or download the dataset again")
            wanted = [*columns.values(), *(["video"] if "video" in there else [])]
            table = pq.read_table(file, columns=wanted)
        for row in table.to_pylist():
            cell = {key: row[name] for key, name in columns.items()}
            if any(value is None for value in cell.values()) or cell["length"] < 0:
                raise UserError(f"{file}: an episode without its place; export or download the dataset again")
            yield Episode(
                int(cell["index"]),
                int(cell["length"]),
                (int(cell["data_chunk"]), int(cell["data_file"])),
                (int(cell["video_chunk"]), int(cell["video_file"])),
                float(cell["from_s"]),
                row.get("video"),
            )


class _reading:
    """Turns what a damaged or missing Parquet file raises into one line."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pa.ArrowException | OSError | EOFError):
            cause = " ".join(str(error).split())[:200]
            raise UserError(f"{self._file}: cannot be read ({cause}); download or export it again") from None


# -- what is looked at ----------------------------------------------------------------------------


def load(
    dataset: Dataset,
    cache: Path,
    size: tuple[int, int],
    most: int,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Reads actions and decodes pictures.

    Args:
        cache: a file to be made; as many bytes as all pictures together.
        size: (height, width) of a small picture.
        most: moments at most; a part of the episodes is drawn, always the same, where they have more.
        progress: told (pictures read, pictures wanted).

    Raises:
        UserError: the data files cannot be read.
    """
    chosen = _drawn(dataset.episodes, most)
    share = max(LEAST_PER_EPISODE, min(MOST_PER_EPISODE, most // max(1, len(chosen))))
    left_out: list[tuple[str, str]] = []
    actions = _actions(dataset, chosen)
    plans: list[tuple[Episode, np.ndarray, np.ndarray]] = []  # episode, moments, pictures
    for episode in chosen:
        action_TA = actions.get(episode.index)
        if action_TA is None or len(action_TA) != episode.length:
            n = 0 if action_TA is None else len(action_TA)
            left_out.append(
                (f"episode {episode.index}", f"{n} rows where meta/episodes says {episode.length}")
            )
            continue
        if episode.length < 2:
            left_out.append((f"episode {episode.index}", "shorter than two frames"))
            continue
        n = min(episode.length - 1, share)
        moments = np.unique(np.linspace(1, episode.length - 1, n).round().astype(np.int64))
        plans.append((episode, moments, np.union1d(moments, moments - 1)))
    total = sum(len(pictures) for _, _, pictures in plans)
    store = np.memmap(cache, np.uint8, "w+", shape=(max(1, total), *size, 3))
    parts: dict[str, list[np.ndarray]] = {
        k: [] for k in ("now", "before", "action", "last", "episode", "group")
    }
    groups: dict[str, int] = {}
    used = read = holes = 0
    for file, some in _by_video(plans).items():
        for (episode, moments, wanted), found in _decoded(dataset, file, some, size):
            read += len(wanted)
            if progress:
                progress(read, total)
            if isinstance(found, str):
                left_out.append((f"episode {episode.index}", found))
                continue
            store[used : used + len(wanted)] = found
            action_TA = actions[episode.index]
            now, last = action_TA[moments], action_TA[moments - 1]
            sound = np.isfinite(now).all(1) & np.isfinite(last).all(1)
            holes += int((~sound).sum())
            kept = moments[sound]
            parts["now"].append(used + np.searchsorted(wanted, kept))
            parts["before"].append(used + np.searchsorted(wanted, kept - 1))
            parts["action"].append(now[sound])
            parts["last"].append(last[sound])
            parts["episode"].append(np.full(len(kept), episode.index))
            name = f"video {episode.group}" if episode.group is not None else f"episode {episode.index}"
            parts["group"].append(np.full(len(kept), groups.setdefault(name, len(groups))))
            used += len(wanted)
    empty = {"action": np.zeros((0, len(dataset.names))), "last": np.zeros((0, len(dataset.names)))}
    joined = {
        key: np.concatenate(values) if values else empty.get(key, np.zeros(0, np.int64))
        for key, values in parts.items()
    }
    return Moments(
        store,
        joined["now"],
        joined["before"],
        joined["action"],
        joined["last"],
        joined["episode"],
        joined["group"],
        all(episode.group is not None for episode in chosen),
        tuple(left_out),
        holes,
    )


def _drawn(episodes: Sequence[Episode], most: int) -> list[Episode]:
    n = max(1, most // LEAST_PER_EPISODE)
    if len(episodes) <= n:
        return list(episodes)
    places = np.random.default_rng(0).choice(len(episodes), n, replace=False)
    return [episodes[i] for i in sorted(places)]


def _actions(dataset: Dataset, episodes: Sequence[Episode]) -> dict[int, np.ndarray]:
    """The actions of each episode, float64 [T, A], in the order of ``frame_index``."""
    by_file: dict[tuple[int, int], list[int]] = {}
    for episode in episodes:
        by_file.setdefault(episode.data, []).append(episode.index)
    found: dict[int, np.ndarray] = {}
    for (chunk, number), indices in sorted(by_file.items()):
        file = dataset.path / DATA_PATH.format(chunk=chunk, file=number)
        with _reading(file):
            there = pq.read_schema(file).names
            if missing := [c for c in ("episode_index", "frame_index", ACTION) if c not in there]:
                raise UserError(f"{file}: no column {missing[0]!r}; download or export it again")
            table = ds.dataset(file, format="parquet").to_table(
                ["episode_index", "frame_index", ACTION],
                filter=ds.field("episode_index").isin(pa.array(indices, pa.int64())),
            )
        order = np.lexsort((table["frame_index"].to_numpy(), table["episode_index"].to_numpy()))
        values = _matrix(table[ACTION], len(dataset.names), file)[order]
        owner = table["episode_index"].to_numpy()[order]
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(owner)], strict=True):
            found[int(owner[start])] = values[start:end]
    return found


def _matrix(column: pa.ChunkedArray, width: int, file: Path) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    nested = pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type)
    nested = nested or pa.types.is_large_list(array.type)
    flat = array.flatten() if nested else array
    numbers = pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)
    if not numbers or len(flat) != len(array) * width:
        raise UserError(f"{file}: `{ACTION}` is not {width} numbers a row; download or export it again")
    return flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, width)


Plan = tuple[Episode, np.ndarray, np.ndarray]


def _by_video(plans: Sequence[Plan]) -> dict[tuple[int, int], list[Plan]]:
    found: dict[tuple[int, int], list[Plan]] = {}
    for plan in sorted(plans, key=lambda p: (p[0].video, p[0].from_s)):
        found.setdefault(plan[0].video, []).append(plan)
    return found


def _decoded(
    dataset: Dataset, file: tuple[int, int], plans: Sequence[Plan], size: tuple[int, int]
) -> Iterator[tuple[Plan, np.ndarray | str]]:
    """The wanted pictures of each episode of a video file, or why there are none."""
    path = dataset.path / VIDEO_PATH.format(key=dataset.camera, chunk=file[0], file=file[1])
    done = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for plan in plans:
                episode, _, wanted = plan
                yield (
                    plan,
                    _pictures(container, stream, episode.from_s + wanted / dataset.fps, dataset.fps, size),
                )
                done += 1
    except (av.FFmpegError, OSError, IndexError) as error:
        cause = getattr(error, "strerror", None) or "no video stream"
        for plan in plans[done:]:
            yield plan, f"{path.name}: {cause}"


def _pictures(
    container: Any, stream: Any, times_s: np.ndarray, fps: float, size: tuple[int, int]
) -> np.ndarray | str:
    height, width = size
    found = np.empty((len(times_s), height, width, 3), np.uint8)
    near, place = _TOLERANCE / fps, 0
    container.seek(max(0, int((times_s[0] - near) / stream.time_base)), stream=stream)
    for frame in container.decode(stream):
        if frame.time is None or frame.time < times_s[place] - near:
            continue
        if frame.time > times_s[place] + near:
            break
        small = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
        found[place] = small.to_ndarray()
        place += 1
        if place == len(times_s):
            return found
    return f"no picture at {times_s[place]:.3f} s of its video"
