"""How long does Ray Data take for the same curation and both embedders?

Its way with stages that differ: tasks whose generator decodes half a minute of a video in one pass with
decord (the library that Ray Data reads videos with) and yields a clip at a time, and models in classes that
``map`` and ``map_batches`` keep in actors, as many as there are cores, one thread each. What the classes do
is the staged way's code (MediaPipe one picture at a time, the Hugging Face processors, float32), and clips
that the gate drops are not embedded. Its clock starts when the first task begins to decode: Ray itself, the
actors with their models and that task's process are there by then.

Three things cost Ray Data much when they are left alone, so they are not. Actors that reserve a share of a
core leave less than a core for the next task, so on two cores one video would be read at a time: they
reserve none. Blocks of 128 MiB are five clips, and whole blocks are what actors get: here a clip is one. And
``read_videos`` gives single frames, which ``groupby`` then packs, compresses and sorts into clips again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peers_daft import answer, grid_step, peer
from staged import HEIGHT, WIDTH, Embedders, Hands, Job, motion

PIECE = 5  # clips that a task decodes: so that two videos, too, keep two cores busy to the end


class Score:
    """Of one clip: its scores, and the frames themselves where it is kept."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(1)
        self._job = job
        self._hands = Hands()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import cv2

        clip = row["frames"]
        scores = motion(clip, cv2.COLOR_RGB2GRAY), self._hands.visibility(clip, self._job.hands_every)
        frames = clip if self._job.keeps(*scores) else clip[:0]
        return {**row, "motion": scores[0], "visibility": scores[1], "frames": frames}


class Embed:
    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(1)
        self._embedders = Embedders(job.seed)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        clips = list(batch.pop("frames"))
        batch["embedded"] = np.array([len(clip) > 0 for clip in clips])
        for clip in clips:
            if len(clip):
                self._embedders.videomae([clip])
                self._embedders.clip([clip])
        return batch


def pieces(job: Job) -> list[dict[str, Any]]:
    """Runs of at most ``PIECE`` clips of a video: its path, the number of the first clip, how many."""
    length = job.tasks[0].n_frames
    clips: dict[str, list[int]] = {}
    for task in job.tasks:
        clips.setdefault(task.path, []).append(task.first // length)
    return [
        {"path": path, "first": numbers[at], "count": len(numbers[at : at + PIECE])}
        for path, numbers in clips.items()
        for at in range(0, len(numbers), PIECE)
    ]


def clips_of(batch: dict[str, np.ndarray], job: Job, step: int) -> Iterator[dict[str, Any]]:
    """The clips of pieces: path, number in the video, uint8 RGB frames [1, T, 360, 640, 3]."""
    from decord import VideoReader

    note = Path(job.folder) / f"decoding-{os.getpid()}.json"
    if not note.is_file():  # by the clock that all processes share
        note.write_text(json.dumps(time.monotonic()), encoding="utf-8")
    span = job.tasks[0].n_frames * step
    for path, first, count in zip(batch["path"], batch["first"], batch["count"], strict=True):
        reader = VideoReader(str(path), width=WIDTH, height=HEIGHT, num_threads=1)
        for clip in range(first, first + count):
            frames = reader.get_batch(list(range(clip * span, (clip + 1) * span, step))).asnumpy()
            yield {"path": [str(path)], "clip": [clip], "frames": frames[None]}


def do(job: Job) -> dict[str, Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    work = pieces(job)
    began = time.monotonic()
    folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
    ray.init(
        num_cpus=job.processes,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    try:
        context = DataContext.get_current()
        context.wait_for_min_actors_s = 300  # nothing is read before they are all there
        context.target_max_block_size = 2**20
        actors = {
            "compute": ActorPoolStrategy(size=job.processes),
            "num_cpus": 0,
            "fn_constructor_args": (job,),
        }
        parts = ray.data.from_items(work, override_num_blocks=len(work))
        clips = parts.map_batches(clips_of, batch_size=1, fn_args=(job, grid_step(job)))
        rows = clips.map(Score, **actors).map_batches(Embed, batch_size=1, **actors).take_all()
        ended = time.monotonic()
        version = ray.__version__
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    noted = Path(job.folder).glob("decoding-*.json")
    decoding = min(json.loads(path.read_text(encoding="utf-8")) for path in noted)
    seconds = {"seconds": ended - decoding, "start_up_left_out_s": decoding - began}
    return {"version": version, **seconds, **answer(job, rows)}


def run(quick: bool) -> dict[str, Any]:
    """A share of the work that ``end_to_end.run`` left in the cache."""
    return peer("peers_ray.py", "ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("answer", type=Path)
    args = parser.parse_args()
    args.answer.write_text(json.dumps(do(Job.read(args.job))), encoding="utf-8")


if __name__ == "__main__":
    main()
