"""MediaPipe's own hand landmarker (mediapipe ≥ 1.2) on its official models: what ours is measured against.

Left and right. Since 0.10.30 MediaPipe names the side of the *person* whose hand it is when the picture
is not mirrored; its older solutions assumed a selfie mirror and said the opposite. Measured on 1.2.2 with
pictures of known side (three gesture photographs; 203 frames of two hands on a table): the wearer's left
hand is called Left. So ``Hand.side`` is the label as it comes.
"""

from __future__ import annotations

import io
import tempfile
import weakref
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mediapipe
import numpy as np
import torch
from mediapipe.tasks.python import BaseOptions, vision

from ego2robot import models
from ego2robot.stages.sides import Candidate, one_per_side, within
from ego2robot.types import N_LANDMARKS, Hand

ALIGNMENT = 64  # bytes; what TensorFlow Lite asks of a buffer that it maps instead of copying
_ZIP_LOCAL_HEADER = 30  # bytes before the name, PKWARE APPNOTE 4.3.7
_ZIP_PADDING_ID = 0xD935  # the extra field that Android's zipalign pads with


class MediaPipeHands:
    """Hands of single frames: no frame depends on another, so any subset gives the same result.

    Runs on one thread of the CPU. Not to be shared between threads or carried over a fork.

    Args:
        max_hands: at most so many are looked for; at most one per side is reported.
        min_detection: confidence of the palm detector, 0..1.
        min_presence: confidence of the landmark network that there is a hand, 0..1.
    """

    def __init__(self, max_hands: int = 2, min_detection: float = 0.5, min_presence: float = 0.5) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "hand_landmarker.task"
            path.write_bytes(bundle())
            options = vision.HandLandmarkerOptions(
                base_options=BaseOptions(model_asset_path=str(path)),
                running_mode=vision.RunningMode.IMAGE,
                num_hands=max_hands,
                min_hand_detection_confidence=min_detection,
                min_hand_presence_confidence=min_presence,
            )
            self._landmarker: Any = vision.HandLandmarker.create_from_options(options)
        # Closes at exit too: mediapipe's own destructor fails once the interpreter is going down.
        self._close = weakref.finalize(self, self._landmarker.close)

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
        image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(frame_HWC))
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


def _points(landmarks: Sequence[Any]) -> np.ndarray:
    points = np.array([(p.x, p.y, p.z) for p in landmarks], np.float32)
    assert points.shape == (N_LANDMARKS, 3)
    return points


def bundle() -> bytes:
    """``hand_landmarker.task``: an uncompressed zip of both networks, which start at multiples of 64 bytes.

    MediaPipe maps the file, and TensorFlow Lite copies (and complains of) tensors that lie unaligned.
    """
    palm, landmark = models.hand_networks("full", pull_if_missing=True)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, source in (("hand_detector.tflite", palm), ("hand_landmarks_detector.tflite", landmark)):
            entry = zipfile.ZipInfo(name)
            before = out.tell() + _ZIP_LOCAL_HEADER + len(name) + 4
            gap = -before % ALIGNMENT
            entry.extra = _ZIP_PADDING_ID.to_bytes(2, "little") + gap.to_bytes(2, "little") + bytes(gap)
            archive.writestr(entry, source.read_bytes())
    return out.getvalue()
