"""How long does Ray Data take for the same curation and both embedders?

Its documented way with video: ``ray.data.read_videos`` (decord) at the rate and size that are wanted, rows
of frames, clips by ``groupby().map_groups`` and models in classes that ``map_groups`` and ``map_batches``
keep in actors, as many as there are cores, one thread each. What the classes do is the staged way's code
(MediaPipe one picture at a time, the Hugging Face processors, float32), and clips that the gate drops are not
embedded. Starting Ray and the longest loading of each model are left out of its time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers_daft import answer, grid_step, in_order, note_loading, peer
from staged import HEIGHT, WIDTH, Embedders, Hands, Job, motion


class Score:
    """Of one clip's frames: its scores, and the frames themselves for those that are kept."""

    def __init__(self, job: Job, step: int) -> None:
        import torch

        began = time.perf_counter()
        torch.set_num_threads(1)
        self._job, self._step = job, step
        self._hands = Hands()
        note_loading(job.folder, "hands", began)

    def __call__(self, group: dict[str, np.ndarray]) -> dict[str, Any]:
        import cv2

        clip = in_order(group["frame"], group["frame_index"])
        scores = motion(clip, cv2.COLOR_RGB2GRAY), self._hands.visibility(clip, self._job.hands_every)
        return {
            "path": [str(group["path"][0])],
            "clip": [int(group["clip"][0])],
            "motion": [scores[0]],
            "visibility": [scores[1]],
            "frames": clip[None] if self._job.keeps(*scores) else clip[None, :0],
        }


class Embed:
    def __init__(self, job: Job) -> None:
        import torch

        began = time.perf_counter()
        torch.set_num_threads(1)
        self._embedders = Embedders(job.seed)
        note_loading(job.folder, "embedders", began)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        clips = list(batch.pop("frames"))
        batch["embedded"] = np.array([len(clip) > 0 for clip in clips])
        for clip in clips:
            if len(clip):
                self._embedders.videomae([clip])
                self._embedders.clip([clip])
        return batch


def do(job: Job) -> dict[str, Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    step, length = grid_step(job), job.tasks[0].n_frames
    folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
    ray.init(
        num_cpus=job.processes,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    try:
        began = time.perf_counter()
        frames = ray.data.read_videos(
            sorted({task.path for task in job.tasks}),
            include_paths=True,
            fps=round(job.tasks[0].sample_fps),
            resize=(HEIGHT, WIDTH),
        )
        frames = frames.map_batches(
            lambda batch: {**batch, "clip": batch["frame_index"] // (step * length)}, batch_size=36
        )
        # So little that actors of both kinds and the readers beside them share the cores.
        actors = {"concurrency": job.processes, "num_cpus": 0.05}
        scored = frames.groupby(["path", "clip"]).map_groups(Score, fn_constructor_args=(job, step), **actors)
        done = scored.map_batches(Embed, batch_size=1, fn_constructor_args=(job,), **actors)
        rows = done.take_all()
        seconds = time.perf_counter() - began
        version = ray.__version__
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    return {"version": version, **answer(job, rows, seconds)}


def run(quick: bool) -> dict[str, Any]:
    """The work that ``end_to_end.run`` left in the cache."""
    return peer("peers_ray.py", "ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("answer", type=Path)
    args = parser.parse_args()
    args.answer.write_text(json.dumps(do(Job.read(args.job))), encoding="utf-8")


if __name__ == "__main__":
    main()
