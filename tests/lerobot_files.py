"""Small LeRobot v3.0 datasets with known truth, as anybody might have made them: one video file for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERA = "observation.images.front"
FPS = 10


def write(
    folder: Path,
    pictures: Sequence[np.ndarray],
    actions: Sequence[np.ndarray],
    videos: Sequence[str] | None,
    names: Sequence[str] = ("x", "y"),
) -> Path:
    """A dataset of E episodes.

    Args:
        pictures: uint8 [T, H, W, 3] of each episode.
        actions: float [T, A] of each.
        videos: the source video of each, or None: the dataset does not say.
    """
    lengths = [len(p) for p in pictures]
    starts = np.cumsum([0, *lengths])
    _encode(folder / "videos" / CAMERA / "chunk-000" / "file-000.mp4", np.concatenate(pictures))
    n = len(names)
    frames = pa.table(
        {
            "action": pa.FixedSizeListArray.from_arrays(
                pa.array(np.concatenate(actions).astype(np.float32).ravel()), n
            ),
            "timestamp": pa.array(np.concatenate([np.arange(k) / FPS for k in lengths]).astype(np.float32)),
            "frame_index": np.concatenate([np.arange(k) for k in lengths]),
            "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        }
    )
    _parquet(folder / "data" / "chunk-000" / "file-000.parquet", frames)
    zeros = np.zeros(len(lengths), np.int64)
    episodes = {
        "episode_index": np.arange(len(lengths)),
        "length": np.array(lengths),
        "data/chunk_index": zeros,
        "data/file_index": zeros,
        f"videos/{CAMERA}/chunk_index": zeros,
        f"videos/{CAMERA}/file_index": zeros,
        f"videos/{CAMERA}/from_timestamp": starts[:-1] / FPS,
        **({"video": list(videos)} if videos is not None else {}),
    }
    _parquet(folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet", pa.table(episodes))
    height, width = pictures[0].shape[1:3]
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "total_episodes": len(lengths),
        "features": {
            CAMERA: {"dtype": "video", "shape": [height, width, 3], "names": None},
            "action": {"dtype": "float32", "shape": [n], "names": list(names)},
        },
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return folder


def _encode(path: Path, frames_THWC: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=FPS, options={"crf": "20", "preset": "ultrafast", "bf": "0"}
        )
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        for k, picture in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _parquet(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def ball(
    n_episodes: int = 16, n_frames: int = 24, n_videos: int = 8, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """A bright ball that walks over a wall; the action says where it is: pictures determine actions.

    Returns:
        Pictures, actions and source videos for :func:`write`. Each video has a wall of its own.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :96]
    pictures, actions = [], []
    for episode in range(n_episodes):
        wall = np.random.default_rng(1000 + seed + episode % n_videos).integers(40, 120, (8, 12, 3))
        wall = np.kron(wall, np.ones((8, 8, 1)))
        place = np.clip(
            np.cumsum(rng.normal(0, 0.12, (n_frames, 2)), 0) + rng.uniform(0.2, 0.8, 2), 0.08, 0.92
        )
        frames = np.repeat(wall[None], n_frames, 0)
        for t, (px, py) in enumerate(place):
            frames[t][(x - 96 * px) ** 2 + (y - 64 * py) ** 2 < 64] = (250, 240, 80)
        pictures.append(frames.astype(np.uint8))
        actions.append(place * (2.0, -1.0) + 0.3)
    return pictures, actions, [f"video_{e % n_videos}.mp4" for e in range(n_episodes)]
