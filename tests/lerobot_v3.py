"""A LeRobot v3.0 dataset in its exact layout: two cameras, several files, tasks, values that must survive."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tests.footage import textured_frame, write_video

TOP, SIDE = "observation.images.top", "observation.images.side"
FPS = 30
NAMES = ["shoulder.pos", "elbow.pos", "gripper.pos"]
TASKS = ["put the cup down", "wipe the table", "ünï — code"]
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


@dataclass
class Written:
    """What is in it, by episode."""

    root: Path
    state: list[np.ndarray]
    action: list[np.ndarray]
    tasks: list[list[str]]
    from_s: list[float]


def values(rng, n, d):
    """float32 [n, d] with what does not survive carelessness: tiny, huge, negative zero, many digits."""
    found = rng.normal(size=(n, d)).astype(np.float32)
    found[0] = [np.float32(1e-38), np.float32(3.4e38), -0.0][:d]
    return found


def write(
    root: Path,
    lengths=(20, 31, 15, 40),
    files=((0, 0), (0, 0), (0, 1), (1, 0)),
    version="v3.0",
    size=(64, 48),
    pictures=True,
    state_type="fixed",
    change_info=lambda info: info,
    change_episodes=lambda rows: rows,
) -> Written:
    rng = np.random.default_rng(7)
    done = Written(root, [], [], [], [])
    place: dict[tuple[int, int], int] = {}  # frames in a file so far
    rows, tables, index = [], {}, 0
    for e, (n, file) in enumerate(zip(lengths, files, strict=True)):
        state, action = values(rng, n, 3), values(rng, n, 2)
        tasks = [TASKS[e % 3]] if e else [TASKS[0], TASKS[1]]
        start = place.get(file, 0)
        place[file] = start + n
        task_index = [TASKS.index(tasks[i * len(tasks) // n]) for i in range(n)]
        tables.setdefault(file, []).append(
            pa.table(
                {
                    "observation.state": vectors(state, state_type),
                    "action": vectors(action, "fixed"),
                    "timestamp": pa.array((np.arange(n) / FPS).astype(np.float32)),
                    "frame_index": pa.array(np.arange(n)),
                    "episode_index": pa.array(np.full(n, e)),
                    "index": pa.array(np.arange(index, index + n)),
                    "task_index": pa.array(task_index),
                }
            )
        )
        row = {
            "episode_index": e,
            "tasks": tasks,
            "length": n,
            "data/chunk_index": file[0],
            "data/file_index": file[1],
            "dataset_from_index": index,
            "dataset_to_index": index + n,
        }
        for key in (TOP, SIDE):
            row |= {
                f"videos/{key}/chunk_index": file[0],
                f"videos/{key}/file_index": file[1],
                f"videos/{key}/from_timestamp": start / FPS,
                f"videos/{key}/to_timestamp": (start + n) / FPS,
            }
        row |= {"stats/action/min": action.min(0).tolist(), "meta/episodes/chunk_index": 0}
        rows.append(row)
        index += n
        done.state.append(state)
        done.action.append(action)
        done.tasks.append(tasks)
        done.from_s.append(start / FPS)
    for (chunk, file), parts in tables.items():
        path = root / DATA.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, parts[0].schema) as writer:  # a row group each, as lerobot writes
            for part in parts:
                writer.write_table(part)
    episodes = root / "meta/episodes/chunk-000"
    episodes.mkdir(parents=True)
    rows = change_episodes(rows)
    for k, part in enumerate((rows[:3], rows[3:])):
        if part:
            pq.write_table(pa.Table.from_pylist(part), episodes / f"file-{k:03d}.parquet")
    pd.DataFrame({"task_index": range(3)}, index=TASKS).to_parquet(root / "meta/tasks.parquet")
    shape = [size[1], size[0], 3]
    features = {
        key: {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
        for key in (TOP, SIDE)
    }
    features |= {
        "observation.state": {"dtype": "float32", "shape": [3], "names": NAMES},
        "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["left", "right"]}},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    info = {
        "codebase_version": version, "robot_type": "so100_follower", "total_episodes": len(lengths),
        "total_frames": index, "total_tasks": 3, "chunks_size": 1000, "fps": FPS, "splits": {"train": "0:4"},
        "data_path": DATA, "video_path": VIDEO, "features": features,
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(change_info(info), indent=4))
    if pictures:
        for key in (TOP, SIDE):
            for (chunk, file), n in place.items():
                path = root / VIDEO.format(video_key=key, chunk_index=chunk, file_index=file)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, n, *size, fps=Fraction(FPS), gop=10, picture=textured_frame)
    return done


def vectors(values: np.ndarray, kind: str) -> pa.Array:
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    if kind == "list":
        return pa.array([row.tolist() for row in values], pa.list_(pa.float32()))
    return pa.array([row.tolist() for row in values], pa.list_(pa.float64()))
