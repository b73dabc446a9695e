"""How much moves in a clip: the cheap gate, the reference pipeline's definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ego2robot_kernels.camera import small_greys
from ego2robot_kernels.greys import motion_from_greys
from ego2robot_kernels.motion import STEP, motion

from ego2robot.types import ClipFrames


def used_greys(clips: Sequence[ClipFrames]) -> list[torch.Tensor]:
    """uint8 [U_i, 90, 160] of each clip: of every second frame, those that the decoder made if it did."""
    return [
        small_greys(clip.frames_THWC[::STEP]) if clip.greys_Thw is None else clip.greys_Thw[::STEP]
        for clip in clips
    ]


def motion_scores(clips: Sequence[ClipFrames], greys: Sequence[torch.Tensor] | None = None) -> np.ndarray:
    """Mean |grey difference| between every second frame of each clip, of the picture alone.

    The black bars of a letterboxed frame never differ, so a score over the whole frame is scaled up by
    frame area / picture area: a portrait video is not taken for a still one.

    Args:
        clips: frames of one size on one device; clips of different length may be mixed.
        greys: their :func:`used_greys`, if they are there already; the score is the same to the bit.

    Returns:
        float32 [B], share of full scale; 0 for a clip of fewer than two used frames.
    """
    if not clips:
        return np.zeros(0, np.float32)
    found = motion([c.frames_THWC for c in clips]) if greys is None else motion_from_greys(greys, step=1)
    scores = found.cpu().numpy()
    height, width = clips[0].frames_THWC.shape[1:3]
    picture = np.array([clip.content[2] * clip.content[3] for clip in clips], np.float32)
    return scores * (np.float32(height * width) / picture)
