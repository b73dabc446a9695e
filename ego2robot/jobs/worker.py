"""What runs beside the decoder, in a child process: one pass over a unit's frames.

Decode, motion, gate, hands, gate; for the clips that are left the landmarks of every frame and the
small pictures that the embedders want. Frames stay here; only rows and those pictures go on.
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ego2robot import config, decode, remote
from ego2robot.decode import policy
from ego2robot.stages import hand_motion
from ego2robot.stages.base import HandDetector, Preprocess
from ego2robot.stages.camera import camera_scores
from ego2robot.stages.gate import Gate
from ego2robot.stages.hands import visibility
from ego2robot.stages.hands_torch import TorchHands
from ego2robot.stages.motion import motion_scores, used_greys
from ego2robot.types import Clip, ClipFrames, Decision, FrameSpec, Hand, Unit

# Seconds under a name with WAITS in it were not worked but waited: who, and for whom.
WAITS = " waits for "
DECODE_WAITS = f"decode{WAITS}embed"
SCORES = ("motion", "residual_motion", "camera_motion", "camera_confidence", "hand_visibility")


@dataclass(frozen=True)
class Scoring:
    """What a child needs to know. Pickles.

    Attributes:
        gate: None scores every clip on everything and keeps none (calibration of quantiles).
        preprocess: of the embedders that will want survivors.
        device: where frames are decoded to.
        hands_dtype: what the hand networks compute in.
    """

    cfg: config.Config
    gate: Gate | None
    preprocess: tuple[Preprocess, ...] = ()
    device: str = "cpu"
    hands_dtype: torch.dtype = torch.float32


@dataclass
class ScoredClip:
    """One clip after the gates.

    Attributes:
        scores: ``motion``, ``residual_motion``, ``camera_motion``, ``camera_confidence`` and
            ``hand_visibility``, as far as they were looked at.
        hands: what was found, in any looked-at frame.
        times_s: float64 [T], presentation time of each sampled frame.
        prepared: embedder to uint8 [T, h, w, 3], for a kept clip whose vectors are not made yet.
        vectors: embedder to float32 [dim].
        hand_motion: float32 [hand_motion.DIM], for a kept clip in which hands were looked for.
        seconds: stage to seconds, since the clip before.
    """

    clip: Clip
    decision: Decision
    reason: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    hands: list[Hand] = field(default_factory=list)
    times_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    prepared: dict[str, np.ndarray | torch.Tensor] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    hand_motion: np.ndarray | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Seconds by stage: each ``lap(stage)`` adds the time since the last one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        seconds = dict(self.seconds)
        self.seconds.clear()
        return seconds


def return_large_blocks() -> None:
    """Has glibc give blocks of 1 MiB and more back to the system when they are freed.

    Left alone it raises that limit to 32 MiB at the first free, then keeps frames in its heap, which
    fragments: a worker grew by 150 MiB in three minutes (mallopt(3), M_MMAP_THRESHOLD).
    """
    if platform.libc_ver()[0] == "glibc":
        m_mmap_threshold, m_arena_max = -3, -8
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 1 << 20)
        libc.mallopt(m_arena_max, 2)


def scoring(work: Scoring) -> Callable[[Unit], Iterator[ScoredClip]]:
    """The work of a scoring child: a unit to its clips, each as soon as its frames are there."""
    remote.configure(work.cfg.source.cache_gib)
    torch.set_num_threads(1)  # one process per core; threads of several would only fight
    return_large_blocks()
    cfg = work.cfg
    detector = hand_detector(work)
    spec = FrameSpec(cfg.frames.height, cfg.frames.width, cfg.frames.fit)

    def score(unit: Unit) -> Iterator[ScoredClip]:
        video = unit.video
        assert video.info is not None
        backend, _ = policy.pick(video.info, cfg.decode.backend, work.device)
        watch = Stopwatch()
        fast = cfg.decode.mode == "fast"
        for found in decode.read_clips(
            video.name, video.blob, video.info, unit.clips, spec, backend, work.device, fast
        ):
            watch.lap("decode")
            if isinstance(found, decode.ClipFailure):
                scored = ScoredClip(found.clip, "failed", found.reason)
            else:
                (scored,) = score_clips([found], work, detector, watch)
                scored.prepared = {name: np.asarray(each) for name, each in scored.prepared.items()}
            scored.seconds = watch.take()
            yield scored
            watch.lap(DECODE_WAITS)

    return score


def hand_detector(work: Scoring) -> HandDetector | None:
    """The detector that a recipe asks for; None for none."""
    hands = work.cfg.hands
    if hands.detector == "none":
        return None
    return TorchHands(
        hands.max_hands,
        hands.min_detection,
        hands.min_presence,
        device=work.device,
        dtype=work.hands_dtype,
        networks=hands.detector,
    )


def score_clips(
    clips: Sequence[ClipFrames], work: Scoring, detector: HandDetector | None, watch: Stopwatch
) -> list[ScoredClip]:
    """Motion, gate, hands, gate, camera, gate; then what survivors need. Clips do not depend on each other.

    Args:
        clips: of one picture size, on one device, where everything is computed.
        watch: gets a lap for every stage.

    Returns:
        One answer per clip, in their order. Pictures for the embedders stay on the device.
    """
    cfg, gate = work.cfg, work.gate
    scored = [ScoredClip(clip.clip, "dropped", times_s=clip.times_s) for clip in clips]
    greys = used_greys(clips)
    for one, motion in zip(scored, motion_scores(clips, greys).tolist(), strict=True):
        one.scores["motion"] = motion
        one.reason = gate.refuses_motion(motion) if gate else None
    watch.lap("motion")
    left = [i for i, one in enumerate(scored) if not one.reason]
    if detector and left:
        looked = {i: np.arange(0, len(clips[i].frames_THWC), cfg.hands.every) for i in left}
        found = detector.detect_batch([_request(clips[i], looked[i]) for i in left])
        for i, hands in zip(left, found, strict=True):
            one = scored[i]
            one.scores["hand_visibility"] = visibility(hands)
            one.hands = [hand for frame in hands for hand in frame]
            one.reason = gate.refuses_hands(one.scores["hand_visibility"]) if gate else None
        watch.lap("hands")
    # Hands that are known are left out: the rest of the picture tells more of the camera.
    camera = camera_scores(clips, [one.hands for one in scored], greys)
    for i, one in enumerate(scored):
        one.scores |= {name: float(values[i]) for name, values in camera.items()}
        if gate and not one.reason:
            one.reason = gate.refuses_camera(one.scores["residual_motion"], one.scores["camera_motion"])
    watch.lap("camera")
    if gate:
        left = [i for i, one in enumerate(scored) if not one.reason]
        _complete([clips[i] for i in left], [scored[i] for i in left], work, detector, watch)
    return scored


def _complete(
    clips: Sequence[ClipFrames],
    kept: Sequence[ScoredClip],
    work: Scoring,
    detector: HandDetector | None,
    watch: Stopwatch,
) -> None:
    """What kept clips need besides their scores: all landmarks, and pictures for the embedders."""
    cfg = work.cfg
    for one in kept:
        one.decision = "kept"
    if detector and kept and cfg.hands.dense:
        frames = [np.arange(len(clip.frames_THWC)) for clip in clips]
        rest = [each[each % cfg.hands.every != 0] for each in frames]
        found = detector.detect_batch([_request(clip, some) for clip, some in zip(clips, rest, strict=True)])
        for one, hands in zip(kept, found, strict=True):
            one.hands += [hand for frame in hands for hand in frame]
        missed = detector.refind(
            [(clip.frames_THWC, one.hands, clip.content) for clip, one in zip(clips, kept, strict=True)],
            cfg.hands.max_gap,
        )
        for one, more in zip(kept, missed, strict=True):
            one.hands = sorted(one.hands + more, key=lambda hand: (hand.frame, hand.side))
    if detector and cfg.embed.hand_motion:
        aspect = cfg.frames.width / cfg.frames.height
        for clip, one in zip(clips, kept, strict=True):
            one.hand_motion = hand_motion.hand_motion(one.hands, len(clip.frames_THWC), aspect)
    watch.lap("hands")
    for clip, one in zip(clips, kept, strict=True):
        for preprocess in work.preprocess:
            picked = torch.from_numpy(preprocess.indices(len(clip.frames_THWC)))
            frames_THWC = clip.frames_THWC[picked.to(clip.frames_THWC.device)]
            one.prepared[preprocess.name] = preprocess.prepare(frames_THWC)
    watch.lap("prepare")


def _request(
    clip: ClipFrames, frames: np.ndarray
) -> tuple[torch.Tensor, np.ndarray, tuple[int, int, int, int]]:
    return clip.frames_THWC, frames, clip.content


def rows_of(scored: ScoredClip, unit: Unit) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A clip's row of ``clips`` (labels still missing) and its rows of ``hands``."""
    video, info = unit.video, unit.video.info
    assert info is not None
    clip = scored.clip
    row = {
        "clip_id": clip.clip_id,
        "video_id": video.video_id,
        "source": video.source,
        "name": video.name,
        "start_s": clip.start_s,
        "end_s": clip.end_s,
        "n_frames": clip.n_frames,
        "fps": info.fps,
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
        **{name: scored.scores.get(name) for name in SCORES},
        "decision": scored.decision,
        "reason": scored.reason,
        "label": None,
        "label_score": None,
        "labels": None,
        "meta": list({**video.meta, **clip.meta}.items()),
    }
    hands = [
        {
            "clip_id": clip.clip_id,
            "frame": hand.frame,
            "time_s": float(scored.times_s[hand.frame]),
            "side": hand.side,
            "score": hand.score,
            "presence": hand.presence,
            "box": hand.box.tolist(),
            "landmarks": hand.landmarks.reshape(-1).tolist(),
            "world": hand.world.reshape(-1).tolist(),
        }
        for hand in scored.hands
    ]
    return row, hands
