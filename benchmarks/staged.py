"""The same work the staged way: one stage after the other over all clips, frame stacks on disk between them.

This is how the reference pipeline works, written from its definitions: OpenCV decodes each clip on its own
(seek to its start, grab every frame, retrieve every fifth), resizes to 640 x 360 and saves a stack; motion is
OpenCV's; MediaPipe looks at one picture at a time; Pillow and the Hugging Face processors prepare what
VideoMAE-B and CLIP B/32 then embed, one clip at a time, in float32. Every stage reads the stacks again.

Where the reference is plainly wrong it is put right, so that both ways do the same work and their decisions
and vectors can be compared: frames are the ones on screen at the times of our grid (for 30 frames/s that is
every fifth), pictures are RGB before they reach a model, the first resize averages areas (bilinear by a third
would alias and call it motion), VideoMAE's tokens are averaged, and the weights are ours, from the same seed.
As in the reference, hands are looked for in every clip, whatever its motion.

What it is given is the best we found for it: one process a core with one thread each, grab instead of a full
conversion of frames that are thrown away, stacks in a page cache that has room. Loading models is left out of
its time, as it is of ours. ``as_reference`` takes the first two back: one process, whose libraries use
threads of their own, and every frame converted in full, as the reference does it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common  # noqa: F401 — lets `tests` be imported
import cv2
import numpy as np
import torch
from PIL import Image

from ego2robot import config
from ego2robot.stages.clip import CLIP
from ego2robot.stages.preprocess import CLIPPreprocess, VideoMAEPreprocess
from ego2robot.stages.videomae import VideoMAE

WIDTH, HEIGHT = 640, 360


@dataclass(frozen=True)
class Task:
    """One clip: which frames of which file. Frame ``i`` is due at ``(first + i) / sample_fps`` seconds."""

    clip_id: str
    path: str
    first: int
    n_frames: int
    sample_fps: float


@dataclass(frozen=True)
class Job:
    """What every way of doing the work is told.

    Attributes:
        hands_every: hands are looked for in every so many-th frame of a clip.
        folder: for frame stacks, and for the vectors that come out.
        embed: both embedders too, not curation alone.
        as_reference: in one process, every frame converted.
    """

    tasks: list[Task]
    min_motion: float
    min_hand_visibility: float
    hands_every: int
    seed: int
    processes: int
    folder: str
    embed: bool
    as_reference: bool = False

    @staticmethod
    def read(path: Path) -> Job:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**tree, "tasks": [Task(**task) for task in tree["tasks"]]})

    def keeps(self, motion: float, visibility: float) -> bool:
        return motion >= self.min_motion and visibility >= self.min_hand_visibility


# -- what the stages do to one clip; the peers do the same ----------------------------------------


def decode(task: Task, as_reference: bool = False) -> np.ndarray:
    """uint8 BGR [T, 360, 640, 3] of a clip, decoded on its own."""
    options = [] if as_reference else [cv2.CAP_PROP_N_THREADS, 1]
    capture = cv2.VideoCapture(task.path, cv2.CAP_FFMPEG, options)
    fps = capture.get(cv2.CAP_PROP_FPS)
    due = [int((task.first + i) / task.sample_fps * fps + 1e-6) for i in range(task.n_frames)]
    at = due[0]
    capture.set(cv2.CAP_PROP_POS_FRAMES, at)
    frames = []
    for frame in due:
        while at <= frame:
            if not capture.grab():
                raise RuntimeError(f"{task.path}: OpenCV reads no frame {at}")
            at += 1
            if as_reference and at <= frame:
                capture.retrieve()
        frames.append(cv2.resize(capture.retrieve()[1], (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA))
    capture.release()
    return np.stack(frames)


def motion(frames_THWC: np.ndarray, to_grey: int = cv2.COLOR_BGR2GRAY) -> float:
    """Mean |grey difference| of every second frame at 160 x 90, a share of full scale."""
    small = [cv2.cvtColor(cv2.resize(frame, (160, 90)), to_grey) for frame in frames_THWC[::2]]
    pairs = itertools.pairwise(small)
    return float(np.mean([cv2.absdiff(a, b).mean() for a, b in pairs]) / 255)


class Hands:
    """MediaPipe's own detector, one picture at a time."""

    def __init__(self) -> None:
        from tests.mediapipe_reference import MediaPipeHands

        self._detector = MediaPipeHands()

    def visibility(self, frames_THWC: np.ndarray, every: int) -> float:
        """Share of every ``every``-th frame (uint8 RGB) with at least one hand."""
        looked = frames_THWC[::every]
        return sum(bool(self._detector._candidates(frame)) for frame in looked) / len(looked)


