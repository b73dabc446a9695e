"""One GPU's work, in a child process: units are decoded in several threads, everything after that in two.

Clips of all units meet in one queue, so batches are filled across videos. Frames stay on the device: scores,
landmarks and vectors are all that comes back. Queues are bounded, by clips; who waits for whom is measured.

The device may also be a CPU, where this is slower than one process per core and gives the same rows.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ego2robot import decode, remote
from ego2robot.decode import policy
from ego2robot.errors import UserError, VideoError
from ego2robot.jobs.pool import Broken
from ego2robot.jobs.worker import WAITS, ScoredClip, Scoring, Stopwatch, hand_detector, score_clips
from ego2robot.stages.base import Embedder
from ego2robot.stages.clip import CLIP
from ego2robot.stages.inference import embed_finite, out_of_memory
from ego2robot.stages.videomae import VideoMAE
from ego2robot.types import ClipFrames, FrameSpec, Unit

SCORE_CLIPS = 32  # in one pass; of 36 frames of 640 x 360 they take 0.8 GB
GATHER_S = 0.01  # how long an incomplete batch waits for more clips
IDLE_S = 0.2  # without a new clip, after which waiting pictures are embedded in an incomplete batch


@dataclass
class _Entry:
    """A decoded clip on its way, and where its answer goes."""

    frames: ClipFrames
    answers: queue.SimpleQueue[ScoredClip | BaseException]
    ready: torch.cuda.Event | None  # its frames are written


@dataclass
class _Waiting:
    """A kept clip whose vectors are not all there yet."""

    scored: ScoredClip
    answers: queue.SimpleQueue[ScoredClip | BaseException]
    ready: torch.cuda.Event | None  # its pictures are written
    left: int


@dataclass
class _Buffer:
    """Pictures that wait for one embedder."""

    embedder: Embedder
    clips: list[tuple[_Waiting, torch.Tensor]] = field(default_factory=list)


class Lane:
    """Threads that score and embed what is submitted. One a process.

    Args:
        work: as for a scoring child; ``work.device`` is where everything happens.
        embedders: for kept clips.
    """

    def __init__(self, work: Scoring, embedders: Sequence[Embedder]) -> None:
        remote.configure(work.cfg.source.cache_gib)
        self._work, self._embedders = work, embedders
        self._device = torch.device(work.device)
        self._detector = hand_detector(work)
        self._spec = FrameSpec(work.cfg.frames.height, work.cfg.frames.width, work.cfg.frames.fit)
        self._decoded: queue.Queue[_Entry] = queue.Queue(2 * SCORE_CLIPS)
        self._kept: queue.Queue[_Waiting] = queue.Queue(4 * SCORE_CLIPS)
        self._broken: BaseException | None = None
        for target in (self._score_loop, self._embed_loop):
            threading.Thread(target=self._guarded, args=(target,), daemon=True).start()

    def score(self, unit: Unit) -> Iterator[ScoredClip]:
        """Decodes a unit and yields its clips as they are done, in any order. Called by many threads."""
        answers: queue.SimpleQueue[ScoredClip | BaseException] = queue.SimpleQueue()
        waiting = 0
        watch = Stopwatch()
        with self._stream():
            try:
                for found in self._decode(unit):
                    watch.lap("decode")
                    if isinstance(found, decode.ClipFailure):
                        yield ScoredClip(found.clip, "failed", found.reason, seconds=watch.take())
                    else:
                        self._submit(found, answers)
                        waiting += 1
                        watch.lap(f"decode{WAITS}score")
                    while waiting and not answers.empty():
                        yield self._answer(answers, watch)
                        waiting -= 1
                    watch.lap(f"decode{WAITS}write")
            except VideoError:
                while waiting:
                    yield self._answer(answers, watch)
                    waiting -= 1
                raise
            while waiting:
                yield self._answer(answers, watch)
                waiting -= 1

    def _decode(self, unit: Unit) -> Iterator[ClipFrames | decode.ClipFailure]:
        video, cfg = unit.video, self._work.cfg
        assert video.info is not None
        decoded_s = sum(clip.end_s - clip.start_s for clip in unit.clips)
        backend, _ = policy.pick(video.info, cfg.decode.backend, self._work.device, decoded_s)
        device, fast = self._work.device, cfg.decode.mode == "fast"
        return decode.read_clips(
            video.name, video.blob, video.info, unit.clips, self._spec, backend, device, fast
        )

    def _submit(self, frames: ClipFrames, answers: queue.SimpleQueue[ScoredClip | BaseException]) -> None:
        self._put(self._decoded, _Entry(frames, answers, self._event()))

    def _answer(self, answers: queue.SimpleQueue[ScoredClip | BaseException], watch: Stopwatch) -> ScoredClip:
        while True:
            try:
                answer = answers.get(timeout=1.0)
                break
            except queue.Empty:
                self._check()
        watch.lap(f"decode{WAITS}embed")
        if isinstance(answer, BaseException):
            self._check()
            raise answer
        for stage, spent in watch.take().items():
            answer.seconds[stage] = answer.seconds.get(stage, 0.0) + spent
        return answer

    def _put(self, waiting: queue.Queue[Any], entry: object) -> None:
        while True:
            self._check()
            try:
                waiting.put(entry, timeout=1.0)
                return
            except queue.Full:
                continue

    def _check(self) -> None:
        """Raises what ended one of the two threads: after that nothing works here any more."""
        if isinstance(self._broken, UserError):
            raise self._broken
        if self._broken:
            raise Broken("a thread of this process ended") from self._broken

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    # -- the two threads that compute ---------------------------------------------------------------

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            with self._stream(), torch.inference_mode():
                loop()
        except BaseException as error:  # noqa: BLE001 — raised in every thread that waits for an answer
            self._broken = error

    def _stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(torch.cuda.Stream(self._device))

    def _score_loop(self) -> None:
        watch = Stopwatch()
        while True:
            entries = self._gather()
            watch.lap(f"score{WAITS}decode")
            for entry in entries:
                if entry.ready:
                    torch.cuda.current_stream().wait_event(entry.ready)
                    entry.frames.frames_THWC.record_stream(torch.cuda.current_stream())
            scored = self._score(entries, watch)
            scored[0].seconds = watch.take()
            for entry, one in zip(entries, scored, strict=True):
                if one.prepared:
                    self._put(self._kept, _Waiting(one, entry.answers, self._event(), len(one.prepared)))
                else:
                    entry.answers.put(one)
            watch.lap(f"score{WAITS}embed")

    def _gather(self) -> list[_Entry]:
        """At least one clip; as many as one pass takes where they come soon."""
        entries = [self._decoded.get()]
        until = time.monotonic() + GATHER_S
        while len(entries) < SCORE_CLIPS:
            try:
                entries.append(self._decoded.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
        return entries

    def _score(self, entries: Sequence[_Entry], watch: Stopwatch) -> list[ScoredClip]:
        """Scores clips; where memory does not suffice for all at once, in halves."""
        try:
            return score_clips([entry.frames for entry in entries], self._work, self._detector, watch)
        except RuntimeError as error:
            if not out_of_memory(error) or len(entries) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(entries) // 2
        return self._score(entries[:half], watch) + self._score(entries[half:], watch)

    def _embed_loop(self) -> None:
        buffers = {embedder.name: _Buffer(embedder) for embedder in self._embedders}
        watch = Stopwatch()
        finite: set[str] = set()
        while True:
            try:
                clip = self._kept.get(timeout=IDLE_S)
            except queue.Empty:
                watch.lap(f"embed{WAITS}score")
                for buffer in buffers.values():
                    self._embed(buffer, watch, finite)
                continue
            watch.lap(f"embed{WAITS}score")
            prepared, clip.scored.prepared = clip.scored.prepared, {}
            if clip.ready:
                torch.cuda.current_stream().wait_event(clip.ready)
            for name, pictures in prepared.items():
                assert isinstance(pictures, torch.Tensor)
                if clip.ready:
                    pictures.record_stream(torch.cuda.current_stream())
                buffer = buffers[name]
                buffer.clips.append((clip, pictures))
                if len(buffer.clips) >= buffer.embedder.batch_size:
                    self._embed(buffer, watch, finite)

    def _embed(self, buffer: _Buffer, watch: Stopwatch, finite: set[str]) -> None:
        clips, buffer.clips = buffer.clips, []
        if not clips:
            return
        name = buffer.embedder.name
        vectors = embed_finite(buffer.embedder, [pictures for _, pictures in clips], name in finite)
        watch.lap(name)
        if any(vector is not None for vector in vectors):
            finite.add(name)
        for (waiting, _), vector in zip(clips, vectors, strict=True):
            if vector is None:
                waiting.scored.decision = "failed"
                waiting.scored.reason = f"{name} embedding not finite"
                waiting.scored.hands = []
            else:
                waiting.scored.vectors[name] = vector
            waiting.left -= 1
            if not waiting.left:
                for stage, spent in watch.take().items():
                    waiting.scored.seconds[stage] = waiting.scored.seconds.get(stage, 0.0) + spent
                waiting.answers.put(waiting.scored)


def lane(work: Scoring) -> Callable[[Unit], Iterator[ScoredClip]]:
    """The work of a lane's child process; loads its own models.

    Raises:
        UserError: the device or the weights cannot be used.
    """
    if work.device.startswith("cuda"):
        try:
            torch.cuda.set_device(work.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"{work.device}: cannot be used ({error}); run `ego2robot doctor`") from None
    cfg = work.cfg
    embedders: list[Embedder] = []
    wanted = {preprocess.name for preprocess in work.preprocess}
    if "videomae" in wanted:
        embedders.append(VideoMAE.load(cfg.embed.videomae, work.device, cfg.seed))
    if "clip" in wanted:
        embedders.append(CLIP.load(cfg.embed.clip, work.device, cfg.seed))
    return Lane(work, embedders).score
