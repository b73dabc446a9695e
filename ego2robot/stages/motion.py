"""How much moves in a clip: the cheap gate, the reference pipeline's definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ego2robot_kernels.motion import motion

from ego2robot.types import ClipFrames


def motion_scores(clips: Sequence[ClipFrames]) -> np.ndarray:
    """Mean |grey difference| between every second frame of each clip, of the picture alone.

    The black bars of a letterboxed frame never differ, so a score over the whole frame is scaled up by
    frame area / picture area: a portrait video is not taken for a still one.

    Args:
        clips: frames of one size on one device; clips of different length may be mixed.

    Returns:
        float32 [B], share of full scale; 0 for a clip of fewer than two used frames.
    """
    if not clips:
        return np.zeros(0, np.float32)
    scores = motion([clip.frames_THWC for clip in clips]).cpu().numpy()
    height, width = clips[0].frames_THWC.shape[1:3]
    picture = np.array([clip.content[2] * clip.content[3] for clip in clips], np.float32)
    return scores * (np.float32(height * width) / picture)
