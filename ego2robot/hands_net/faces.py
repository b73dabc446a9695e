"""Faces of many frames at once: MediaPipe's two face detectors as one tensor program.

One network looks for faces near the camera in the whole frame (``face_detection_short_range``), the other
for those further away (``face_detection_full_range_sparse``), in the whole frame and again in overlapping
squares of it, where a face is larger for the network. Everything stays on the device of the frames and no
step looks at single frames in Python.

Constants: ``face_detection*.pbtxt`` of MediaPipe, which also say how its anchors lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ego2robot.hands_net import pipeline, sampling

Look = Literal["near", "far", "tiles"]
LOOKS: tuple[Look, ...] = ("near", "far", "tiles")
MIN_OVERLAP = 0.3  # intersection over union from which two boxes are one face
TILE_ROWS = 2  # rows of squares that the third look sees; as many columns as reach over the frame
_TILE_OVERLAP = 0.25  # share of a square that it shares with the next one, at least
_CANDIDATES = 128  # boxes of a frame that are merged; the surest
_SCORE_LIMIT = 100.0  # logits beyond are clipped


@dataclass(frozen=True)
class _Detector:
    """What its graph says of a network."""

    size: int  # pixels, a side of its picture
    strides: tuple[int, ...]  # pixels between anchors, layer by layer
    per_layer: int  # anchors of a layer at one place


NEAR = _Detector(128, (8, 16, 16, 16), 2)
FAR = _Detector(192, (4,), 1)


@dataclass(frozen=True)
class FoundFaces:
    """The K surest faces of each of B frames, surest first; on the device of the frames.

    Attributes:
        score_BK: float32, 0 to 1; 0 where there is no such face.
        box_BK4: float32, x_min, y_min, x_max, y_max in pixels of the frame; may reach beyond it. Chin to
            brows, ear to ear: hair and neck are not in it.
    """

    score_BK: torch.Tensor
    box_BK4: torch.Tensor


class FaceNet(nn.Module):
    """Both networks and what lies between frames and boxes.

    Args:
        near_path: ``face_detection_short_range.tflite``.
        far_path: ``face_detection_full_range_sparse.tflite``.
        device: where it runs.
        max_faces: K, slots for faces in a frame.
        min_score: score from which a box counts, 0 to 1. MediaPipe's own are 0.5 near and 0.6 far.
        doubts: what is taken off the scores of a look before they are compared with others.
        looks: which of the three are taken; ``tiles`` costs six times as much as the others together.

    Raises:
        UserError: a file is missing, is not such a network, or cannot be translated.
    """

    near_anchors_A2: torch.Tensor
    far_anchors_A2: torch.Tensor

    def __init__(
        self,
        near_path: str | Path,
        far_path: str | Path,
        device: torch.device | str = "cpu",
        max_faces: int = 16,
        min_score: float = 0.5,
        looks: Sequence[Look] = LOOKS,
        doubts: Mapping[Look, float] | None = None,
    ) -> None:
        super().__init__()
        place = torch.device(device)
        self.max_faces, self.min_score, self.looks = max_faces, min_score, tuple(looks)
        self.doubts = dict(doubts or {})
        self.near = pipeline.network(near_path, NEAR.size, place, torch.float32)
        self.far = pipeline.network(far_path, FAR.size, place, torch.float32)
        self.register_buffer("near_anchors_A2", anchors(NEAR, place))
        self.register_buffer("far_anchors_A2", anchors(FAR, place))

    @torch.inference_mode()
    def forward(self, frames_BHWC: torch.Tensor) -> FoundFaces:
        """The faces of B frames.

        Args:
            frames_BHWC: RGB [B, H, W, 3] of 0 to 255, uint8 or floating, any strides, on the module's device.
                Frames that hold NaN or infinity have no faces.
        """
        frames_BHWC = sampling.sound(frames_BHWC)
        n_frames, height, width = frames_BHWC.shape[:3]
        scores, boxes = [], []
        for look in self.looks:
            views = tiles(height, width) if look == "tiles" else [(0, 0, height, width)]
            near = look == "near"
            kind, net = (NEAR, self.near) if near else (FAR, self.far)
            anchors_A2 = self.near_anchors_A2 if near else self.far_anchors_A2
            parts = [frames_BHWC[:, y : y + h, x : x + w] for y, x, h, w in views]
            raw_NA16, logit_NA1 = net(sampling.letterbox(torch.cat(parts), kind.size) * 2 - 1)
            _, _, rows, columns = views[0]
            score_NA, box_NA4 = decode(raw_NA16, logit_NA1, anchors_A2, kind.size, (rows, columns))
            corner = torch.tensor([(x, y, x, y) for y, x, _, _ in views], device=box_NA4.device)
            box_NA4 = box_NA4 + corner.repeat_interleave(n_frames, 0)[:, None]
            scores += (score_NA - self.doubts.get(look, 0.0)).split(n_frames)
            boxes += box_NA4.split(n_frames)
        return merge(torch.cat(scores, 1), torch.cat(boxes, 1), self.max_faces, self.min_score)


def tiles(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Overlapping squares (top, left, height, width) over a picture: ``TILE_ROWS`` along its shorter side."""
    shorter = min(height, width)
    side = min(shorter, math.ceil(shorter / (TILE_ROWS - (TILE_ROWS - 1) * _TILE_OVERLAP)))
    return [(y, x, side, side) for y in _starts(height, side) for x in _starts(width, side)]