class Embedders:
    """Both models in float32, fed by Pillow and the Hugging Face processors."""

    def __init__(self, seed: int, which: Sequence[str] = ("videomae", "clip")) -> None:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

        if "videomae" in which:
            self._videomae_processor = VideoMAEImageProcessorPil()
            weights = config.VideoMAE(weights="random")
            self._videomae = VideoMAE.load(weights, "cpu", seed, torch.float32).model
        if "clip" in which:
            self._clip_processor = CLIPImageProcessorPil()
            self._clip = CLIP.load(config.CLIP(weights="random"), "cpu", seed, torch.float32).model

    def videomae(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [B, 768] of B clips, uint8 RGB [T, H, W, 3] each."""
        pixels = []
        for frames_THWC in clips:
            picked = frames_THWC[VideoMAEPreprocess().indices(len(frames_THWC))]
            pictures = [Image.fromarray(frame) for frame in picked]
            pixels.append(self._videomae_processor(pictures, return_tensors="pt")["pixel_values"])
        with torch.inference_mode():
            return self._videomae(pixel_values=torch.cat(pixels)).last_hidden_state.mean(1).numpy()

    def clip(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [B, 512] of the middle frames of B clips, of length 1."""
        middle = [Image.fromarray(c[int(CLIPPreprocess().indices(len(c))[0])]) for c in clips]
        pixels = self._clip_processor(middle, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            pooled = self._clip.vision_model(pixel_values=pixels).pooler_output
            return torch.nn.functional.normalize(self._clip.visual_projection(pooled), dim=-1).numpy()


# -- the stages -----------------------------------------------------------------------------------

_job: Job
_together: Any
_model: Any = None


def _prepare(job: Job, together: Any) -> None:
    """Of a worker process: threads, and what it waits for its fellows with."""
    global _job, _together
    if not job.as_reference:
        cv2.setNumThreads(1)
        torch.set_num_threads(1)
    _job, _together = job, together


def _load(make: Callable[[Job], Any] | None) -> None:
    """Loads the one model of the next stage; returns when every process has its own."""
    global _model  # noqa: PLW0603
    _model = None  # that of the stage before goes first
    _model = make(_job) if make else None
    _together.wait()


def _stack(clip_id: str) -> Path:
    return Path(_job.folder) / f"{clip_id}.npy"


def _rgb(clip_id: str) -> np.ndarray:
    return np.ascontiguousarray(np.load(_stack(clip_id))[..., ::-1])


def _decode(task: Task) -> None:
    np.save(_stack(task.clip_id), decode(task, _job.as_reference))


def _motion(task: Task) -> float:
    return motion(np.load(_stack(task.clip_id)))


def _hands(task: Task) -> float:
    return _model.visibility(_rgb(task.clip_id), _job.hands_every)


def _videomae(task: Task) -> np.ndarray:
    return _model.videomae([_rgb(task.clip_id)])[0]


def _clip(task: Task) -> np.ndarray:
    return _model.clip([_rgb(task.clip_id)])[0]


def _timed(work: Callable[[Task], Any], task: Task) -> tuple[Any, float]:
    """The answer, and the CPU seconds of the process that it took."""
    began = time.process_time()
    return work(task), time.process_time() - began


def _load_hands(_: Job) -> Hands:
    return Hands()


def _load_videomae(job: Job) -> Embedders:
    return Embedders(job.seed, ["videomae"])


def _load_clip(job: Job) -> Embedders:
    return Embedders(job.seed, ["clip"])


class Workers:
    """Processes that do one stage after the other; each begins when all have loaded its model."""

    def __init__(self, job: Job) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._n = job.processes
        self._pool = spawn.Pool(self._n, _prepare, (job, spawn.Barrier(self._n)))

    def stage(
        self,
        work: Callable[[Task], Any],
        tasks: Sequence[Task],
        make: Callable[[Job], Any] | None = None,
    ) -> tuple[list[Any], float, float]:
        """One stage over some clips: its answers, the seconds since its model was loaded, CPU seconds."""
        self._pool.map(_load, [make] * self._n, chunksize=1)
        began = time.perf_counter()
        found = self._pool.map(partial(_timed, work), tasks, chunksize=1)
        seconds = time.perf_counter() - began
        return [answer for answer, _ in found], seconds, sum(cpu for _, cpu in found)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()


def run(job: Job) -> dict[str, Any]:
    """Does the work. Seconds by stage, decisions by clip; vectors go to ``vectors.npz``."""
    with Workers(job) as workers:
        return _run(job, workers)


def _run(job: Job, workers: Workers) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}

    def do(name: str, work: Callable[[Task], Any], tasks: Sequence[Task], make: Any = None) -> list[Any]:
        answers, seconds[name], cpu[name] = workers.stage(work, tasks, make)
        return answers

    do("decode", _decode, job.tasks)
    motions = do("motion", _motion, job.tasks)
    visibilities = do("hands", _hands, job.tasks, _load_hands)
    decisions = {
        task.clip_id: {"motion": m, "hand_visibility": v, "kept": job.keeps(m, v)}
        for task, m, v in zip(job.tasks, motions, visibilities, strict=True)
    }
    curation = {"seconds": sum(seconds.values()), "cpu_seconds": sum(cpu.values())}
    kept = [task for task in job.tasks if decisions[task.clip_id]["kept"]]
    if job.embed and kept:
        vectors = {
            "videomae": do("videomae", _videomae, kept, _load_videomae),
            "clip": do("clip", _clip, kept, _load_clip),
        }
        np.savez(Path(job.folder) / "vectors.npz", ids=[task.clip_id for task in kept], **vectors)
    return {
        "curation": curation,
        "all": {"seconds": sum(seconds.values()), "cpu_seconds": sum(cpu.values())},
        "stages": {name: {"seconds": seconds[name], "cpu_seconds": cpu[name]} for name in seconds},
        "decisions": decisions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("answer", type=Path)
    args = parser.parse_args()
    args.answer.write_text(json.dumps(run(Job.read(args.job))), encoding="utf-8")


if __name__ == "__main__":
    main()
