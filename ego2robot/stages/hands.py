"""Hands in frames, by MediaPipe's hand landmarker (mediapipe ≥ 1.2) on its official models.

Left and right. Since 0.10.30 MediaPipe names the side of the *person* whose hand it is when the picture
is not mirrored; its older solutions assumed a selfie mirror and said the opposite. Measured on 1.2.2 with
pictures of known side (three gesture photographs; 203 frames of two hands on a table): the wearer's left
hand is called Left. So ``Hand.side`` is the label as it comes.

Network. By its own package description mediapipe sends usage metrics (not pictures) to
``play.googleapis.com`` and offers no switch for it; without a network it works the same.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ego2robot import models
from ego2robot.errors import UserError
from ego2robot.stages.sides import Candidate, one_per_side, within
from ego2robot.types import N_LANDMARKS, Hand

INSTALL = "pip install 'mediapipe>=1.2'"
# Lines that mediapipe, absl and TensorFlow Lite write on every start, whatever the environment says.
_CHATTER = re.compile(
    rb"[IW]\d{4} \d\d:\d\d:|WARNING: Logging before InitGoogle|WARNING: All log messages before absl"
    rb"|INFO: Created TensorFlow Lite XNNPACK delegate"
)
_stderr_lock = threading.Lock()


class MediaPipeHands:
    """Hands of single frames: no frame depends on another, so any subset gives the same result.

    Runs on one thread of the CPU. Not to be shared between threads or carried over a fork.

    Args:
        max_hands: at most so many are looked for; at most one per side is reported.
        min_detection: confidence of the palm detector, 0..1.
        min_presence: confidence of the landmark network that there is a hand, 0..1.

    Raises:
        UserError: mediapipe or its models are missing or cannot be loaded.
    """

    def __init__(self, max_hands: int = 2, min_detection: float = 0.5, min_presence: float = 0.5) -> None:
        path = models.hand_landmarker_path()
        self._mediapipe, vision, base_options = _import_mediapipe()
        options = vision.HandLandmarkerOptions(
            base_options=base_options(model_asset_path=str(path)),
            running_mode=vision.RunningMode.IMAGE,
            num_hands=max_hands,
            min_hand_detection_confidence=min_detection,
            min_hand_presence_confidence=min_presence,
        )
        with _without_chatter():
            try:
                self._landmarker: Any = vision.HandLandmarker.create_from_options(options)
            except OSError as error:
                raise UserError(f"mediapipe: does not load ({error}); {_next_step(error)}") from None
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{path}: mediapipe cannot use it ({error}); {INSTALL}") from None
            # Closes at exit too: mediapipe's own destructor fails once the interpreter is going down.
            self._close = weakref.finalize(self, self._landmarker.close)
            # The first picture sets up the rest of the graph, with the rest of the chatter.
            self._candidates(np.zeros((64, 64, 3), np.uint8))

    def detect(
        self,
        frames_THWC: torch.Tensor,
        indices: np.ndarray,
        content: tuple[int, int, int, int] | None = None,
    ) -> list[list[Hand]]:
        """The hands in ``frames_THWC[indices]``.

        Args:
            frames_THWC: uint8 RGB [T, H, W, 3], on any device and with any strides.
            indices: int [N], which frames to look at.
            content: (top, left, height, width) of the picture inside the frame, in pixels; None is the
                whole frame. The palm detector sees the picture scaled into a square, so bars at the sides
                make hands smaller for it: on a 4:3 picture in a 16:9 frame they cost a fifth of the hands.

        Returns:
            N lists of at most two hands, left before right, at most one per side. ``Hand.frame`` is the
            index; coordinates are shares of the whole frame. Landmarks may lie a little outside the frame,
            boxes are clipped to it. ``Hand.score`` is the probability of the side that the hand was given:
            it is below 0.5 where two hands both looked like the same side and one had to be the other.

        Raises:
            ValueError: not uint8 [T, H, W, 3], or the detector was closed.
        """
        if frames_THWC.dtype != torch.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3:
            shape = tuple(frames_THWC.shape)
            raise ValueError(f"frames are {frames_THWC.dtype} {shape}, not uint8 [T, H, W, 3]")
        found = []
        for i in indices:
            frame_HWC = frames_THWC[int(i)].cpu().numpy()
            if content is None:
                candidates = self._candidates(frame_HWC)
            else:
                top, left, height, width = content
                inner = self._candidates(frame_HWC[top : top + height, left : left + width])
                candidates = [within(candidate, content, frame_HWC.shape[:2]) for candidate in inner]
            found.append(one_per_side(candidates, int(i)))
        return found

    def close(self) -> None:
        self._close()

    def __enter__(self) -> MediaPipeHands:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _candidates(self, frame_HWC: np.ndarray) -> list[Candidate]:
        if not self._close.alive:
            raise ValueError("the hand detector was closed")
        # mediapipe takes the pointer and ignores strides: a view would be read as another picture.
        image = self._mediapipe.Image(
            image_format=self._mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(frame_HWC)
        )
        result = self._landmarker.detect(image)
        found = []
        for sides, landmarks, world in zip(
            result.handedness, result.hand_landmarks, result.hand_world_landmarks, strict=True
        ):
            best = sides[0]
            found.append(
                Candidate(
                    best.score if best.category_name == "Left" else 1 - best.score,
                    _points(landmarks),
                    _points(world),
                )
            )
        return found


def visibility(hands_per_looked_at_frame: Sequence[Sequence[Hand]]) -> float:
    """Share of looked-at frames with at least one hand, 0 to 1; 0 when none was looked at."""
    looked = len(hands_per_looked_at_frame)
    return sum(bool(hands) for hands in hands_per_looked_at_frame) / looked if looked else 0.0


def _points(landmarks: Sequence[Any]) -> np.ndarray:
    points = np.array([(p.x, p.y, p.z) for p in landmarks], np.float32)
    assert points.shape == (N_LANDMARKS, 3)
    return points


def _import_mediapipe() -> tuple[Any, Any, Any]:
    try:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError as error:
        raise UserError(
            f"mediapipe: does not import ({error}); {_next_step(error)}, or hands.detector=none to go without"
        ) from None
    return mediapipe, vision, BaseOptions


def _next_step(error: ImportError | OSError) -> str:
    # mediapipe links the system's OpenGL ES and its OpenCV may link OpenGL, on machines without a screen too.
    if "shared object file" in str(error):
        return "on Debian or Ubuntu: apt-get install libegl1 libgles2 libgl1 libglib2.0-0"
    return INSTALL


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Holds back what native code writes to stderr, then lets through all but the known chatter.

    The libraries write to the file descriptor and read no environment variable that would stop them.
    """
    with _stderr_lock:
        try:
            kept = os.dup(2)
        except OSError:  # stderr is closed: nothing to keep clean
            yield
            return
        if sys.stderr:
            sys.stderr.flush()
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                os.close(kept)
                held.seek(0)
                rest = b"".join(line for line in held if not _CHATTER.match(line))
                if rest:
                    os.write(2, rest)
