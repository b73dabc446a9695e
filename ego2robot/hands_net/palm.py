"""From the palm detector's numbers to rotated rectangles around hands, as MediaPipe's graph does it.

Constants: ``hand_detector_graph.cc`` of MediaPipe 1.2. Coordinates between the detector and the rectangles
are shares of the letterboxed square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SIZE = 192  # pixels, a side of the detector's picture
N_KEYPOINTS = 7  # of a palm: 0 is the wrist, 2 the knuckle of the middle finger
MIN_OVERLAP = 0.3  # intersection over union from which two boxes are one palm
SCALE = 2.6  # of the palm's longer side: a hand is that much larger
SHIFT = 0.5  # of the palm's height, from the palm towards the fingers
# MediaPipe's graph writes 90 into an option that is in radians. 90 rad are 116.6°, not 90°, so its crops
# show hands tilted by 26.6°; the landmarks that are to be matched come from such crops.
TARGET_ANGLE = 90.0
_STRIDES = (8, 16, 16, 16)  # pixels between anchors, layer by layer
_ANCHORS_PER_LAYER = 2
_SCORE_LIMIT = 100.0  # logits beyond are clipped


@dataclass(frozen=True)
class Palms:
    """The K best palms of each frame, best first.

    Attributes:
        score_BK: float32, 0 to 1; 0 where there is no such palm.
        rect_BK4: float32, where the hand is looked for: centre x, centre y and side in pixels of the frame,
            clockwise rotation in radians; not to be used where the score is 0.
    """

    score_BK: torch.Tensor
    rect_BK4: torch.Tensor


def anchors(device: torch.device | str = "cpu") -> torch.Tensor:
    """Centres of the detector's boxes: float32 [2016, 2], x and y, shares of the square.

    Layers of one stride share their grid (``ssd_anchors_calculator.cc`` with fixed sizes).
    """
    parts = []
    for stride in sorted(set(_STRIDES)):
        n = SIZE // stride
        centre = (torch.arange(n, device=device) + 0.5) / n
        yx = torch.cartesian_prod(centre, centre)
        parts.append(yx.flip(1).repeat_interleave(_ANCHORS_PER_LAYER * _STRIDES.count(stride), 0))
    return torch.cat(parts)


def find(
    raw_BA18: torch.Tensor,
    logit_BA1: torch.Tensor,
    anchors_A2: torch.Tensor,
    frame_size: tuple[int, int],
    max_hands: int,
    min_score: float,
) -> Palms:
    """Decodes, merges overlapping boxes and turns the best into rectangles.

    Overlapping boxes become their mean, weighted by score, with the best one's score
    (``non_max_suppression_calculator.cc``, WEIGHTED). MediaPipe does so until no box is left and then takes
    the first ``max_hands``; here it stops there.

    Args:
        raw_BA18: float32, the detector's boxes: centre, size, seven keypoints, in pixels from the anchor.
        logit_BA1: float32.
        anchors_A2: of :func:`anchors`.
        frame_size: (height, width) in pixels of the frames that were letterboxed.
        max_hands: K.
        min_score: boxes below do not count.
    """
    points_BAP2 = raw_BA18.unflatten(2, (-1, 2)) / SIZE
    # All but the size are relative to the anchor.
    moved = torch.ones(points_BAP2.shape[2], 1, device=raw_BA18.device)
    moved[1] = 0
    points_BAP2 = points_BAP2 + moved * anchors_A2[:, None, :]
    centre, size = points_BAP2[:, :, 0], points_BAP2[:, :, 1]
    low_BA2, high_BA2 = centre - size / 2, centre + size / 2
    area_BA = size.prod(-1)
    # Scores that are NaN (of frames that hold NaN) fail the comparison, as do boxes turned inside out.
    score_BA = logit_BA1[..., 0].clamp(-_SCORE_LIMIT, _SCORE_LIMIT).sigmoid()
    counts_BA = (score_BA >= min_score) & (size >= 0).all(-1)
    # Not torch.where: it would copy its number to a GPU, which a CUDA graph forbids.
    left_BA = score_BA.masked_fill(~counts_BA, 0.0)
    flat_BAC = points_BAP2.flatten(2).masked_fill(~counts_BA[..., None], 0.0)
    scores, merged = [], []
    for _ in range(max_hands):
        score_B, best_B = left_BA.max(1)
        best = best_B[:, None, None].expand(-1, 1, 2)
        low = torch.maximum(low_BA2, low_BA2.gather(1, best))
        high = torch.minimum(high_BA2, high_BA2.gather(1, best))
        shared_BA = (high - low).clamp(min=0).prod(-1)
        union_BA = area_BA + area_BA.gather(1, best_B[:, None]) - shared_BA
        same_BA = shared_BA > MIN_OVERLAP * union_BA
        # The best one belongs to itself even where its box has no area.
        same_BA = same_BA.scatter(1, best_B[:, None], True)
        weight_BA = left_BA.masked_fill(~same_BA, 0.0)
        sum_B1 = weight_BA.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        merged.append((weight_BA[:, None] @ flat_BAC)[:, 0] / sum_B1)
        scores.append(score_B)
        left_BA = left_BA.masked_fill(same_BA, 0.0)
    points_BKP2 = torch.stack(merged, 1).unflatten(2, (-1, 2))
    return Palms(torch.stack(scores, 1), _rects(points_BKP2, frame_size))


def _rects(points_BKP2: torch.Tensor, frame_size: tuple[int, int]) -> torch.Tensor:
    """Palms to rectangles of whole hands (``detections_to_rects``, ``rect_transformation_calculator``)."""
    height, width = frame_size
    side = max(height, width)
    centre = (points_BKP2[:, :, 0] - 0.5) * side
    size = points_BKP2[:, :, 1] * side
    towards = points_BKP2[:, :, 2 + 2] - points_BKP2[:, :, 2]
    rotation = TARGET_ANGLE - torch.atan2(-towards[..., 1], towards[..., 0])
    rotation = rotation - 2 * math.pi * torch.floor((rotation + math.pi) / (2 * math.pi))
    shift = SHIFT * size[..., 1]
    x = centre[..., 0] + width / 2 + shift * rotation.sin()
    y = centre[..., 1] + height / 2 - shift * rotation.cos()
    return torch.stack((x, y, SCALE * size.amax(-1), rotation), -1)
