"""How long does Daft take for the same curation and both embedders?

Its documented way with video: ``daft.read_video_frames`` at the size that is wanted, rows of frames filtered
down to the grid, clips by ``groupby``, and models in ``daft.cls`` classes, each instance in a process of its
own, as many as there are cores, one thread each. What the classes do is the staged way's code (MediaPipe one
picture at a time, the Hugging Face processors, float32), and clips that the gate drops are not embedded. The
longest import and loading of each model is taken off its time, also where other work went on meanwhile.

Peers get whole videos, half of them, of every codec (see ``share``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import CACHE, Skip
from staged import HEIGHT, WIDTH, Job


def grid_step(job: Job) -> int:
    """Every so many-th frame of the footage is on the grid."""
    import cv2

    return round(cv2.VideoCapture(job.tasks[0].path).get(cv2.CAP_PROP_FPS) / job.tasks[0].sample_fps)


def note_loading(folder: str, model: str, began: float) -> None:
    """Leaves how long an instance of a model took to load."""
    path = Path(folder) / f"loading-{model}-{os.getpid()}.json"
    path.write_text(json.dumps(time.perf_counter() - began), encoding="utf-8")


def loading_seconds(folder: str) -> float:
    """The longest loading of each model, added up."""
    longest: dict[str, float] = {}
    for path in Path(folder).glob("loading-*.json"):
        model = path.stem.split("-")[1]
        longest[model] = max(longest.get(model, 0.0), json.loads(path.read_text(encoding="utf-8")))
    return sum(longest.values())


def share(tasks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tasks of every second video: the first, third … of one folder, the second, fourth … of the next.

    A folder has one codec, and the same numbers are the same scenes in all of them: so this is half of every
    codec, half of the scenes, and as often kept as the whole. Videos stay whole: peers read whole files.
    """
    folders: dict[Path, list[str]] = {}
    for path in sorted({task["path"] for task in tasks}):
        folders.setdefault(Path(path).parent, []).append(path)
    taken = {path for rank, paths in enumerate(folders.values()) for path in paths[rank % 2 :: 2]}
    return [task for task in tasks if task["path"] in taken]


def answer(job: Job, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a peer: how much it did, and its decisions by clip.

    Args:
        rows: path, clip (its number in the video), motion, visibility, embedded.

    Raises:
        RuntimeError: clips are missing, or others than the kept ones were embedded.
    """
    ids = {(task.path, task.first): task.clip_id for task in job.tasks}
    length = job.tasks[0].n_frames
    decisions = {
        ids[row["path"].removeprefix("file://"), row["clip"] * length]: {
            "motion": row["motion"],
            "hand_visibility": row["visibility"],
            "kept": job.keeps(row["motion"], row["visibility"]),
        }
        for row in rows
    }
    if set(decisions) != set(ids.values()):
        raise RuntimeError(f"{len(decisions)} of {len(ids)} clips came back")
    embedded, kept = sum(bool(row["embedded"]) for row in rows), sum(d["kept"] for d in decisions.values())
    if embedded != kept:
        raise RuntimeError(f"{embedded} clips were embedded of {kept} that were kept")
    return {"clips": len(decisions), "kept": kept, "decisions": decisions}


def do(job: Job) -> dict[str, Any]:
    import daft
    from daft import DataType, col

    length, step, folder, seed = job.tasks[0].n_frames, grid_step(job), job.folder, job.seed
    every = job.hands_every

    @daft.cls(use_process=True, max_concurrency=job.processes)
    class Score:
        def __init__(self) -> None:
            began = time.perf_counter()
            import torch
            from staged import Hands

            torch.set_num_threads(1)
            self.hands = Hands()
            note_loading(folder, "hands", began)

        @daft.method(
            return_dtype=DataType.struct({"motion": DataType.float64(), "visibility": DataType.float64()})
        )
        def score(self, frames: Any, order: Any) -> Any:
            import cv2
            from staged import motion

            clip = in_order(frames, order)
            return {
                "motion": motion(clip, cv2.COLOR_RGB2GRAY),
                "visibility": self.hands.visibility(clip, every),
            }

    @daft.cls(use_process=True, max_concurrency=job.processes)
    class Embed:
        def __init__(self) -> None:
            began = time.perf_counter()
            import torch
            from staged import Embedders

            torch.set_num_threads(1)
            self.embedders = Embedders(seed)
            note_loading(folder, "embedders", began)

        @daft.method(return_dtype=DataType.list(DataType.float32()))
        def embed(self, frames: Any, order: Any) -> Any:
            clip = in_order(frames, order)
            both = [*self.embedders.videomae([clip])[0], *self.embedders.clip([clip])[0]]
            return [float(value) for value in both]

    paths = sorted({task.path for task in job.tasks})
    began = time.perf_counter()
    frames = daft.read_video_frames(paths, image_height=HEIGHT, image_width=WIDTH)
    frames = frames.where(col("frame_index") % step == 0)
    frames = frames.with_column("clip", (col("frame_index") // (step * length)).cast(DataType.int64()))
    clips = frames.groupby("path", "clip").agg(
        col("data").agg_list().alias("frames"), col("frame_index").agg_list().alias("order")
    )
    scored = clips.with_column("scores", Score().score(col("frames"), col("order")))
    scored = scored.with_columns(
        {"motion": col("scores")["motion"], "visibility": col("scores")["visibility"]}
    )
    keeps = (col("motion") >= job.min_motion) & (col("visibility") >= job.min_hand_visibility)
    scored = scored.collect()
    kept = scored.where(keeps).with_column("vector", Embed().embed(col("frames"), col("order")))
    embedded = {
        (row["path"], row["clip"])
        for row in kept.select("path", "clip", "vector").to_pylist()
        if row["vector"]
    }
    rows = scored.select("path", "clip", "motion", "visibility").to_pylist()
    seconds = time.perf_counter() - began
    for row in rows:
        row["embedded"] = (row["path"], row["clip"]) in embedded
    loading = loading_seconds(folder)
    found = answer(job, rows)
    return {
        "version": daft.__version__,
        "seconds": seconds - loading,
        "start_up_left_out_s": loading,
        **found,
    }


def in_order(frames: Any, order: Any) -> Any:
    """uint8 [T, H, W, 3] of a group's frames, which come in any order."""
    import numpy as np

    return np.stack([np.asarray(frames[i]) for i in np.argsort(np.asarray(order))])


def run(quick: bool) -> dict[str, Any]:
    """A share of the work that ``end_to_end.run`` left in the cache."""
    return peer("peers_daft.py", "daft")


def peer(script: str, package: str) -> dict[str, Any]:
    """Runs a peer over a share of the work that ``end_to_end.run`` left in the cache.

    Raises:
        ModuleNotFoundError: the peer is not installed.
        Skip: there is no such work.
    """
    from importlib.util import find_spec

    from end_to_end import call, scratch

    if find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    if not (CACHE / "job.json").is_file():
        raise Skip("nothing to do: the end_to_end part did not run before")
    job = json.loads((CACHE / "job.json").read_text(encoding="utf-8"))
    folder = scratch(package)
    try:
        few = share(job["tasks"])
        found = call(script, {**job, "tasks": few, "folder": str(folder)}, folder)
        return {"share": round(len(few) / len(job["tasks"]), 3), **found}
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("answer", type=Path)
    args = parser.parse_args()
    args.answer.write_text(json.dumps(do(Job.read(args.job))), encoding="utf-8")


if __name__ == "__main__":
    main()
