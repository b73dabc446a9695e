"""From the landmark network's numbers to hands in the frame, as MediaPipe's graph does it.

Constants: ``hand_landmarks_detector_graph.cc`` and ``hand_landmarks_deduplication_calculator.cc`` of
MediaPipe 1.2.
"""

from __future__ import annotations

import math

import torch

from ego2robot.types import N_LANDMARKS

SIZE = 224  # pixels, a side of the network's picture
_DEPTH = 0.4  # the network's z is in units of this much of x
_SAME_DISTANCE = 0.2  # of the larger palm: landmarks nearer than this match
_SAME_LANDMARKS = 10  # so many matches, and
_SAME_OVERLAP = 0.2  # boxes that overlap by more than this, are one hand
_PALM = ((0, 5), (5, 17), (17, 0))  # wrist, knuckles of the index and of the little finger
# For the next frame's crop: what turns least with the fingers (hand_landmarks_to_rect_calculator.cc).
_STEADY = (0, 1, 2, 3, 5, 6, 9, 10, 13, 14, 17, 18)
_WRIST, _INDEX, _MIDDLE, _RING = 0, 5, 9, 13
_SCALE, _SHIFT = 2.0, -0.1  # of the box around them, along the hand


def project(raw_N63: torch.Tensor, rect_N4: torch.Tensor) -> torch.Tensor:
    """Landmarks in the crop to landmarks in the frame.

    Args:
        raw_N63: float32, 21 x (x, y, z) in pixels of the crop.
        rect_N4: float32, the crops, see :class:`ego2robot.hands_net.palm.Palms`.

    Returns:
        float32 [N, 21, 3], pixels of the frame; z, relative to the wrist, as well.
    """
    xyz = raw_N63.unflatten(1, (N_LANDMARKS, 3)) / SIZE
    side, rotation = rect_N4[:, 2, None], rect_N4[:, 3]
    xy = turn(xyz[..., :2] - 0.5, rotation) * side[..., None] + rect_N4[:, None, :2]
    return torch.cat((xy, (xyz[..., 2] / _DEPTH * side)[..., None]), -1)


def turn(xy_NL2: torch.Tensor, rotation_N: torch.Tensor) -> torch.Tensor:
    """Points turned clockwise (y runs down) by radians."""
    cos, sin = rotation_N.cos()[:, None], rotation_N.sin()[:, None]
    x, y = xy_NL2.unbind(-1)
    return torch.stack((cos * x - sin * y, sin * x + cos * y), -1)


def world(raw_N63: torch.Tensor, rect_N4: torch.Tensor) -> torch.Tensor:
    """Metric landmarks, turned back from the crop's rotation: float32 [N, 21, 3], metres."""
    xyz = raw_N63.unflatten(1, (N_LANDMARKS, 3))
    return torch.cat((turn(xyz[..., :2], rect_N4[:, 3]), xyz[..., 2:]), -1)


def rects(landmarks_NL2: torch.Tensor) -> torch.Tensor:
    """Where to look for hands that were here a frame ago: float32 [N, 4], as ``Palms.rect_BK4``.

    Args:
        landmarks_NL2: float32 [N, 21, 2], pixels of the frame.
    """
    knuckles = (landmarks_NL2[:, _INDEX] + landmarks_NL2[:, _RING]) / 2
    towards = (knuckles + landmarks_NL2[:, _MIDDLE]) / 2 - landmarks_NL2[:, _WRIST]
    rotation = math.pi / 2 - torch.atan2(-towards[:, 1], towards[:, 0])
    rotation = rotation - 2 * math.pi * torch.floor((rotation + math.pi) / (2 * math.pi))
    steady = landmarks_NL2[:, list(_STEADY)]
    middle = (steady.amax(1) + steady.amin(1)) / 2
    upright = turn(steady - middle[:, None], -rotation)
    low, high = upright.amin(1), upright.amax(1)
    size = high - low
    centre = (low + high) / 2
    # Shifted along the hand before it is turned back, as the box is.
    centre = torch.stack((centre[:, 0], centre[:, 1] + _SHIFT * size[:, 1]), 1)
    centre = turn(centre[:, None], rotation)[:, 0] + middle
    return torch.cat((centre, (_SCALE * size.amax(1))[:, None], rotation[:, None]), 1)


def first_of_each(landmarks_BKL2: torch.Tensor, present_BK: torch.Tensor) -> torch.Tensor:
    """Which hands are not a second detection of an earlier one: bool [B, K], False where none is present.

    Args:
        landmarks_BKL2: float32, pixels of the frame.
        present_BK: bool.
    """
    n_hands = present_BK.shape[1]
    palm_BK = torch.stack(
        [(landmarks_BKL2[:, :, a] - landmarks_BKL2[:, :, b]).norm(dim=-1) for a, b in _PALM]
    ).amax(0)
    near_BKK = _SAME_DISTANCE * torch.maximum(palm_BK[:, :, None], palm_BK[:, None, :])
    between_BKKL = (landmarks_BKL2[:, :, None] - landmarks_BKL2[:, None]).norm(dim=-1)
    matches_BKK = (between_BKKL < near_BKK[..., None]).sum(-1)
    low_BK2, high_BK2 = landmarks_BKL2.amin(2), landmarks_BKL2.amax(2)
    low = torch.maximum(low_BK2[:, :, None], low_BK2[:, None])
    high = torch.minimum(high_BK2[:, :, None], high_BK2[:, None])
    shared_BKK = (high - low).clamp(min=0).prod(-1)
    area_BK = (high_BK2 - low_BK2).prod(-1)
    overlap_BKK = shared_BKK / (area_BK[:, :, None] + area_BK[:, None] - shared_BKK).clamp(min=1e-9)
    same_BKK = (matches_BKK >= _SAME_LANDMARKS) & (overlap_BKK > _SAME_OVERLAP)
    kept = [present_BK[:, 0]]
    for i in range(1, n_hands):  # a hand yields to those that were kept before it, not to all before it
        earlier = torch.stack(kept, 1) & same_BKK[:, i, :i]
        kept.append(present_BK[:, i] & ~earlier.any(1))
    return torch.stack(kept, 1)