def _starts(length: int, side: int) -> list[int]:
    step = side * (1 - _TILE_OVERLAP)
    n = 1 if length <= side else 1 + -int(-(length - side - 1e-6) // step)
    return [round(i * (length - side) / max(1, n - 1)) for i in range(n)]


def anchors(kind: _Detector, device: torch.device | str = "cpu") -> torch.Tensor:
    """Centres of a detector's boxes: float32 [A, 2], x and y, shares of the square.

    Layers of one stride share their grid (``ssd_anchors_calculator.cc`` with fixed sizes).
    """
    parts = []
    for stride in sorted(set(kind.strides)):
        n = kind.size // stride
        centre = (torch.arange(n, device=device) + 0.5) / n
        yx = torch.cartesian_prod(centre, centre)
        parts.append(yx.flip(1).repeat_interleave(kind.per_layer * kind.strides.count(stride), 0))
    return torch.cat(parts)


def decode(
    raw_BA16: torch.Tensor,
    logit_BA1: torch.Tensor,
    anchors_A2: torch.Tensor,
    size: int,
    frame_size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores float32 [B, A] and boxes float32 [B, A, 4] (x_min, y_min, x_max, y_max) in pixels of the frame.

    Args:
        raw_BA16: a detector's boxes: centre, size, six points of the face, in pixels from the anchor.
        logit_BA1: float32.
        size: pixels, a side of the detector's picture.
        frame_size: (height, width) in pixels of the frames that were letterboxed.
    """
    height, width = frame_size
    side = max(height, width)
    margin = torch.tensor([(side - width) / 2, (side - height) / 2], device=raw_BA16.device)
    centre = (raw_BA16[..., :2] / size + anchors_A2) * side - margin
    half = raw_BA16[..., 2:4] * (side / size / 2)
    # Scores that are NaN, of frames that hold NaN, would fail every comparison: no face. Boxes turned inside
    # out are none either.
    score = logit_BA1[..., 0].clamp(-_SCORE_LIMIT, _SCORE_LIMIT).sigmoid()
    score = score.masked_fill((half <= 0).any(-1) | score.isnan(), 0.0)
    return score, torch.cat((centre - half, centre + half), -1)


def merge(score_BA: torch.Tensor, box_BA4: torch.Tensor, max_faces: int, min_score: float) -> FoundFaces:
    """Overlapping boxes become their mean, weighted by score, with the best one's score
    (``non_max_suppression_calculator.cc``, WEIGHTED), the surest first."""
    score_BA = score_BA.masked_fill(score_BA < min_score, 0.0)
    n = min(_CANDIDATES, score_BA.shape[1])
    left_BN, best_BN = score_BA.topk(n, 1)
    box_BN4 = box_BA4.gather(1, best_BN[..., None].expand(-1, -1, 4))
    area_BN = (box_BN4[..., 2:] - box_BN4[..., :2]).clamp(min=0).prod(-1)
    scores, boxes = [], []
    for _ in range(max_faces):
        score_B, place_B = left_BN.max(1)
        best_B14 = box_BN4.gather(1, place_B[:, None, None].expand(-1, 1, 4))
        low = torch.maximum(box_BN4[..., :2], best_B14[..., :2])
        high = torch.minimum(box_BN4[..., 2:], best_B14[..., 2:])
        shared_BN = (high - low).clamp(min=0).prod(-1)
        union_BN = area_BN + area_BN.gather(1, place_B[:, None]) - shared_BN
        same_BN = (shared_BN > MIN_OVERLAP * union_BN).scatter(1, place_B[:, None], True)
        weight_BN = left_BN.masked_fill(~same_BN, 0.0)
        sum_B1 = weight_BN.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        boxes.append((weight_BN[:, None] @ box_BN4)[:, 0] / sum_B1)
        scores.append(score_B)
        left_BN = left_BN.masked_fill(same_BN, 0.0)
    return FoundFaces(torch.stack(scores, 1), torch.stack(boxes, 1))
